"""NMS of many queries on the CPU, with the boxes that a box suppresses as the bits of a word.

Few of N boxes overlap, and only those of one class compete, so the boxes fall into parts that have
nothing to do with each other, the same for all queries. All queries and all parts walk down their
rankings at once: step k looks at the k-th best box of every part. Its bit in the part's set of
suppressed boxes tells whether it is kept; if so, the set takes up the set of the boxes that it
overlaps. There are as many steps as boxes in the largest part, each a handful of operations on
words of 64 bits, and one sort of integers does the ranking within all parts of a query.

All of this is NumPy: on arrays that fit the cache it is as fast as torch on one thread, and it does
not wait for other threads, which takes long where other processes hold the cores.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .nms_arithmetic import compared_boxes, iou, kernel_threshold, uses_trick
from .nms_parts import Parts, pairs_within_groups

# Elements of one temporary array; the queries are split into chunks to hold it. What a chunk works
# on should stay in the cache of a core.
_MAX_ELEMENTS = 1 << 16
_WORD = 64
# Score keys of float32 have 32 bits; a key of 63 bits needs room for two indices of boxes beside.
_MAX_BOXES = 1 << 15
# Microseconds, as measured on one core of an EPYC; only the ratios of such times matter here.
_TIME_OF_STEP = 8
# Pairs of boxes of one query whose IoU is computed at once, which takes several such arrays.
_MAX_PAIRS = 1 << 14
_NEVER = np.iinfo(np.int64).max


def nms_bitsets(
    boxes: Tensor, scores: Tensor, classes: Tensor, iou_threshold: float, topk: int
) -> tuple[Tensor, Tensor] | None:
    """Arguments and results of ``multi_query_nms``, checked, on the CPU; neither N nor Q is 0.

    None where going query by query is faster: few queries, or boxes that overlap very much.
    """
    found = _neighbours(boxes, classes, iou_threshold, len(scores))
    if found is None:
        return None
    parts, neighbours = found
    num_queries, num_boxes = scores.shape
    keep = np.empty((num_queries, topk), dtype=np.int64)
    num_kept = np.full(num_queries, num_boxes)
    step = _queries_at_once(num_boxes, neighbours)
    for start in range(0, num_queries, step):
        chunk = slice(start, start + step)
        keys, index_bits = falling_keys(scores[chunk].numpy())
        if len(parts.members):
            gone = _suppressed(keys, index_bits, parts, neighbours.words(chunk))
            keys[:, parts.members] = np.where(gone, _NEVER, keys[:, parts.members])
            num_kept[chunk] -= gone.sum(axis=1)
        keep[chunk] = _best(keys, index_bits, topk)
    return torch.from_numpy(keep), torch.from_numpy(num_kept).clamp_(max=topk)


def _neighbours(
    boxes: Tensor, classes: Tensor, iou_threshold: float, num_queries: int
) -> tuple[Parts, _SharedNeighbours | _OwnNeighbours] | None:
    """Who may suppress whom; None as soon as it is clear that it does not pay."""
    num_boxes, own_boxes = boxes.shape[-2], boxes.dim() == 3
    # What is spent on finding out should be little beside what going query by query takes.
    alone = _time_alone(classes, boxes)
    bearable = num_queries * alone / (4 if own_boxes else 2)
    if num_boxes > _MAX_BOXES or _time_of_pairs(0) > bearable:
        return None
    compared, groups = compared_boxes(boxes, classes)
    numbers = np.zeros(num_boxes, dtype=np.int64) if groups is None else groups.numpy()
    sizes = np.unique(numbers, return_counts=True)[1]
    if _time_of_pairs(float((sizes * (sizes - 1) // 2).sum())) > bearable:
        return None
    threshold = kernel_threshold(iou_threshold, boxes)
    if own_boxes:
        # Moved apart by class, a box lies elsewhere in each query.
        edges = _meeting((compared if groups is None else boxes).numpy(), numbers)
        if _OwnNeighbours.time_of_ious(len(edges[0])) > alone:
            return None
    else:
        edges = _overlapping(compared.numpy(), numbers, threshold)
    parts = Parts.of(num_boxes, *edges)
    neighbours = (
        _OwnNeighbours(parts, compared.numpy(), threshold)
        if own_boxes
        else _SharedNeighbours(parts)
    )
    num_steps = -(-num_queries // _queries_at_once(num_boxes, neighbours)) * parts.largest
    time = num_queries * neighbours.time_per_query + _TIME_OF_STEP * num_steps
    return None if time > num_queries * alone else (parts, neighbours)


def _queries_at_once(num_boxes: int, neighbours: _SharedNeighbours | _OwnNeighbours) -> int:
    return max(1, _MAX_ELEMENTS // max(num_boxes, neighbours.elements_per_query))


def _time_alone(classes: Tensor, boxes: Tensor) -> float:
    """The least time that torchvision may take for one query, in microseconds."""
    passes = 1 if uses_trick(boxes) else len(classes.unique())
    return 60 * passes + 0.12 * len(classes)


def _time_of_pairs(num_pairs: float) -> float:
    """Of making that many pairs and their parts, in microseconds."""
    return 400 + 0.07 * num_pairs


def falling_keys(scores: np.ndarray) -> tuple[np.ndarray, int]:
    """Integers that rise as scores fall, of equal scores with the index.

    Args:
        scores: float32 or float64 [Q, N]; NaN ranks first.

    Returns:
        ``(keys, index_bits)``: int64 [Q, N], not negative, of at most 32 + ``index_bits`` bits, the
        lowest ``index_bits`` bits being the index; int.
    """
    num_boxes = scores.shape[1]
    index_bits = max(1, (num_boxes - 1).bit_length())
    as_integer = np.int32 if scores.dtype == np.float32 else np.int64
    limits = np.iinfo(as_integer)
    # As integers, floats of one sign are in order; 0 is added as -0 must equal it.
    bits = (scores + 0.0).view(as_integer)
    rank = ~(bits ^ ((bits >> (limits.bits - 1)) & limits.max))
    rank[np.isnan(scores)] = limits.min
    if as_integer is np.int32:
        keys = rank.astype(np.int64)
        keys -= limits.min
    else:
        keys = np.empty_like(rank)
        order = rank.argsort(axis=1, kind="stable")
        np.put_along_axis(keys, order, np.arange(num_boxes)[None], axis=1)
    keys <<= index_bits
    keys |= np.arange(num_boxes)
    return keys, index_bits


def _overlapping(
    boxes: np.ndarray, groups: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of boxes [N, 4] of one group with an IoU above the threshold, int64 [E] each."""
    corners = np.ascontiguousarray(boxes.T)
    return _edges(groups, lambda src, dst: _above(corners, src, dst, threshold))


def _above(corners: np.ndarray, src: np.ndarray, dst: np.ndarray, threshold: float) -> np.ndarray:
    """Whether the IoU of boxes [4, N, ...] is above the threshold, pair by pair: bool [P, ...]."""
    # Boxes without an area, and infinite ones, have an IoU that is no number: not above.
    with np.errstate(all="ignore"):
        return iou(corners.take(src, axis=1), corners.take(dst, axis=1), fused=False) > threshold


def _meeting(boxes: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of boxes [Q, N, 4] of one group that may overlap in any query, int64 [E] each."""
    # In each query a box lies within its hull over all queries, and rounding keeps that order.
    low = np.ascontiguousarray(boxes[..., :2].min(axis=0).T)
    high = np.ascontiguousarray(boxes[..., 2:].max(axis=0).T)

    def meet(src: np.ndarray, dst: np.ndarray) -> np.ndarray:
        right = np.minimum(high.take(src, axis=1), high.take(dst, axis=1))
        left = np.maximum(low.take(src, axis=1), low.take(dst, axis=1))
        # Negated, so that what is not a number may overlap with everything.
        with np.errstate(invalid="ignore"):
            return ~(right - left <= 0).any(axis=0)

    return _edges(groups, meet)


def _edges(
    groups: np.ndarray, tied: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The pairs within groups for which ``tied(src, dst)`` holds."""
    chunks = []
    for pairs in pairs_within_groups(groups):
        which = tied(*pairs)
        chunks.append([ends[which] for ends in pairs])
    src, dst = map(np.concatenate, zip(*chunks, strict=True))
    return src, dst


class _SharedNeighbours:
    """Which boxes suppress each other, where that is the same for all queries."""

    def __init__(self, parts: Parts):
        num_words = _num_words(parts)
        bits = np.zeros((len(parts.members), num_words * _WORD), dtype=np.uint8)
        bits[parts.src, parts.place[parts.dst]] = 1
        bits[parts.dst, parts.place[parts.src]] = 1
        words = np.packbits(bits, axis=1, bitorder="little").view("<u8")
        self._words = np.ascontiguousarray(words.T, dtype=np.uint64)
        self.elements_per_query = self._words.size
        self.time_per_query = 4 + 0.03 * self._words.size

    def words(self, chunk: slice) -> np.ndarray:
        """uint64 [W, M]: for each member the bits of the members of its part it suppresses."""
        return self._words


class _OwnNeighbours:
    """Which boxes [Q, N, 4] suppress each other in each query; ``parts`` holds all that might."""

    def __init__(self, parts: Parts, boxes: np.ndarray, threshold: float):
        self._parts, self._boxes, self._threshold = parts, boxes, threshold
        edge = np.arange(len(parts.src))
        ends = np.stack([np.concatenate(pair) for pair in ((edge, edge), (parts.src, parts.dst))])
        bit = parts.place[np.concatenate([parts.dst, parts.src])]
        ends = np.concatenate([ends, bit[None] // 8])
        # Of each bit of a byte: the edges that set it, and where.
        self._setting = [ends[:, bit % 8 == number] for number in range(8)]
        self._num_bytes = -(-parts.largest // 8)
        num_words = _num_words(parts) * len(parts.members)
        self.time_per_query = self.time_of_ious(len(parts.src)) + 0.04 * num_words
        self.elements_per_query = max(len(parts.src) // 8, num_words // 2)

    @staticmethod
    def time_of_ious(num_pairs: int) -> float:
        """For one query, in microseconds."""
        return 6 + 0.015 * num_pairs

    def words(self, chunk: slice) -> np.ndarray:
        """uint64 [W, M, q]: as for shared boxes, for each of the q queries of the chunk."""
        parts = self._parts
        # Queries last: what follows handles whole rows of them.
        corners = np.ascontiguousarray(self._boxes[chunk].take(parts.members, axis=1).T)
        above = np.empty((len(parts.src), corners.shape[2]), dtype=bool)
        step = max(1, _MAX_PAIRS // corners.shape[2])
        for start in range(0, len(above), step):
            ends = (end[start : start + step] for end in (parts.src, parts.dst))
            above[start : start + step] = _above(corners, *ends, self._threshold)
        all_bits = np.negative(above.view(np.uint8))
        octets = np.zeros((self._num_bytes, *corners.shape[1:]), dtype=np.uint8)
        for number, (edge, member, octet) in enumerate(self._setting):
            octets[octet, member] |= all_bits[edge] & np.uint8(1 << number)
        words = np.zeros((_num_words(parts), *corners.shape[1:]), dtype=np.uint64)
        for number, octet in enumerate(octets):
            words[number // 8] |= octet.astype(np.uint64) << np.uint64(number % 8 * 8)
        return words


def _num_words(parts: Parts) -> int:
    return -(-parts.largest // _WORD)


def _suppressed(keys: np.ndarray, index_bits: int, parts: Parts, words: np.ndarray) -> np.ndarray:
    """Which members the queries of a chunk suppress.

    Args:
        keys: int64 [q, N], see ``falling_keys``.
        index_bits: of the keys.
        parts: of the N boxes.
        words: uint64 [W, M] or [W, M, q], see ``_SharedNeighbours``.

    Returns:
        bool [q, M].
    """
    num_queries = len(keys)
    # By part and then score; the index becomes the member's number.
    number = np.arange(len(parts.members))
    keys = keys[:, parts.members] + ((parts.part << (32 + index_bits)) + number - parts.members)
    keys.sort(axis=1)
    order, ends = parts.steps
    member = (keys.T[order]) & ((1 << index_bits) - 1)
    own_bit = _own_bits(parts, len(words))
    bit = own_bit.take(member, axis=1)
    if words.ndim == 3:
        member *= num_queries
        member += np.arange(num_queries)
    neighbours = words.reshape(len(words), -1).take(member, axis=1)
    gone = np.zeros((len(words), parts.count, num_queries), dtype=np.uint64)
    start = 0
    for end in ends:
        state = gone[:, : end - start]
        found = np.bitwise_or.reduce(state & bit[:, start:end], axis=0)
        state |= neighbours[:, start:end] * (found == 0)
        start = end
    # A kept box suppresses none that is kept, better or worse: bits hold to the end.
    gone = np.bitwise_or.reduce(gone[:, parts.part] & own_bit[:, :, None], axis=0)
    return (gone != 0).T


def _own_bits(parts: Parts, num_words: int) -> np.ndarray:
    """uint64 [W, M], the bit of each member in the sets of its part."""
    bits = np.zeros((num_words, len(parts.place)), dtype=np.uint64)
    word, bit = np.divmod(parts.place, _WORD)
    bits[word, np.arange(len(word))] = np.uint64(1) << bit.astype(np.uint64)
    return bits


def _best(keys: np.ndarray, index_bits: int, topk: int) -> np.ndarray:
    """int64 [q, topk]: the indices of the lowest keys int64 [q, N], -1 for those never kept."""
    if 0 < topk < keys.shape[1]:
        keys = np.partition(keys, topk - 1, axis=1)
    keys = np.sort(keys[:, :topk], axis=1)
    return np.where(keys == _NEVER, -1, keys & ((1 << index_bits) - 1))
