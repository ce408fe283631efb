"""Tests of the parts of NMS: ranks, pairs, chains and when they are chosen (CPU), and IoU."""

import itertools
import math
from fractions import Fraction
from unittest import mock

import numpy as np
import pytest
import torch
from torchvision.ops import batched_nms

from vlnms_d2.layers import multi_query_nms, nms, nms_cpu, nms_iou


@pytest.fixture
def without_limits(monkeypatch):
    """`nms_cpu` even if too many boxes overlap for it to be fast."""
    for limit in ("_MAX_PAIRS_PER_SCORE", "_MAX_OVERLAPS_PER_BOX"):
        monkeypatch.setattr(nms_cpu, limit, math.inf)


def squares(num_queries, num_boxes, spread, own_boxes=False):
    generator = torch.Generator().manual_seed(num_boxes)
    shape = (num_queries, num_boxes, 2) if own_boxes else (num_boxes, 2)
    corner = torch.rand(shape, generator=generator) * spread
    boxes = torch.cat([corner, corner + 50], dim=-1)
    return boxes, torch.rand(num_queries, num_boxes, generator=generator)


def assert_as_torchvision(boxes, scores, classes, iou_threshold):
    topk = scores.shape[1]
    keep, num_kept = nms_cpu.nms_cpu(boxes, scores, classes, iou_threshold, topk)
    sets = boxes.expand(len(scores), -1, -1)
    for query_boxes, row, kept, count in zip(sets, scores, keep, num_kept, strict=True):
        expected = batched_nms(query_boxes, row, classes, iou_threshold)
        assert kept[:count].tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranks_ascend_as_scores_descend(dtype):
    special = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1e-38, 3e38, -3e38, 0.5, 0.5]
    special += [float("inf"), -float("inf"), float("nan"), -float("nan")]
    generator = torch.Generator().manual_seed(0)
    which = torch.randint(len(special), (50, 37), generator=generator)
    scores = torch.tensor(special, dtype=dtype)[which]
    ranks = nms_cpu.descending_ranks(scores.numpy())
    assert ranks.dtype == np.int32
    order = ranks.argsort(axis=1, kind="stable")
    assert order.tolist() == scores.argsort(dim=1, descending=True, stable=True).tolist()
    # As `nms_cpu` sorts them: rank and index as one integer.
    keys = np.sort((ranks.astype(np.int64) << 6) | np.arange(37), axis=1)
    assert (keys & 63).tolist() == order.tolist()


@pytest.mark.parametrize("max_pairs", [1, 5, 1 << 20])
@pytest.mark.parametrize("num_groups", [1, 3, 40])
def test_pairs_within_groups(max_pairs, num_groups):
    groups = np.random.default_rng(num_groups).integers(num_groups, size=20)
    expected = [
        pair for pair in itertools.combinations(range(20), 2) if len({*groups[list(pair)]}) == 1
    ]
    pairs = nms_cpu._pairs_within_groups(groups, max_pairs)
    if len(expected) > max_pairs:
        assert pairs is None
    else:
        assert sorted(map(tuple, pairs.T.tolist())) == expected


@pytest.mark.usefixtures("without_limits")
@pytest.mark.parametrize("num_boxes", [900, 2000])
def test_long_chains_in_any_order(num_boxes):
    """A path of boxes, each of which overlaps the next, ranked along the path and at random."""
    rng = np.random.default_rng(0)
    path, *rankings = (torch.from_numpy(rng.permutation(num_boxes)) for _ in range(70))
    left = path[:, None] * 3.0
    boxes = torch.cat([left, 0 * left, left + 10, 0 * left + 10], dim=1)
    scores = torch.stack([path, -path, *rankings]).float()
    assert_as_torchvision(boxes, scores, torch.zeros(num_boxes, dtype=torch.int64), 0.5)


@pytest.mark.usefixtures("without_limits")
@pytest.mark.parametrize("own_boxes", [False, True])
@pytest.mark.parametrize("num_boxes", [2, 7, 8, 9, 63, 64, 65, 130])
def test_boxes_of_one_class_that_all_meet(num_boxes, own_boxes):
    boxes, scores = squares(5, num_boxes, spread=40, own_boxes=own_boxes)
    assert_as_torchvision(boxes, scores, torch.zeros(num_boxes, dtype=torch.int64), 0.4)


@pytest.mark.usefixtures("without_limits")
@pytest.mark.parametrize("own_boxes", [False, True])
@pytest.mark.parametrize("num_queries", [1, 7, 8, 9, 63, 64, 65, 130])
def test_as_many_queries_as_words_hold_and_more(monkeypatch, num_queries, own_boxes):
    boxes, scores = squares(num_queries, 30, spread=60, own_boxes=own_boxes)
    for min_chunk in (64, 100, 1000):
        monkeypatch.setattr(nms_cpu, "_MIN_CHUNK", min_chunk)
        assert_as_torchvision(boxes, scores, torch.arange(30) % 2, 0.4)


@pytest.mark.usefixtures("without_limits")
def test_boxes_that_meet_in_one_query_only():
    boxes = torch.tensor([[0.0, 0, 9, 9], [100, 0, 109, 9], [200, 0, 209, 9]]).repeat(3, 1, 1)
    boxes[1, 2] = boxes[1, 0]
    scores = torch.tensor([[0.9, 0.8, 0.7]]).repeat(3, 1)
    classes = torch.zeros(3, dtype=torch.int64)
    _, num_kept = nms_cpu.nms_cpu(boxes, scores, classes, 0.5, 3)
    assert num_kept.tolist() == [3, 2, 3]
    # Another class keeps them apart.
    _, num_kept = nms_cpu.nms_cpu(boxes, scores, torch.tensor([0, 0, 1]), 0.5, 3)
    assert num_kept.tolist() == [3, 3, 3]


@pytest.mark.usefixtures("without_limits")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("num_boxes", [40, 1010])
def test_own_boxes_with_coordinates_that_are_not_finite(bad, num_boxes):
    boxes, scores = squares(4, num_boxes, spread=4 * num_boxes, own_boxes=True)
    boxes[1, 3, 2] = boxes[2, 5, 0] = bad
    assert_as_torchvision(boxes, scores, torch.arange(num_boxes) % 3, 0.3)


@pytest.mark.parametrize("own_boxes", [False, True])
def test_chosen_for_many_queries_only(own_boxes):
    boxes, scores = squares(200, 100, spread=1000, own_boxes=own_boxes)
    classes = torch.arange(100) % 5
    assert nms_cpu.nms_cpu(boxes, scores, classes, 0.5, 10) is not None
    with mock.patch.object(nms, "nms_cpu", wraps=nms_cpu.nms_cpu) as chosen:
        multi_query_nms(boxes, scores, classes, 0.5, 10)
        assert chosen.call_count == 1
        few = boxes[:2] if own_boxes else boxes
        multi_query_nms(few, scores[:2], classes, 0.5, 10)
        assert chosen.call_count == 1


@pytest.mark.parametrize("num_queries", [100, 1000])
def test_not_taken_where_all_boxes_of_each_query_overlap(num_queries):
    boxes, scores = squares(num_queries, 300, spread=10, own_boxes=True)
    classes = torch.zeros(300, dtype=torch.int64)
    assert nms_cpu.nms_cpu(boxes, scores, classes, 0.5, 10) is None


def test_not_taken_for_few_queries_and_many_boxes_of_one_class():
    boxes, scores = squares(20, 100, spread=10_000)
    classes = torch.zeros(100, dtype=torch.int64)
    assert nms_cpu.nms_cpu(boxes, scores, classes, 0.5, 10) is None
    assert nms_cpu.nms_cpu(boxes, scores.repeat(3, 1), classes, 0.5, 10) is not None


# --- the arithmetic of IoU ---------------------------------------------------------------------


def exact_fused_iou(better, worse):
    """IoU of two float32 boxes by exact arithmetic, rounded where the CUDA kernel rounds."""

    def rounded(value: Fraction) -> Fraction:
        # Dividing integers rounds once, to float64, and converting to float32 once more. The result
        # may not be the nearest float32 if it is near the middle of two.
        nearest = torch.tensor(float(value), dtype=torch.float32)
        around = [
            nearest,
            *(torch.nextafter(nearest, nearest.new_tensor(x)) for x in (-1e30, 1e30)),
        ]
        return min((Fraction(x.item()) for x in around), key=lambda x: abs(x - value))

    a, b = ([Fraction(x) for x in box.tolist()] for box in (better, worse))
    width = max(rounded(min(a[2], b[2]) - max(a[0], b[0])), Fraction(0))
    height = max(rounded(min(a[3], b[3]) - max(a[1], b[1])), Fraction(0))
    inter = rounded(width * height)
    better_area = rounded(rounded(a[2] - a[0]) * rounded(a[3] - a[1]))
    areas = rounded(rounded(b[2] - b[0]) * rounded(b[3] - b[1]) + better_area)
    return float(rounded(inter / rounded(areas - inter)))


def test_fused_iou_rounds_as_the_cuda_kernel():
    generator = torch.Generator().manual_seed(3)
    corner = torch.rand(40, 2, generator=generator) * 30
    size = torch.rand(40, 2, generator=generator) * 80 + 20
    boxes = torch.cat([corner, corner + size], dim=1)
    better, worse = boxes[:20], boxes[20:]
    fused = nms_iou.iou(better.t(), worse.t(), fused=True)
    expected = [exact_fused_iou(a, b) for a, b in zip(better, worse, strict=True)]
    assert fused.tolist() == expected
    pairs = boxes.t()[:, :, None], boxes.t()[:, None]
    assert not torch.equal(nms_iou.iou(*pairs, fused=True), nms_iou.iou(*pairs, fused=False))
