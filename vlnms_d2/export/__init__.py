"""Files that second stages read, and the jobs that write them for whole data sets."""

from collections.abc import Iterable, Sequence

from .base import ListFormat, ProposalFormat, QueryProposals
from .feature_formats import DDPN, BottomUp, Imram, Scan
from .json_formats import Albef, CocoResults, JsonLines, MAttNet, NMTree, PerExpression
from .pair_store import PairStore

FORMATS: dict[str, ProposalFormat] = {
    each.name: each
    for each in (JsonLines(), CocoResults(), PerExpression(), MAttNet(), NMTree(), Albef())
}
"""Formats without box features, by name."""

FEATURE_FORMATS: dict[str, type[ProposalFormat]] = {
    each.name: each for each in (DDPN, BottomUp, Scan, Imram)
}
"""Formats with box features, by name."""


def check_formats(names: Sequence[str], known: Iterable[str]) -> None:
    """Check names of formats.

    Raises:
        ValueError: there are none, one is unknown or one is repeated; lists the known ones.
    """
    known = list(known)
    if not names or len(set(names)) < len(names) or not set(names) <= set(known):
        raise ValueError(
            f"formats are {', '.join(names) or 'none'}, expected some of {', '.join(known)}, each "
            "once"
        )
