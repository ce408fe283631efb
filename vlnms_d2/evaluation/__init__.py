"""Evaluators, each a Detectron2 `DatasetEvaluator`."""

from .grounding import PhraseGroundingEvaluator, RECEvaluator, RESEvaluator
from .recall import ProposalRecallEvaluator
from .retrieval import RetrievalEvaluator

__all__ = [
    "PhraseGroundingEvaluator",
    "ProposalRecallEvaluator",
    "RECEvaluator",
    "RESEvaluator",
    "RetrievalEvaluator",
]
