"""NMS of many queries on the CPU, with one bit per query.

This is the rule of ``nms``, "a box is kept if no better-ranked box that overlaps it is kept",
repeated until nothing changes. It only concerns pairs of overlapping boxes, and those are few. For
each pair, the queries in which one box suppresses the other are the set bits of uint64 words; so
are, for each box, the queries that keep it. Applying the rule once then takes an AND and an OR per
pair for 64 queries at a time. The steps are:

1. Once for all queries, find the pairs of overlapping boxes.
2. For each chunk of queries, compare the scores of each pair (``_Pairs.suppression_bits``),
3. apply the rule until nothing changes (``_Pairs.suppressed``),
4. and sort the boxes that are left (``_best``).

If each query has its own boxes, step 1 finds the pairs that may overlap in any query, and step 2
also computes their IoU in each query.

All of this is NumPy: on arrays that fit into the cache it is as fast as torch on one thread, and it
does not wait for other threads, which takes long while other processes occupy the cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from .nms_iou import iou, kernel_threshold, separate_classes

# Beyond these limits torchvision's NMS query by query is faster, as it compares only the kept boxes
# with others: pairs to compare, per box and query, and overlapping pairs, per box. The latter cost
# more if each query has its own boxes, as their IoUs differ.
_MAX_PAIRS = 1
_MAX_OVERLAPS = 64
_MAX_OVERLAPS_OWN_BOXES = 16
# Temporary arrays stay in the cache of a core: elements computed at once, and scores in a chunk of
# queries, which has no fewer queries than a word has bits.
_MAX_ELEMENTS = 1 << 14
_MAX_SCORES = 1 << 16
_MIN_CHUNK = 64

_LAST = np.iinfo(np.int64).max


def nms_cpu(
    boxes: Tensor, scores: Tensor, classes: Tensor, iou_threshold: float, topk: int
) -> tuple[Tensor, Tensor] | None:
    """``multi_query_nms`` with checked arguments on the CPU; neither N nor Q is 0.

    Returns None if so many boxes overlap that torchvision's NMS query by query is faster.
    """
    num_queries, num_boxes = scores.shape
    own_boxes = boxes.dim() == 3
    compared, groups = separate_classes(boxes, classes)
    if groups is None:
        groups, boxes = torch.zeros_like(classes), compared
    pairs = _pairs_within_groups(groups.numpy(), _MAX_PAIRS * num_boxes * num_queries)
    if pairs is None:
        return None
    compared, threshold = compared.numpy(), kernel_threshold(iou_threshold, boxes)
    if own_boxes:
        # The unshifted boxes, as the shift by class differs between queries.
        hulls = _hulls(boxes.numpy())
        pairs = _select(pairs, lambda src, dst: _intersect(hulls, src, dst))
    else:
        corners = np.ascontiguousarray(compared.T)
        pairs = _select(pairs, lambda src, dst: _overlap(corners, src, dst, threshold))
    if pairs.shape[1] > num_boxes * (_MAX_OVERLAPS_OWN_BOXES if own_boxes else _MAX_OVERLAPS):
        return None

    pairs = _Pairs(pairs)
    keep = np.empty((num_queries, topk), dtype=np.int64)
    num_kept = np.empty(num_queries, dtype=np.int64)
    for chunk in _chunks(num_queries, max(_MIN_CHUNK, _MAX_SCORES // num_boxes)):
        ranks = descending_ranks(scores[chunk].numpy())
        suppressed = pairs.suppressed(ranks, compared[chunk] if own_boxes else None, threshold)
        keep[chunk] = _best(ranks, pairs.members, suppressed, topk)
        num_kept[chunk] = num_boxes - suppressed.sum(axis=1)
    return torch.from_numpy(keep), torch.from_numpy(num_kept).clamp_(max=topk)


def _chunks(total: int, size: int) -> Iterator[slice]:
    """At least one slice, of at most ``size`` each."""
    return (slice(start, start + size) for start in range(0, max(total, 1), size))


def _pairs_within_groups(groups: np.ndarray, max_pairs: float) -> np.ndarray | None:
    """All pairs i < j with equal ``groups`` int [N], as int64 [2, P]; None if P > ``max_pairs``."""
    order = groups.argsort(kind="stable")
    in_order = groups[order]
    # Each element forms a pair with each of its followers in the group.
    position = np.arange(len(groups))
    followers = np.searchsorted(in_order, in_order, side="right") - position - 1
    num_pairs = int(followers.sum())
    if num_pairs > max_pairs:
        return None
    first = np.repeat(position, followers)
    offset = np.arange(num_pairs) - np.repeat(followers.cumsum() - followers, followers)
    return order[np.stack([first, first + 1 + offset])]


def _select(pairs: np.ndarray, test: Callable[..., np.ndarray]) -> np.ndarray:
    """The pairs int64 [2, P] for which ``test(src, dst)`` holds."""
    parts = (pairs[:, chunk] for chunk in _chunks(pairs.shape[1], _MAX_ELEMENTS))
    return np.concatenate([part[:, test(*part)] for part in parts], axis=1)


def _overlap(corners: np.ndarray, src: np.ndarray, dst: np.ndarray, threshold: float) -> np.ndarray:
    """Whether the IoU of boxes [4, N, ...] is above the threshold, pair by pair: bool [P, ...]."""
    # Boxes without an area and infinite ones have an IoU of NaN, which is not above.
    with np.errstate(all="ignore"):
        return iou(corners.take(src, axis=1), corners.take(dst, axis=1), fused=False) > threshold


def _hulls(boxes: np.ndarray) -> np.ndarray:
    """Of each box of [Q, N, 4], the hull [4, N] over all queries."""
    low, high = boxes.min(axis=0), boxes.max(axis=0)
    return np.ascontiguousarray(np.concatenate([low[:, :2], high[:, 2:]], axis=1).T)


def _intersect(hulls: np.ndarray, src: np.ndarray, dst: np.ndarray) -> np.ndarray:
    """Whether hulls [4, N] intersect, pair by pair: bool [P]. If not, no IoU is above 0, as
    rounding keeps the order of coordinates."""
    src, dst = hulls.take(src, axis=1), hulls.take(dst, axis=1)
    # Negated, so that hulls with NaN are taken to intersect everything.
    with np.errstate(invalid="ignore"):
        size = np.minimum(src[2:], dst[2:]) - np.maximum(src[:2], dst[:2])
        return ~(size <= 0).any(axis=0)


def descending_ranks(scores: np.ndarray) -> np.ndarray:
    """Integers in ascending order where scores are in descending order.

    Args:
        scores: float32 or float64 [Q, N]; NaN ranks first.

    Returns:
        int32 [Q, N]; equal scores have equal ranks, or ascending ones.
    """
    as_integer = np.int32 if scores.dtype == np.float32 else np.int64
    limits = np.iinfo(as_integer)
    # The bits of floats of one sign, read as integers, have their order. Adding 0 makes 0 of -0.
    bits = (scores + 0.0).view(as_integer)
    ranks = ~(bits ^ ((bits >> (limits.bits - 1)) & limits.max))
    ranks[np.isnan(scores)] = limits.min
    if as_integer is np.int32:
        return ranks
    order = ranks.argsort(axis=1, kind="stable")
    places = np.arange(scores.shape[1], dtype=np.int32)[None]
    ranks = np.empty(scores.shape, dtype=np.int32)
    np.put_along_axis(ranks, order, places, axis=1)
    return ranks


class _Pairs:
    """E pairs of overlapping boxes, from int64 [2, E] with the lower index first.

    Attributes:
        members: int64 [M], in ascending order, the boxes in these pairs.
    """

    def __init__(self, pairs: np.ndarray):
        self.members, ends = np.unique(pairs, return_inverse=True)
        self._src, self._dst = ends.reshape(pairs.shape)
        # Each pair in both directions, those that suppress the same box next to each other.
        suppressed = np.concatenate([self._dst, self._src])
        self._order = suppressed.argsort(kind="stable")
        self._suppressor = np.concatenate([self._src, self._dst])[self._order]
        self._start = np.searchsorted(suppressed[self._order], np.arange(len(self.members)))

    def suppressed(
        self, ranks: np.ndarray, boxes: np.ndarray | None, threshold: float
    ) -> np.ndarray:
        """The members that are suppressed in each of q queries.

        Args:
            ranks: int32 [q, N], see ``descending_ranks``.
            boxes: float [q, N, 4], the boxes of each query; a pair does not overlap in the queries
                in which its IoU is not above the threshold. None: all pairs overlap in all queries.
            threshold: see ``kernel_threshold``.

        Returns:
            bool [q, M].
        """
        num_queries, num_members = len(ranks), len(self.members)
        if not num_members:
            return np.zeros((num_queries, 0), dtype=bool)
        active = self._suppression_bits(ranks, boxes, threshold)  # [W, 2E]
        kept = np.full((len(active), num_members), ~np.uint64(0))  # [W, M]
        while True:
            # A box is suppressed if any suppressor is kept.
            blocking = kept.take(self._suppressor, axis=1) & active
            suppressed = np.bitwise_or.reduceat(blocking, self._start, axis=1)
            if np.array_equal(kept, ~suppressed):
                break
            kept = ~suppressed
        octets = np.ascontiguousarray(suppressed.T).view(np.uint8)  # [M, 8 * W]
        bits = np.unpackbits(octets, axis=1, count=num_queries)
        return np.ascontiguousarray(bits.T).view(bool)

    def _suppression_bits(
        self, ranks: np.ndarray, boxes: np.ndarray | None, threshold: float
    ) -> np.ndarray:
        """uint64 [W, 2E]: per pair and direction, the queries in which the one box suppresses the
        other if kept itself. The bits beyond the last query are 0."""
        num_queries, num_pairs = len(ranks), len(self._src)
        ranks = np.ascontiguousarray(ranks.take(self.members, axis=1).T)  # [M, q]
        if boxes is not None:
            corners = np.ascontiguousarray(boxes.take(self.members, axis=1).T)  # [4, M, q]
        num_octets, num_words = -(-num_queries // 8), -(-num_queries // 64)
        octets = np.zeros((2, num_pairs, 8 * num_words), dtype=np.uint8)
        for chunk in _chunks(num_pairs, max(1, _MAX_ELEMENTS // num_queries)):
            src, dst = self._src[chunk], self._dst[chunk]
            # Of equal scores the lower index is the better one.
            forward = ranks.take(src, axis=0) <= ranks.take(dst, axis=0)
            backward = ~forward
            if boxes is not None:
                overlap = _overlap(corners, src, dst, threshold)
                forward &= overlap
                backward &= overlap
            octets[0, chunk, :num_octets] = np.packbits(forward, axis=1)
            octets[1, chunk, :num_octets] = np.packbits(backward, axis=1)
        octets = octets.reshape(2 * num_pairs, -1)[self._order]
        return np.ascontiguousarray(octets.view(np.uint64).T)


def _best(ranks: np.ndarray, members: np.ndarray, suppressed: np.ndarray, topk: int) -> np.ndarray:
    """The kept boxes in ascending order of ranks.

    Args:
        ranks: int32 [q, N].
        members: int64 [M], the boxes that may be suppressed.
        suppressed: bool [q, M], whether they are.
        topk: how many to return per query.

    Returns:
        int64 [q, topk], padded with -1.
    """
    # One integer for rank and index sorts much faster than indices by rank.
    num_boxes = ranks.shape[1]
    index_bits = max(1, (num_boxes - 1).bit_length())
    keys = (ranks.astype(np.int64) << index_bits) | np.arange(num_boxes)
    keys[:, members] = np.where(suppressed, _LAST, keys.take(members, axis=1))
    if 0 < topk < num_boxes:
        keys = np.partition(keys, topk - 1, axis=1)
    keys = np.sort(keys[:, :topk], axis=1)
    return np.where(keys == _LAST, -1, keys & ((1 << index_bits) - 1))
