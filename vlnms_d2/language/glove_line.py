"""One line of a file in GloVe's text format: `word v1 ... vd`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def split_line(line: str, dim: int) -> tuple[str, list[str]]:
    """The word of a line and its fields, `dim` of them if the line is as it should be.

    Lines are split from the right, since a few "words" of GloVe 840B hold spaces.
    """
    word, *values = line.rstrip().rsplit(" ", dim)
    first, *more = word.split(" ")
    if more and all(map(is_number, more)):  # too many numbers, not a longer word
        return first, more + values
    return word, values


def parse_vector(values: Sequence[str], dim: int) -> np.ndarray | None:
    """float32 [dim], or None where the fields are not that many finite numbers."""
    if len(values) != dim:
        return None
    try:
        with np.errstate(over="ignore"):  # infinite, hence refused below
            vector = np.array([float(value) for value in values], dtype=np.float32)
    except ValueError:
        return None
    return vector if np.isfinite(vector).all() else None


def is_number(field: str) -> bool:
    """Whether a field reads as a number."""
    try:
        float(field)
    except ValueError:
        return False
    return True
