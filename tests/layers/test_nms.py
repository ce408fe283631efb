"""Tests of NMS for many queries against torchvision's NMS, run once per query."""

import math
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pretend_cuda import DEVICES
from torchvision.ops import batched_nms

from vlnms_d2.layers import multi_query_nms, nms, nms_cpu

THRESHOLDS = [0.0, 0.1, 0.3, 0.5, 0.6, 0.7, 0.9, 1.0]


def reference(boxes, scores, classes, iou_threshold, topk):
    """The kept indices of each query, by torchvision's NMS."""
    rows = []
    for query, query_scores in enumerate(scores):
        query_boxes = boxes if boxes.dim() == 2 else boxes[query]
        kept = batched_nms(query_boxes, query_scores, classes, iou_threshold)
        if query_boxes.numel() > (4_000 if boxes.is_cpu else 100_000):
            # Torchvision does not define the order of equal scores here.
            kept = kept.sort().values
            kept = kept[query_scores[kept].argsort(descending=True, stable=True)]
        rows.append(kept if topk is None or topk < 0 else kept[:topk])
    return rows


def nms_cpu_without_limits(*problem):
    """`nms_cpu` even if too many boxes overlap for it to be fast."""
    limits = dict.fromkeys(("_MAX_PAIRS_PER_SCORE", "_MAX_OVERLAPS_PER_BOX"), math.inf)
    with mock.patch.multiple(nms_cpu, **limits):
        return nms_cpu.nms_cpu(*problem)


def results_of_all_algorithms(boxes, scores, classes, iou_threshold, topk):
    """The result of `multi_query_nms`, and of each algorithm that it may choose."""
    yield multi_query_nms(boxes, scores, classes, iou_threshold, topk)
    if scores.numel():
        num_boxes = scores.shape[1]
        topk = num_boxes if topk is None or topk < 0 else min(topk, num_boxes)
        algorithms = [nms.nms_cuda]
        if scores.is_cpu:
            algorithms += [nms_cpu_without_limits, nms._query_by_query]
        for algorithm in algorithms:
            yield algorithm(boxes, scores, classes, iou_threshold, topk)


def assert_same(boxes, scores, classes, iou_threshold, topk=None):
    num_boxes = scores.shape[1]
    width = num_boxes if topk is None or topk < 0 else min(topk, num_boxes)
    rows = reference(boxes, scores, classes, iou_threshold, topk)
    for keep, num_kept in results_of_all_algorithms(boxes, scores, classes, iou_threshold, topk):
        assert keep.shape == (len(scores), width)
        assert keep.dtype == num_kept.dtype == torch.int64
        assert keep.device == num_kept.device == scores.device
        assert num_kept.tolist() == [len(row) for row in rows]
        for row, expected in zip(keep, rows, strict=True):
            assert row[: len(expected)].tolist() == expected.tolist()
            assert (row[len(expected) :] == -1).all()


def clustered(num_boxes, num_queries, num_classes=3, clusters=5, seed=0, own_boxes=False):
    """Boxes in clusters, such that each suppresses others and is suppressed."""
    generator = torch.Generator().manual_seed(seed)
    cluster = torch.randint(clusters, (num_boxes,), generator=generator)
    center = torch.rand(clusters, 2, generator=generator)[cluster] * 400
    size = torch.rand(clusters, 2, generator=generator)[cluster] * 80 + 20
    shape = (num_queries, num_boxes, 2) if own_boxes else (num_boxes, 2)
    center = center + torch.randn(shape, generator=generator) * 8
    size = size * (1 + 0.2 * torch.rand(shape, generator=generator))
    boxes = torch.cat([center - size / 2, center + size / 2], dim=-1).clamp(min=0)
    scores = torch.rand(num_queries, num_boxes, generator=generator)
    return boxes, scores, torch.randint(num_classes, (num_boxes,), generator=generator)


@st.composite
def problems(draw):
    """Boxes on a coarse grid: many equal boxes, empty boxes and IoUs exactly at a threshold."""
    num_boxes, num_queries = draw(st.integers(0, 24)), draw(st.integers(0, 5))
    own_boxes = draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    grid = draw(st.sampled_from([2, 5, 10, 30]))
    shape = (num_queries, num_boxes, 2) if own_boxes else (num_boxes, 2)
    corner = torch.randint(grid, shape, generator=generator)
    size = torch.randint(grid + 1, shape, generator=generator)
    scale, shift = draw(st.sampled_from([1.0, 0.1, 13.7, 1e4])), draw(st.sampled_from([0, -3]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    boxes = (torch.cat([corner, corner + size], dim=-1) + shift).to(dtype) * scale
    levels = draw(
        st.lists(
            st.sampled_from([0.0, -0.0, 1e-45, 1e-38, 1e-3, 0.5, 0.99999994, 1.0, -float("inf")]),
            min_size=1,
            max_size=4,
        )
    )
    which = torch.randint(len(levels), (num_queries, num_boxes), generator=generator)
    scores = torch.tensor(levels, dtype=dtype)[which]
    classes = torch.randint(draw(st.integers(1, 80)), (num_boxes,), generator=generator)
    topk = draw(st.sampled_from([None, -1, 0, 1, 3, 24, 100]))
    return boxes, scores, classes, draw(st.sampled_from(THRESHOLDS)), topk


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(problem=problems(), max_elements=st.sampled_from([1, 7, 100, 1 << 22]))
def test_equals_torchvision(monkeypatch, problem, max_elements):
    monkeypatch.setattr(nms_cpu, "_MAX_ELEMENTS", max_elements)
    monkeypatch.setattr(nms_cpu, "_MAX_SCORES", max_elements)
    monkeypatch.setattr(nms_cpu, "_MIN_CHUNK", 1)
    monkeypatch.setattr(nms, "_MAX_ELEMENTS", max_elements)
    assert_same(*problem)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("own_boxes", [False, True])
@pytest.mark.parametrize("iou_threshold", THRESHOLDS)
@pytest.mark.parametrize("num_classes", [1, 80])
def test_equals_torchvision_on_clustered_boxes(device, own_boxes, iou_threshold, num_classes):
    problem = clustered(300, 6, num_classes, own_boxes=own_boxes, seed=num_classes)
    assert_same(*(tensor.to(device) for tensor in problem), iou_threshold, 100)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_boxes", [999, 1000, 1001, 1100])
def test_either_strategy_of_torchvision(device, num_boxes):
    boxes, scores, classes = (t.to(device) for t in clustered(num_boxes, 3, 20, clusters=40))
    # Boxes left of the origin extend beyond the distance that the coordinate trick puts between
    # classes, so the two strategies differ: this fails if torchvision switches from one to the
    # other at a different number of boxes.
    boxes -= 200
    tied = (scores * 10).round() / 10
    for topk in (None, 50):
        assert_same(boxes, scores, classes, 0.4, topk)
        assert_same(boxes, tied, classes, 0.4, topk)


def test_the_two_strategies_differ_on_negative_coordinates():
    boxes, scores, classes = clustered(1000, 2, 20, clusters=40)
    boxes = boxes - 200
    filler = boxes.new_tensor([[9000.0, 9000.0, 9000.0, 9000.0]])
    keep, _ = multi_query_nms(boxes, scores, classes, 0.4)
    more = torch.cat([boxes, filler]), torch.cat([scores, torch.zeros(2, 1)], dim=1)
    kept_more, _ = multi_query_nms(*more, torch.cat([classes, classes[:1]]), 0.4)
    assert keep[0].tolist() != [i for i in kept_more[0].tolist() if i != 1000]


@pytest.mark.parametrize(
    ("iou_threshold", "suppressed"),
    # The IoU is computed in float32: 0.6 comes out above the threshold 0.6, 0.7 below 0.7.
    [(0.5, False), (0.6, True), (0.7, False), (0.8, True), (0.9, False)],
)
def test_iou_at_the_threshold(iou_threshold, suppressed):
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 10 * iou_threshold]], dtype=torch.float32)
    scores = torch.tensor([[0.9, 0.8], [0.8, 0.9]])
    classes = torch.zeros(2, dtype=torch.int64)
    assert_same(boxes, scores, classes, iou_threshold)
    assert multi_query_nms(boxes, scores, classes, iou_threshold)[1].tolist() == [
        2 - suppressed,
        2 - suppressed,
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("iou_threshold", [0.3, 0.5, 0.6, 0.7])
def test_rounding_right_at_the_threshold(device, iou_threshold):
    """Pairs whose exact IoU is the threshold, at coordinates that make it round either way."""
    generator = torch.Generator().manual_seed(1)
    corner = torch.rand(400, 2, generator=generator) * 1000
    size = torch.rand(400, 2, generator=generator) * 300 + 1
    inner = size * torch.tensor([iou_threshold, 1.0])
    boxes = torch.stack(
        [torch.cat([corner, corner + size], dim=1), torch.cat([corner, corner + inner], dim=1)], 1
    ).view(800, 4)
    scores = torch.rand(4, 800, generator=generator)
    classes = torch.arange(400).repeat_interleave(2)
    assert_same(boxes.to(device), scores.to(device), classes.to(device), iou_threshold)
    boxes = boxes + torch.rand(4, 1, 1, generator=generator)
    assert_same(boxes.to(device), scores.to(device), classes.to(device), iou_threshold)


@pytest.mark.parametrize("num_queries", [0, 1, 3])
@pytest.mark.parametrize("own_boxes", [False, True])
def test_no_boxes(num_queries, own_boxes):
    shape = (num_queries, 0, 4) if own_boxes else (0, 4)
    keep, num_kept = multi_query_nms(
        torch.empty(shape), torch.empty(num_queries, 0), torch.empty(0, dtype=torch.int64), 0.5, 100
    )
    assert keep.shape == (num_queries, 0)
    assert num_kept.tolist() == [0] * num_queries


@pytest.mark.parametrize("own_boxes", [False, True])
def test_no_queries(own_boxes):
    boxes = torch.rand((0, 5, 4) if own_boxes else (5, 4))
    keep, num_kept = multi_query_nms(
        boxes, torch.empty(0, 5), torch.zeros(5, dtype=torch.int64), 0.5, 3
    )
    assert keep.shape == (0, 3)
    assert num_kept.shape == (0,)


def test_one_box_is_kept():
    keep, num_kept = multi_query_nms(
        torch.zeros(1, 4), torch.zeros(2, 1), torch.zeros(1, dtype=torch.int64), 0.5, 100
    )
    assert keep.tolist() == [[0], [0]]
    assert num_kept.tolist() == [1, 1]


def test_the_longest_chain_of_suppressions():
    """Each box would be suppressed by the one before it, were that one not suppressed itself."""
    left = torch.arange(60.0)[:, None] * 3
    boxes = torch.cat([left, 0 * left, left + 10, 0 * left + 10], dim=1)
    scores = torch.stack([torch.linspace(1, 0, 60), torch.linspace(0, 1, 60)])
    classes = torch.zeros(60, dtype=torch.int64)
    assert_same(boxes, scores, classes, 0.5)
    keep, num_kept = multi_query_nms(boxes, scores, classes, 0.5)
    assert keep[0, :30].tolist() == list(range(0, 60, 2))
    assert num_kept.tolist() == [30, 30]


@pytest.mark.parametrize("scale", [1e6, 1e18, 1e25, float("inf")])
def test_huge_coordinates(scale):
    boxes, scores, classes = clustered(60, 4, 80)
    assert_same(boxes * scale, scores, classes, 0.5)


def test_inverted_boxes():
    boxes, scores, classes = clustered(60, 4)
    boxes[::3] = boxes[::3, [2, 1, 0, 3]]
    boxes[1::3] = boxes[1::3, [2, 3, 0, 1]]
    assert_same(boxes, scores, classes, 0.5)


def test_equal_boxes_and_equal_scores_keep_the_first():
    boxes = torch.tensor([[0.0, 0.0, 5.0, 5.0]]).repeat(6, 1)
    classes = torch.tensor([0, 1, 0, 1, 0, 1])
    assert_same(boxes, torch.ones(3, 6), classes, 0.5)
    assert multi_query_nms(boxes, torch.ones(3, 6), classes, 0.5, 2)[0].tolist() == [[0, 1]] * 3


def test_nan_scores_rank_first():
    boxes, scores, classes = clustered(50, 3)
    scores[:, ::7] = float("nan")
    assert_same(boxes, scores, classes, 0.5)
    assert multi_query_nms(boxes, scores, classes, 0.5)[0][:, 0].tolist() == [0, 0, 0]


def test_nan_coordinates():
    boxes, scores, classes = clustered(50, 3)
    boxes[4, 2] = float("nan")
    assert_same(boxes, scores, classes, 0.5)


def test_non_contiguous_input():
    boxes, scores, classes = clustered(80, 8)
    boxes, scores, classes = boxes.t().contiguous().t()[::2], scores.t()[::2].t(), classes[::2]
    assert not boxes.is_contiguous()
    assert_same(boxes, scores, classes, 0.5)
    assert_same(boxes.expand(8, -1, -1), scores, classes, 0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_converted_to_float32(dtype):
    boxes, scores, classes = clustered(80, 4)
    boxes, scores = boxes.to(dtype), scores.to(dtype)
    result = multi_query_nms(boxes, scores, classes, 0.5)
    converted = multi_query_nms(boxes.float(), scores.float(), classes, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(result, converted, strict=True))


@pytest.mark.parametrize("num_boxes", [200, 1050])
@pytest.mark.parametrize("own_boxes", [False, True])
def test_a_query_does_not_depend_on_the_others(num_boxes, own_boxes):
    boxes, scores, classes = clustered(num_boxes, 3, own_boxes=own_boxes)
    scores = (scores * 20).round()
    keep, num_kept = multi_query_nms(boxes, scores, classes, 0.5, 40)
    for query in range(3):
        alone = slice(query, query + 1)
        query_boxes = boxes[alone] if own_boxes else boxes
        keep_alone, num_alone = multi_query_nms(query_boxes, scores[alone], classes, 0.5, 40)
        assert torch.equal(keep_alone, keep[alone])
        assert torch.equal(num_alone, num_kept[alone])


def test_input_is_not_modified():
    problem = clustered(50, 3)
    before = [tensor.clone() for tensor in problem]
    multi_query_nms(*problem, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(problem, before, strict=True))


def test_scores_that_require_grad():
    boxes, scores, classes = clustered(20, 2)
    keep, _ = multi_query_nms(boxes, scores.requires_grad_(), classes, 0.5)
    assert not keep.requires_grad


@pytest.mark.parametrize(
    ("boxes", "scores", "classes", "message"),
    [
        ((3, 4), (3,), (3,), "expected scores"),
        ((3, 5), (2, 3), (3,), "expected boxes"),
        ((3, 3, 4), (2, 3), (3,), "expected boxes"),
        ((4, 4), (2, 3), (3,), "expected boxes"),
        ((3, 4), (2, 3), (2, 3), "expected classes"),
    ],
)
def test_shapes_that_do_not_match(boxes, scores, classes, message):
    with pytest.raises(ValueError, match=message):
        multi_query_nms(
            torch.rand(boxes), torch.rand(scores), torch.zeros(classes, dtype=torch.int64), 0.5
        )


@pytest.mark.parametrize("iou_threshold", [-0.1, 1.5, float("nan")])
def test_threshold_outside_the_unit_interval(iou_threshold):
    boxes, scores, classes = clustered(5, 2)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        multi_query_nms(boxes, scores, classes, iou_threshold)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_dtypes_that_do_not_match(dtype):
    boxes, scores, classes = clustered(5, 2)
    with pytest.raises(TypeError, match="floating-point dtype"):
        multi_query_nms(boxes, scores.to(dtype), classes, 0.5)
