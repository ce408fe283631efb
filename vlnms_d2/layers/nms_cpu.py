"""NMS of many queries on the CPU, with one bit per query.

The rule of ``nms``, "a box is kept if no better-ranked box that overlaps it is kept", concerns only
pairs of overlapping boxes, and those are few. Sets of queries are stored as the bits of uint64
words: for each box the queries that keep it, and for each pair the queries in which the one box
ranks above the other. Applying the rule once then takes an AND and an OR per pair and 64 queries:

1. Once for all queries, find the pairs of overlapping boxes (``_OverlapGraph``).
2. For each chunk of queries, compare the scores of each pair (``_OverlapGraph._suppression_bits``),
3. apply the rule until nothing changes (``_OverlapGraph.suppressed``),
4. and sort the kept boxes (``_best``).

If each query has its own boxes, step 1 finds the pairs that may overlap in some query, and step 2
also computes the IoU of each pair in each query.

This is written in NumPy: on arrays that fit into the cache it is as fast as torch on one thread,
and it does not synchronize threads, which is slow while other processes occupy the cores.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .nms_iou import iou, kernel_threshold, separate_classes

# Beyond these two limits torchvision's NMS query by query is faster, since it compares only kept
# boxes with others. Same-class pairs, as a multiple of the Q * N scores:
_MAX_PAIRS_PER_SCORE = 2
# Overlapping pairs, as a multiple of N; half of this if each query has its own boxes and IoUs.
_MAX_OVERLAPS_PER_BOX = 64
# Bounds memory: finding the overlapping pairs takes about 60 bytes per same-class pair.
_MAX_PAIRS = 1 << 21
# Temporary arrays should fit into the cache of a core: elements computed at once, and scores in a
# chunk of queries. But a chunk should have enough queries to fill the bits of a word.
_MAX_ELEMENTS = 1 << 15
_MAX_SCORES = 1 << 17
_MIN_CHUNK = 64

# The sort key of suppressed boxes, which come last.
_LAST = np.iinfo(np.int64).max


def nms_cpu(
    boxes: Tensor, scores: Tensor, classes: Tensor, iou_threshold: float, topk: int
) -> tuple[Tensor, Tensor] | None:
    """``multi_query_nms`` with checked arguments on the CPU; neither N nor Q is 0.

    Returns None if so many boxes overlap that torchvision's NMS query by query is faster.
    """
    num_queries, num_boxes = scores.shape
    boxes_per_query = boxes.dim() == 3
    max_pairs = min(_MAX_PAIRS, _MAX_PAIRS_PER_SCORE * scores.numel())
    threshold = kernel_threshold(iou_threshold, boxes)
    shifted, groups = separate_classes(boxes, classes)
    pairs = _pairs_within_groups(groups.numpy(), max_pairs)
    if pairs is None:
        return None

    boxes, shifted, scores = boxes.numpy(), shifted.numpy(), scores.numpy()
    if boxes_per_query:
        # The shift differs from query to query, so hulls of shifted boxes are larger.
        overlaps = _hulls_meet(boxes if groups.any() else shifted, *pairs)  # [P]
    else:
        overlaps = _overlap(shifted.T, pairs[0], pairs[1], threshold)  # [P]
    pairs = pairs[:, overlaps]  # [2, E]
    if pairs.shape[1] > _MAX_OVERLAPS_PER_BOX * num_boxes // (2 if boxes_per_query else 1):
        return None

    graph = _OverlapGraph(pairs, threshold)
    keep = np.empty((num_queries, topk), dtype=np.int64)
    num_kept = np.empty(num_queries, dtype=np.int64)
    for chunk in _chunks(num_queries, max(_MIN_CHUNK, _MAX_SCORES // num_boxes)):
        ranks = descending_ranks(scores[chunk])
        suppressed = graph.suppressed(ranks, shifted[chunk] if boxes_per_query else None)
        keep[chunk] = _best(ranks, graph.members, suppressed, topk)
        num_kept[chunk] = np.minimum(num_boxes - suppressed.sum(axis=1), topk)
    return torch.from_numpy(keep), torch.from_numpy(num_kept)


def _chunks(total: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, total, size))


def _pairs_within_groups(groups: np.ndarray, max_pairs: float) -> np.ndarray | None:
    """All pairs i < j with equal ``groups`` [N], as int64 [2, P]; None if P > ``max_pairs``."""
    order = groups.argsort(kind="stable")
    in_order = groups[order]
    # Each element forms a pair with each element that follows it in its group.
    position = np.arange(len(groups))
    followers = np.searchsorted(in_order, in_order, side="right") - position - 1
    num_pairs = int(followers.sum())
    if num_pairs > max_pairs:
        return None
    first = np.repeat(position, followers)
    second = first + 1 + np.arange(num_pairs)
    second -= np.repeat(followers.cumsum() - followers, followers)
    return order[np.stack([first, second])]


def _overlap(corners: np.ndarray, src: np.ndarray, dst: np.ndarray, threshold: float) -> np.ndarray:
    """Whether the IoU of each pair of boxes is above the threshold, bool [P, ...].

    ``corners``: float [4, N, ...]; ``src`` and ``dst``: int64 [P], indices into N.
    """
    corners = np.ascontiguousarray(corners)
    overlap = np.empty((len(src), *corners.shape[2:]), dtype=bool)
    # The IoU of empty or infinite boxes may be NaN, which is not above any threshold.
    with np.errstate(all="ignore"):
        for chunk in _chunks(len(src), max(1, _MAX_ELEMENTS // corners[0, 0].size)):
            pair = corners.take(src[chunk], axis=1), corners.take(dst[chunk], axis=1)
            overlap[chunk] = iou(*pair, fused=False) > threshold
    return overlap


def _hulls_meet(boxes: np.ndarray, src: np.ndarray, dst: np.ndarray) -> np.ndarray:
    """Whether pairs of boxes [Q, N, 4] may overlap in any query: bool [P].

    The hull of a box is the smallest box that contains it in all queries. Boxes whose hulls do not
    meet cannot overlap.
    """
    # True of the computed sizes as well, since rounding is monotonic.
    low, high = boxes.min(axis=0)[:, :2], boxes.max(axis=0)[:, 2:]
    with np.errstate(invalid="ignore"):
        size = np.minimum(high[src], high[dst]) - np.maximum(low[src], low[dst])
    # Not `(size > 0).all(axis=1)`: hulls with NaN meet all others.
    return ~(size <= 0).any(axis=1)


def descending_ranks(scores: np.ndarray) -> np.ndarray:
    """Sort keys for descending order of scores float [Q, N], with NaN first: int32 [Q, N].

    Equal scores have equal keys or, if they are float64, keys in index order.
    """
    as_integer = np.int32 if scores.dtype == np.float32 else np.int64
    limits = np.iinfo(as_integer)
    # The bits of floats, read as integers, ascend with positive values and descend with negative
    # ones. Reverse the order of the latter, then of all. Adding 0.0 turns -0.0 into 0.0.
    bits = (scores + 0.0).view(as_integer)
    ranks = ~(bits ^ ((bits >> (limits.bits - 1)) & limits.max))
    ranks[np.isnan(scores)] = limits.min
    if as_integer is np.int64:  # replace keys by positions, which fit into int32
        order = ranks.argsort(axis=1, kind="stable")
        ranks = np.empty(scores.shape, dtype=np.int32)
        np.put_along_axis(ranks, order, np.arange(scores.shape[1], dtype=np.int32)[None], axis=1)
    return ranks


class _OverlapGraph:
    """The E pairs of boxes that overlap, and the M boxes that are in any of these pairs.

    Args:
        pairs: int64 [2, E], indices of boxes, the lower one first.
        threshold: of the IoU, if each query has its own boxes.

    Attributes:
        members: int64 [M], indices of the boxes in any pair, in ascending order.
    """

    def __init__(self, pairs: np.ndarray, threshold: float):
        self._threshold = threshold
        self.members, ends = np.unique(pairs, return_inverse=True)
        self._src, self._dst = ends.reshape(pairs.shape)
        # Each pair in both directions, sorted by the box that would be suppressed. Of these 2E
        # entries, those of the m-th member begin at start[m].
        target = np.concatenate([self._dst, self._src])
        self._order = target.argsort(kind="stable")
        self._suppressor = np.concatenate([self._src, self._dst])[self._order]  # [2E]
        self._start = np.searchsorted(target[self._order], np.arange(len(self.members)))  # [M]

    def suppressed(self, ranks: np.ndarray, boxes: np.ndarray | None) -> np.ndarray:
        """The members that each query of a chunk of q suppresses, bool [q, M].

        Args:
            ranks: int32 [q, N], from ``descending_ranks``.
            boxes: float [q, N, 4], or None if all pairs overlap in all queries.
        """
        num_queries = len(ranks)
        if not len(self.members):
            return np.zeros((num_queries, 0), dtype=bool)
        # W = ceil(q / 64) words.
        suppresses = self._suppression_bits(ranks, boxes)  # [W, 2E]
        kept = np.full((len(suppresses), len(self.members)), ~np.uint64(0))  # [W, M]
        while True:
            # A box is suppressed if any of its suppressors is kept.
            blocking = kept.take(self._suppressor, axis=1) & suppresses
            suppressed = np.bitwise_or.reduceat(blocking, self._start, axis=1)
            if np.array_equal(kept, ~suppressed):
                break
            kept = ~suppressed
        octets = np.ascontiguousarray(suppressed.T).view(np.uint8)  # [M, 8 * W]
        bits = np.unpackbits(octets, axis=1, count=num_queries)
        return np.ascontiguousarray(bits.T).view(bool)

    def _suppression_bits(self, ranks: np.ndarray, boxes: np.ndarray | None) -> np.ndarray:
        """For each pair in both directions, the queries in which the first box is better ranked
        and overlaps the second: uint64 [W, 2E], the bits beyond the last query 0."""
        num_queries, num_pairs = len(ranks), len(self._src)
        ranks = np.ascontiguousarray(ranks.take(self.members, axis=1).T)  # [M, q]
        if boxes is not None:
            corners = np.ascontiguousarray(boxes.take(self.members, axis=1).T)  # [4, M, q]
        octets = np.zeros((2, num_pairs, 8 * -(-num_queries // 64)), dtype=np.uint8)
        for chunk in _chunks(num_pairs, max(1, _MAX_ELEMENTS // num_queries)):
            src, dst = self._src[chunk], self._dst[chunk]
            # Of equal scores the lower index, src, ranks better.
            forward = ranks.take(src, axis=0) <= ranks.take(dst, axis=0)
            backward = ~forward
            if boxes is not None:
                overlap = _overlap(corners, src, dst, self._threshold)
                forward &= overlap
                backward &= overlap
            packed = np.packbits(np.stack([forward, backward]), axis=2)
            octets[:, chunk, : packed.shape[2]] = packed
        words = octets.reshape(2 * num_pairs, -1)[self._order].view(np.uint64)
        return np.ascontiguousarray(words.T)


def _best(ranks: np.ndarray, members: np.ndarray, suppressed: np.ndarray, topk: int) -> np.ndarray:
    """The first ``topk`` boxes of each row of ``ranks`` int32 [q, N], without those of ``members``
    int64 [M] that are ``suppressed`` bool [q, M]: int64 [q, topk], padded with -1."""
    # Sorting integers that combine rank and index is much faster than an argsort of the ranks.
    num_boxes = ranks.shape[1]
    index_bits = (num_boxes - 1).bit_length()
    keys = (ranks.astype(np.int64) << index_bits) | np.arange(num_boxes)
    keys[:, members] = np.where(suppressed, _LAST, keys.take(members, axis=1))
    if 0 < topk < num_boxes:
        keys = np.partition(keys, topk - 1, axis=1)
    keys = np.sort(keys[:, :topk], axis=1)
    return np.where(keys == _LAST, -1, keys & ((1 << index_bits) - 1))
