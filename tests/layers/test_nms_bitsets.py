"""Tests of what NMS by bit sets is made of: keys, pairs, parts, and when it is taken."""

import itertools
import math

import numpy as np
import pytest
import torch
from torchvision.ops import batched_nms

from vlnms_d2.layers import nms_bitsets, nms_parts
from vlnms_d2.layers.nms_bitsets import falling_keys
from vlnms_d2.layers.nms_parts import Parts, pairs_within_groups


@pytest.fixture
def always(monkeypatch):
    """Take bit sets whatever they cost."""
    monkeypatch.setattr(nms_bitsets, "_time_alone", lambda *_: math.inf)


def squares(num_queries, num_boxes, spread, own=False):
    generator = torch.Generator().manual_seed(num_boxes)
    shape = (num_queries, num_boxes, 2) if own else (num_boxes, 2)
    corner = torch.rand(shape, generator=generator) * spread
    boxes = torch.cat([corner, corner + 50], dim=-1)
    return boxes, torch.rand(num_queries, num_boxes, generator=generator)


def assert_as_torchvision(boxes, scores, classes, iou_threshold):
    topk = scores.shape[1]
    keep, num_kept = nms_bitsets.nms_bitsets(boxes, scores, classes, iou_threshold, topk)
    sets = boxes.expand(len(scores), -1, -1)
    for own, row, kept, count in zip(sets, scores, keep, num_kept, strict=True):
        assert kept[:count].tolist() == batched_nms(own, row, classes, iou_threshold).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keys_rise_as_scores_fall(dtype):
    special = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1e-38, 3e38, -3e38, 0.5, 0.5]
    special += [float("inf"), -float("inf"), float("nan"), -float("nan")]
    generator = torch.Generator().manual_seed(0)
    which = torch.randint(len(special), (50, 37), generator=generator)
    scores = torch.tensor(special, dtype=dtype)[which]
    keys, index_bits = falling_keys(scores.numpy())
    assert index_bits == 6
    assert (keys >= 0).all()
    assert (keys < 1 << (32 + index_bits)).all()
    order = np.sort(keys, axis=1) & ((1 << index_bits) - 1)
    assert order.tolist() == scores.argsort(dim=1, descending=True, stable=True).tolist()


def test_key_of_the_only_score():
    keys, index_bits = falling_keys(np.zeros((2, 1), dtype=np.float32))
    assert index_bits == 1
    assert (keys & 1 == 0).all()


@pytest.mark.parametrize("max_pairs", [1, 5, 1 << 20])
@pytest.mark.parametrize("num_groups", [1, 3, 40])
def test_pairs_within_groups(monkeypatch, max_pairs, num_groups):
    monkeypatch.setattr(nms_parts, "_MAX_PAIRS", max_pairs)
    groups = np.random.default_rng(num_groups).integers(num_groups, size=20)
    found = []
    for src, dst in pairs_within_groups(groups):
        assert len(src) == len(dst) <= max(max_pairs, 19)
        found += zip(src.tolist(), dst.tolist(), strict=True)
    expected = [
        pair for pair in itertools.combinations(range(20), 2) if len({*groups[list(pair)]}) == 1
    ]
    assert sorted(tuple(sorted(pair)) for pair in found) == expected


def parts_by_search(num, edges):
    """The connected parts of two and more elements, as sets."""
    left, parts = set(range(num)), []
    while left:
        part, new = set(), {left.pop()}
        while new:
            part |= new
            new = {b for pair in edges for a, b in (pair, pair[::-1]) if a in new} - part
        left -= part
        parts.append(part)
    return [part for part in parts if len(part) > 1]


@pytest.mark.parametrize("num_edges", [0, 1, 8, 20, 60])
@pytest.mark.parametrize("seed", range(4))
def test_parts(num_edges, seed):
    rng = np.random.default_rng(seed)
    pairs = np.array(list(itertools.combinations(rng.permutation(30), 2)))
    src, dst = rng.choice(pairs, num_edges, replace=False).T
    parts = Parts.of(30, src, dst)
    expected = parts_by_search(30, list(zip(src.tolist(), dst.tolist(), strict=True)))
    found = [parts.members[parts.part == number].tolist() for number in range(parts.count)]
    assert sorted(map(sorted, found)) == sorted(map(sorted, expected))
    assert found == [sorted(part) for part in found]
    sizes = [len(part) for part in found]
    assert sizes == sorted(sizes, reverse=True)
    assert parts.largest == max(sizes, default=0)
    assert parts.place.tolist() == [place for size in sizes for place in range(size)]
    assert parts.members[parts.src].tolist() == src.tolist()
    assert parts.members[parts.dst].tolist() == dst.tolist()


def test_steps_of_parts():
    # A part of three elements, two of two, and one element alone.
    parts = Parts.of(8, np.array([6, 0, 1, 3]), np.array([0, 2, 5, 7]))
    order, ends = parts.steps
    assert parts.members.tolist() == [0, 2, 6, 1, 5, 3, 7]
    assert parts.members[order].tolist() == [0, 1, 3, 2, 5, 7, 6]
    assert ends == [3, 6, 7]


def test_parts_of_a_long_chain():
    path = np.random.default_rng(0).permutation(2000)
    parts = Parts.of(2000, path[:-1], path[1:])
    assert parts.count == 1
    assert parts.members.tolist() == list(range(2000))


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("num_boxes", [2, 7, 8, 9, 63, 64, 65, 130])
def test_one_part_of_as_many_boxes_as_words_hold_and_more(num_boxes, own):
    boxes, scores = squares(5, num_boxes, spread=40, own=own)
    assert_as_torchvision(boxes, scores, torch.zeros(num_boxes, dtype=torch.int64), 0.4)


@pytest.mark.usefixtures("always")
def test_boxes_that_meet_in_one_query_only():
    boxes = torch.tensor([[0.0, 0, 9, 9], [100, 0, 109, 9], [200, 0, 209, 9]]).repeat(3, 1, 1)
    boxes[1, 2] = boxes[1, 0]
    scores = torch.tensor([[0.9, 0.8, 0.7]]).repeat(3, 1)
    classes = torch.zeros(3, dtype=torch.int64)
    _, num_kept = nms_bitsets.nms_bitsets(boxes, scores, classes, 0.5, 3)
    assert num_kept.tolist() == [3, 2, 3]
    # Another class keeps them apart.
    _, num_kept = nms_bitsets.nms_bitsets(boxes, scores, torch.tensor([0, 0, 1]), 0.5, 3)
    assert num_kept.tolist() == [3, 3, 3]


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("num_boxes", [40, 1010])
def test_own_boxes_with_coordinates_that_are_no_numbers(bad, num_boxes):
    boxes, scores = squares(4, num_boxes, spread=4 * num_boxes, own=True)
    boxes[1, 3, 2] = boxes[2, 5, 0] = bad
    assert_as_torchvision(boxes, scores, torch.arange(num_boxes) % 3, 0.3)


@pytest.mark.parametrize("own", [False, True])
def test_taken_for_many_queries_only(own):
    boxes, scores = squares(200, 100, spread=1000, own=own)
    classes = torch.arange(100) % 5
    assert nms_bitsets.nms_bitsets(boxes, scores, classes, 0.5, 10) is not None
    few = boxes[:2] if own else boxes
    assert nms_bitsets.nms_bitsets(few, scores[:2], classes, 0.5, 10) is None


@pytest.mark.parametrize("num_queries", [100, 1000])
def test_not_taken_where_all_boxes_of_each_query_overlap(num_queries):
    boxes, scores = squares(num_queries, 300, spread=10, own=True)
    classes = torch.zeros(300, dtype=torch.int64)
    assert nms_bitsets.nms_bitsets(boxes, scores, classes, 0.5, 10) is None


@pytest.mark.usefixtures("always")
def test_not_taken_for_more_boxes_than_keys_have_room_for(monkeypatch):
    boxes, scores = squares(2, 9, spread=100)
    classes = torch.zeros(9, dtype=torch.int64)
    monkeypatch.setattr(nms_bitsets, "_MAX_BOXES", 9)
    assert nms_bitsets.nms_bitsets(boxes, scores, classes, 0.5, 9) is not None
    monkeypatch.setattr(nms_bitsets, "_MAX_BOXES", 8)
    assert nms_bitsets.nms_bitsets(boxes, scores, classes, 0.5, 9) is None
