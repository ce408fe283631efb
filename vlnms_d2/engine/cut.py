"""How many proposals a query keeps: the three ways to say it."""

from __future__ import annotations

import math


def check_cut(top_n: int | None, score_thresh: float | None, mean_proposals: float | None) -> None:
    """Refuse values that cannot be, or more than one of them.

    Raises:
        ValueError: naming the value.
    """
    cuts = {
        "top_n": (top_n, lambda n: n >= 1, "at least 1"),
        "score_thresh": (score_thresh, lambda t: 0 <= t <= 1, "from 0 to 1"),
        "mean_proposals": (mean_proposals, lambda m: 1 <= m < math.inf, "at least 1"),
    }
    given = [name for name, (value, *_) in cuts.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are given, expected at most one of them")
    for name in given:
        value, is_valid, expected = cuts[name]
        if not is_valid(value):
            raise ValueError(f"{name} is {value}, expected a number {expected}")
