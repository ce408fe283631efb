"""What second stages read: a file per format."""

from collections.abc import Iterable, Sequence

from .base import ListFormat, ProposalFormat, QueryProposals
from .coco import CocoResults
from .ddpn import DDPN
from .jsonl import JsonLines
from .mattnet import MAttNet, NMTree
from .pairs import PairStore
from .per_expression import PerExpression
from .scan import Scan

FORMATS: dict[str, ProposalFormat] = {
    one.name: one for one in (JsonLines(), CocoResults(), PerExpression(), MAttNet(), NMTree())
}
"""Those that need no features, by name."""

FEATURE_FORMATS: dict[str, type[ProposalFormat]] = {one.name: one for one in (DDPN, Scan)}
"""Those that need the boxes' features, by name."""


def check_formats(names: Sequence[str], known: Iterable[str]) -> None:
    """Refuse names of formats that are not known, none, or one twice.

    Raises:
        ValueError: listing those that are known.
    """
    known = list(known)
    if not names or len(set(names)) < len(names) or not set(names) <= set(known):
        raise ValueError(
            f"formats are {', '.join(names) or 'none'}, expected some of {', '.join(known)}, each "
            "once"
        )


__all__ = [
    "DDPN",
    "FEATURE_FORMATS",
    "FORMATS",
    "CocoResults",
    "JsonLines",
    "ListFormat",
    "MAttNet",
    "NMTree",
    "PairStore",
    "PerExpression",
    "ProposalFormat",
    "QueryProposals",
    "Scan",
    "check_formats",
]
