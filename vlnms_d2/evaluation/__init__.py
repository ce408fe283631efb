"""Evaluators, each a Detectron2 `DatasetEvaluator`."""

from .recall import ProposalRecallEvaluator

__all__ = ["ProposalRecallEvaluator"]
