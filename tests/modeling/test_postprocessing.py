"""The postprocessor equals fusion, torchvision's NMS and a cut, query by query."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.structures import Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import batched_nms

from vlnms_d2 import VLNMSPostprocessor, add_vlnms_config, split_by_query
from vlnms_d2.modeling.postprocessing import build_postprocessor

FUSED = {
    "product": lambda r, c, w: r * c,
    "weighted_product": lambda r, c, w: r**w * c ** (1.0 - w),
    "weighted_sum": lambda r, c, w: w * r + (1.0 - w) * c,
}


def reference(
    boxes, cls_scores, relatedness, classes, *, nms_thresh, topk, score_thresh, fusion, weight
):
    """Per query the kept candidates, in descending order of the fused score."""
    rows = []
    for q, r in enumerate(relatedness):
        s = FUSED[fusion](r, cls_scores, weight)
        own = boxes if boxes.dim() == 2 else boxes[q]
        kept = batched_nms(own, s, classes, nms_thresh).tolist()
        kept = kept if topk < 0 else kept[:topk]
        above = [i for i in kept if float(s[i]) > score_thresh]
        rows.append(above or kept[:1])
    return rows


def by_query(selection, num_queries: int) -> list[list[int]]:
    query_index, candidate_index = selection.flatten()
    assert query_index.tolist() == sorted(query_index.tolist())
    return [candidate_index[query_index == q].tolist() for q in range(num_queries)]


@st.composite
def problems(draw):
    num_boxes, num_queries = draw(st.integers(0, 20)), draw(st.integers(0, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 100_000)))
    shape = (num_queries, num_boxes, 2) if draw(st.booleans()) else (num_boxes, 2)
    corner = torch.randint(6, shape, generator=generator).float()
    size = torch.randint(1, 6, shape, generator=generator)
    boxes = torch.cat([corner, corner + size], dim=-1) * 7.3
    levels = draw(st.sampled_from([3, 1000]))  # few levels: many ties

    def scores(*shape):
        return torch.randint(levels + 1, shape, generator=generator) / levels

    classes = torch.randint(draw(st.integers(1, 4)), (num_boxes,), generator=generator)
    return boxes, scores(num_boxes), scores(num_queries, num_boxes), classes


@settings(max_examples=200, deadline=None)
@given(
    problem=problems(),
    nms_thresh=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    topk=st.sampled_from([-1, 1, 3, 100]),
    score_thresh=st.sampled_from([-1.0, 0.0, 0.25, 0.9, 2.0]),
    fusion=st.sampled_from(sorted(FUSED)),
    weight=st.sampled_from([0.0, 0.3, 1.0]),
    agnostic=st.booleans(),
)
def test_equals_fusion_nms_and_cut_query_by_query(
    problem, nms_thresh, topk, score_thresh, fusion, weight, agnostic
):
    options = {"nms_thresh": nms_thresh, "topk": topk, "score_thresh": score_thresh}
    options["fusion"] = fusion
    post = VLNMSPostprocessor(**options, fusion_weight=weight, class_agnostic=agnostic)
    selection = post(*problem)
    boxes, confidence, relatedness, classes = problem
    groups = torch.zeros_like(classes) if agnostic else classes
    expected = reference(boxes, confidence, relatedness, groups, **options, weight=weight)
    assert by_query(selection, len(expected)) == expected
    assert selection.num_kept.tolist() == [len(row) for row in expected]
    for row, kept in zip(selection.index.tolist(), expected, strict=True):
        assert row == kept + [-1] * (len(row) - len(kept))


BOXES = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30], [40, 40, 50, 50]])
CLASSES = torch.tensor([0, 0, 0, 1])
CONFIDENCE = torch.tensor([0.9, 0.8, 0.5, 0.4])


def test_relatedness_decides_which_of_two_overlapping_boxes_stays():
    relatedness = torch.tensor([[1.0, 1, 1, 1], [0.1, 1, 1, 1]])
    selection = VLNMSPostprocessor()(BOXES, CONFIDENCE, relatedness, CLASSES)
    assert by_query(selection, 2) == [[0, 2, 3], [1, 2, 3]]
    torch.testing.assert_close(selection.scores, relatedness * CONFIDENCE)


def test_boxes_of_different_classes_suppress_each_other_only_where_that_is_asked():
    post = VLNMSPostprocessor()
    problem = (BOXES, CONFIDENCE, torch.ones(1, 4), torch.tensor([0, 1, 0, 1]))
    assert by_query(post(*problem), 1) == [[0, 1, 2, 3]]
    assert by_query(VLNMSPostprocessor(class_agnostic=True)(*problem), 1) == [[0, 2, 3]]


def test_each_query_may_have_its_own_boxes():
    apart = BOXES.clone()
    apart[1] += 100
    boxes = torch.stack([BOXES, apart])
    selection = VLNMSPostprocessor()(boxes, CONFIDENCE, torch.ones(2, 4), CLASSES)
    assert by_query(selection, 2) == [[0, 2, 3], [0, 1, 2, 3]]


def test_the_threshold_keeps_what_is_above_it_and_the_best_in_any_case():
    relatedness = torch.tensor([[1.0, 1, 1, 1], [0.1, 0.1, 0.1, 0.2]])
    post = VLNMSPostprocessor(score_thresh=0.4)
    selection = post(BOXES, CONFIDENCE, relatedness, CLASSES)
    assert by_query(selection, 2) == [[0, 2], [0]]  # 0.4 is not above 0.4


def test_topk_cuts_after_the_nms():
    post = VLNMSPostprocessor(topk=2)
    selection = post(BOXES, CONFIDENCE, torch.ones(1, 4), CLASSES)
    assert by_query(selection, 1) == [[0, 2]]
    assert selection.index.shape == (1, 2)


def test_the_weighted_sum():
    post = VLNMSPostprocessor(fusion="weighted_sum", fusion_weight=0.25)
    relatedness = torch.tensor([[0.0, 0, 0, 1]])
    scores = post(BOXES, CONFIDENCE, relatedness, CLASSES).scores
    torch.testing.assert_close(scores, torch.tensor([[0.675, 0.6, 0.375, 0.55]]))


def test_the_weighted_product_ranks_like_a_power_of_the_confidence():
    relatedness = torch.tensor([[0.6, 0.7, 0.1, 1.0], [0.0, 0.1, 1, 1]])
    post = VLNMSPostprocessor(fusion="weighted_product", fusion_weight=2 / 3)
    scores = post(BOXES, CONFIDENCE, relatedness, CLASSES).scores
    torch.testing.assert_close(scores, (relatedness * CONFIDENCE**0.5) ** (2 / 3))


@pytest.mark.parametrize(("num_queries", "num_boxes"), [(0, 0), (0, 4), (3, 0)])
def test_without_queries_or_candidates_nothing_is_kept(num_queries, num_boxes):
    selection = VLNMSPostprocessor()(
        BOXES[:num_boxes],
        CONFIDENCE[:num_boxes],
        torch.ones(num_queries, num_boxes),
        CLASSES[:num_boxes],
    )
    assert selection.num_kept.tolist() == [0] * num_queries
    assert selection.scores.shape == (num_queries, num_boxes)
    query_index, candidate_index = selection.flatten()
    assert query_index.tolist() == candidate_index.tolist() == []
    assert candidate_index.dtype == torch.int64


@pytest.mark.parametrize(
    ("options", "message"),
    [({"fusion": "maximum"}, "unknown fusion mode 'maximum'"), ({"fusion_weight": 1.5}, "1.5")],
)
def test_a_bad_fusion_is_an_error_before_the_first_image(options, message):
    with pytest.raises(ValueError, match=message):
        VLNMSPostprocessor(**options)


def test_from_config_reads_detectron2s_own_keys():
    cfg = get_cfg()
    add_vlnms_config(cfg)
    cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST = 0.31
    cfg.TEST.DETECTIONS_PER_IMAGE = 17
    cfg.MODEL.VLNMS.FINAL_SCORE_THRESH = 0.07
    cfg.MODEL.VLNMS.FUSION, cfg.MODEL.VLNMS.FUSION_WEIGHT = "weighted_sum", 0.2
    cfg.MODEL.VLNMS.CLASS_AGNOSTIC_NMS = True
    for post in (VLNMSPostprocessor(cfg), build_postprocessor(cfg)):
        assert vars(post) == {
            "nms_thresh": 0.31,
            "topk": 17,
            "score_thresh": 0.07,
            "fusion": "weighted_sum",
            "fusion_weight": 0.2,
            "class_agnostic": True,
        }


# --- split_by_query ----------------------------------------------------------------------------


def instances_of(*query_index: int) -> Instances:
    instances = Instances((50, 60))
    instances.query_index = torch.tensor(query_index, dtype=torch.int64)
    instances.number = torch.arange(len(query_index))
    instances.pred_boxes = Boxes(torch.arange(len(query_index))[:, None].repeat(1, 4).float())
    return instances


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 4), max_size=10), st.integers(0, 3), st.booleans())
def test_split_gives_each_query_its_instances_in_their_order(query_index, more, in_order):
    query_index = sorted(query_index) if in_order else query_index
    num_queries = max(query_index, default=-1) + 1 + more
    parts = split_by_query(instances_of(*query_index), num_queries)
    assert len(parts) == num_queries
    for q, part in enumerate(parts):
        own = [i for i, index in enumerate(query_index) if index == q]
        assert part.number.tolist() == own
        assert part.pred_boxes.tensor[:, 0].tolist() == own
        assert part.query_index.tolist() == [q] * len(own)
        assert part.image_size == (50, 60)


def test_split_refuses_instances_of_a_forward_without_a_query():
    instances = Instances((5, 5))
    instances.scores = torch.ones(2)
    with pytest.raises(ValueError, match="no query_index"):
        split_by_query(instances, 1)


@pytest.mark.parametrize(("query_index", "num_queries"), [((0, 3), 3), ((0,), 0), ((-1, 0), 2)])
def test_split_refuses_an_index_out_of_range(query_index, num_queries):
    with pytest.raises(ValueError, match=rf"query_index .* {num_queries} queries"):
        split_by_query(instances_of(*query_index), num_queries)
