"""Evaluators, each a Detectron2 `DatasetEvaluator`, and the similarities of stored pairs."""

from .grounding import PhraseGroundingEvaluator, RECEvaluator, RESEvaluator
from .pair_scoring import pair_retrieval, score_pairs
from .recall import ProposalRecallEvaluator
from .retrieval import RetrievalEvaluator
