"""What second stages read: a file per format. None of these needs features."""

from .base import ListFormat, ProposalFormat, QueryProposals
from .coco import CocoResults
from .jsonl import JsonLines
from .mattnet import MAttNet
from .per_expression import PerExpression

FORMATS: dict[str, ProposalFormat] = {
    one.name: one for one in (JsonLines(), CocoResults(), PerExpression(), MAttNet())
}
"""By name."""

__all__ = [
    "FORMATS",
    "CocoResults",
    "JsonLines",
    "ListFormat",
    "MAttNet",
    "PerExpression",
    "ProposalFormat",
    "QueryProposals",
]
