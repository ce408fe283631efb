"""Which boxes may compete at all: pairs within classes, and the parts that pairs tie together."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

# Pairs made at once.
_MAX_PAIRS = 1 << 14


def pairs_within_groups(groups: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All pairs of two different members of one group, each pair once.

    Args:
        groups: int [N], the group of each element.

    Yields:
        ``(src, dst)``, int64 [P] each: positions of elements; bounded chunks.
    """
    num = len(groups)
    order = np.argsort(groups, kind="stable")
    in_order = groups[order]
    # Each element pairs up with those of its group that follow it.
    first = np.arange(1, num + 1)
    count = np.searchsorted(in_order, in_order, side="right") - first
    end = np.cumsum(count)
    start = 0
    while start < num:
        done = end[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(end, done + _MAX_PAIRS, side="right")))
        counts = count[start:stop]
        shift = first[start:stop] - (end[start:stop] - counts - done)
        partner = np.arange(counts.sum()) + np.repeat(shift, counts)
        yield np.repeat(order[start:stop], counts), order[partner]
        start = stop


@dataclass(frozen=True)
class Parts:
    """The connected parts of a graph that have at least two elements, from the largest down.

    The elements of these parts are the M members, numbered part by part, within a part by rising
    index.

    Attributes:
        members: int64 [M], which elements they are.
        part: int64 [M], the part of each.
        place: int64 [M], which member of its part each is, from 0.
        src: int64 [E], where each edge starts, as the number of a member.
        dst: int64 [E], where each edge ends.
    """

    members: np.ndarray
    part: np.ndarray
    place: np.ndarray
    src: np.ndarray
    dst: np.ndarray

    @classmethod
    def of(cls, num: int, src: np.ndarray, dst: np.ndarray) -> "Parts":
        """The parts of ``num`` elements with edges from ``src`` to ``dst``, int64 [E] each."""
        label = _connected(num, src, dst)
        size = np.bincount(label, minlength=num)[label]
        members = np.flatnonzero(size > 1)
        members = members[np.lexsort((label[members], -size[members]))]
        label = label[members]
        begins = np.ones(len(members), dtype=bool)
        begins[1:] = label[1:] != label[:-1]
        part = np.cumsum(begins) - 1
        place = np.arange(len(members)) - np.flatnonzero(begins)[part]
        number = np.zeros(num, dtype=np.int64)
        number[members] = np.arange(len(members))
        return cls(members, part, place, number[src], number[dst])

    @cached_property
    def count(self) -> int:
        """How many parts there are."""
        return int(self.part[-1]) + 1 if len(self.part) else 0

    @cached_property
    def largest(self) -> int:
        """How many members the largest part has."""
        return int(self.place.max()) + 1 if len(self.place) else 0

    @cached_property
    def steps(self) -> tuple[np.ndarray, list[int]]:
        """The members step by step: first the first of each part, then the second of each that has
        one, and so on; and where each step ends. The parts of a step are always the first ones."""
        return np.lexsort((self.part, self.place)), np.cumsum(np.bincount(self.place)).tolist()


def _connected(num: int, src: np.ndarray, dst: np.ndarray) -> np.ndarray:
    """For each of ``num`` elements the smallest one that edges connect it with."""
    label = np.arange(num)
    while True:
        ends = label[src], label[dst]
        low = np.minimum(*ends)
        lower = label.copy()
        for end in ends:
            np.minimum.at(lower, end, low)
        lower = lower[lower]
        if np.array_equal(lower, label):
            return label
        # Elements follow the label that they had to where that one has gone.
        label = lower[label]
