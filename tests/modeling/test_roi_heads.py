"""Detectron2's heads with a VL-NMS branch: stock without a query, with one proposals for it."""

import pytest
import torch
from closeness import WHOLE_MODEL, assert_instances_alike, assert_rounds_alike
from conftest import HEADS
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.modeling import ROI_HEADS_REGISTRY, GeneralizedRCNN, build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from small_models import build, image_input, run, run_raw, same_instances, stock_config, targets
from torchvision.ops import batched_nms

from vlnms_d2 import add_vlnms_config, split_by_query
from vlnms_d2.modeling.candidates import select_candidates

FIELDS = {
    "pred_boxes",
    "scores",
    "cls_scores",
    "relatedness",
    "pred_classes",
    "query_index",
    "pred_masks",
}


MODULES = ["FC", "Trans"]


def stock_twin(model, head):
    """The stock detector with the weights of ours."""
    stock = build(stock_config(HEADS[head]))
    stock.load_state_dict({k: v for k, v in model.state_dict().items() if ".vlnms." not in k})
    return stock


@pytest.mark.parametrize("relatedness", MODULES)
def test_without_a_query_it_is_the_stock_detector_to_the_bit(config, head, relatedness):
    ours = build(config(head, relatedness))
    stock = stock_twin(ours, head)
    assert isinstance(ours, GeneralizedRCNN) and type(ours) is type(stock)

    inputs = [image_input(0), image_input(1, height=80)]
    for mine, theirs in zip(run(ours, *inputs), run(stock, *inputs), strict=True):
        assert len(theirs) > 3
        assert same_instances(mine, theirs)


def test_an_image_without_a_query_is_stock_also_beside_one_with(config, head):
    model = build(config(head))
    alone, _other = run(model, image_input(0), image_input(1))
    mixed, asked = run(model, image_input(0), image_input(1, query="red cup"))
    assert_instances_alike(mixed, alone)
    assert set(asked.get_fields()) == FIELDS


def test_output_fields_and_order(model):
    queries = ["red cup", "the left dog", "cup"]
    (instances,) = run(model, image_input(0, query=queries))
    assert set(instances.get_fields()) == FIELDS
    torch.testing.assert_close(instances.scores, instances.cls_scores * instances.relatedness)
    assert instances.pred_masks.shape == (len(instances), 96, 128)
    assert instances.query_index.tolist() == sorted(instances.query_index.tolist())
    for own in split_by_query(instances, 3):
        assert 0 < len(own) <= 15
        assert own.scores.tolist() == sorted(own.scores.tolist(), reverse=True)


@pytest.mark.parametrize("relatedness", MODULES)
def test_queries_of_one_image_do_not_touch_each_other(config, head, relatedness):
    model = build(config(head, relatedness))
    queries = ["red cup", "the left dog", "blue cup of the dog"]
    (together,) = run(model, image_input(0, query=queries))
    for own, query in zip(split_by_query(together, 3), queries, strict=True):
        (alone,) = run(model, image_input(0, query=query))
        own.query_index = torch.zeros_like(own.query_index)
        assert_instances_alike(own, alone)


def test_batches_with_different_images_and_numbers_of_queries(model):
    a, b, c, d = run(
        model,
        image_input(0, query=["red", "blue", "dog"]),
        image_input(1, height=64),
        image_input(2, width=96, query="cup"),
        image_input(3, query=[]),
    )
    assert a.query_index.unique().tolist() == [0, 1, 2]
    assert not b.has("query_index")
    assert c.query_index.unique().tolist() == [0]
    assert len(d) == 0 and set(d.get_fields()) == FIELDS
    assert split_by_query(d, 0) == []


def test_resizing_to_the_output_size_keeps_every_field_and_the_order(model):
    (instances,) = run(model, {**image_input(0, query=["red", "dog"]), "height": 48, "width": 200})
    assert instances.image_size == (48, 200)
    assert instances.pred_masks.shape[1:] == (48, 200)
    assert instances.query_index.tolist() == sorted(instances.query_index.tolist())
    torch.testing.assert_close(instances.scores, instances.cls_scores * instances.relatedness)


@pytest.mark.parametrize("visual_encoder", ["finetune", "shared"])
@pytest.mark.parametrize(
    ("relatedness", "key", "variant"),
    [
        ("FC", "ATTENTION", "linear"),
        ("FC", "ATTENTION", "additive"),
        ("Trans", "TRANS.FUSION", "joint"),
        ("Trans", "TRANS.FUSION", "co_attention"),
    ],
)
def test_every_variant_runs_and_trains(config, head, visual_encoder, relatedness, key, variant):
    cfg = config(head, relatedness)
    cfg.MODEL.VLNMS.VISUAL_ENCODER = visual_encoder
    cfg.merge_from_list([f"MODEL.VLNMS.{key}", variant])
    cfg.MODEL.VLNMS.OUTPUT_ATTENTION = True
    model = build(cfg)
    (instances,) = run(model, image_input(0, query=["a red cup", "dog"]))
    sums = instances.word_attention.sum(dim=1)
    torch.testing.assert_close(sums, torch.ones_like(sums))

    model.train()
    losses = model([image_input(0, query=["red cup", "dog"], query_targets=targets(2))])
    refinement = {"loss_refinement"} if relatedness == "Trans" else set()
    assert set(losses) == {"loss_relatedness"} | refinement
    sum(losses.values()).backward()
    assert (model.roi_heads.vlnms.visual_encoder is None) == (visual_encoder == "shared")
    for name, parameter in model.named_parameters():
        learns = ".vlnms." in name
        assert parameter.requires_grad == learns, name
        assert (parameter.grad is not None) == learns, name


# --- box refinement ----------------------------------------------------------------------------


def spied(model):
    """The candidates of an image and what the relatedness module says of them, as they pass."""
    seen = {"outputs": []}
    select = model.roi_heads._select

    def select_and_keep(*args):
        [seen["candidates"]] = select(*args)
        return [seen["candidates"]]

    model.roi_heads._select = select_and_keep
    model.roi_heads.vlnms.relatedness.register_forward_hook(
        lambda module, args, output: seen["outputs"].append(output)
    )
    return seen


def refined(boxes, deltas, weights) -> torch.Tensor:
    """[N, 4] boxes of one query, box after box, clipped to the image of 96 x 128."""
    box2box = Box2BoxTransform(weights)
    moved = []
    for box, delta in zip(boxes, deltas, strict=True):
        own = Boxes(box2box.apply_deltas(delta[None], box[None]))
        own.clip((96, 128))
        moved.append(own.tensor)
    return torch.cat(moved)


def bbox_reg_weights(cfg) -> tuple:
    if cfg.MODEL.ROI_HEADS.NAME == "VLNMSCascadeHead":
        return cfg.MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS[-1]
    return cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS


def test_boxes_are_refined_per_query_before_the_nms(config, head):
    cfg = config(head, "Trans")
    model = build(cfg)
    seen = spied(model)
    queries = ["red cup", "the left dog", "cup"]
    (instances,) = run_raw(model, image_input(0, query=queries))
    found, [output] = seen["candidates"], seen["outputs"]
    unlike_candidates = 0
    for q, own in enumerate(split_by_query(instances, len(queries))):
        boxes = refined(found.boxes, output.deltas[q], bbox_reg_weights(cfg))
        scores = output.logits[q].sigmoid() * found.scores
        thresh = cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST
        keep = batched_nms(boxes, scores, found.classes, thresh)[:15]
        on_candidates = batched_nms(found.boxes, scores, found.classes, thresh)[:15]
        unlike_candidates += keep.tolist() != on_candidates.tolist()
        # From the same deltas, box after box: the logarithms, exponentials and sums of a box.
        assert_rounds_alike(own.pred_boxes.tensor, boxes[keep])
        assert_rounds_alike(own.scores, scores[keep])
        assert torch.equal(own.cls_scores, found.scores[keep])
        assert torch.equal(own.pred_classes, found.classes[keep])
        assert (boxes - found.boxes).abs().mean() > 2
    assert unlike_candidates > 0  # else the NMS could have run on either


def test_masks_are_those_of_the_refined_boxes(config, head):
    model = build(config(head, "Trans"))
    stock = stock_twin(model, head)
    asked, _plain = run_raw(model, image_input(0, query=["red cup", "dog"]), image_input(1))
    given = Instances((96, 128), pred_boxes=asked.pred_boxes, pred_classes=asked.pred_classes)
    with torch.no_grad():
        (expected,) = stock.inference([image_input(0)], [given], do_postprocess=False)
    assert len(asked) > 10
    own = asked.pred_masks.tensor[asked.pred_masks.index]
    assert_rounds_alike(own, expected.pred_masks[:, 0], WHOLE_MODEL)  # images in other batches


def test_boxes_of_no_query_and_of_no_candidate(config, head):
    model = build(config(head, "Trans"))
    (nothing,) = run(model, image_input(0, query=[]))
    assert len(nothing) == 0 and set(nothing.get_fields()) == FIELDS
    model.roi_heads._select = lambda predictions, sizes, indices: [
        select_candidates(
            predictions.boxes[i][:0],
            predictions.scores[i][:0],
            sizes[i],
            score_thresh=0,
            max_candidates=9,
        )
        for i in indices
    ]
    (nothing,) = run(model, image_input(0, query=["red", "dog"]))
    assert len(nothing) == 0 and set(nothing.get_fields()) == FIELDS


def test_a_refinement_out_of_the_image_leaves_the_box_and_every_query_has_a_proposal(config, head):
    model = build(config(head, "Trans"))
    with torch.no_grad():
        model.roi_heads.vlnms.relatedness.mlp_t.out.bias[0] = 1e4
    seen = spied(model)
    (instances,) = run(model, image_input(0, query=["red cup", "dog"]))
    candidates = {tuple(box) for box in seen["candidates"].boxes.tolist()}
    for own in split_by_query(instances, 2):
        assert len(own) > 0
        assert {tuple(box) for box in own.pred_boxes.tensor.tolist()} <= candidates


def test_without_a_weight_there_is_no_refinement(config, head):
    cfg = config(head, "Trans")
    cfg.MODEL.VLNMS.REG_WEIGHT = 0.0
    model = build(cfg)
    seen = spied(model)
    (instances,) = run_raw(model, image_input(0, query=["red cup", "dog"]))
    candidates = {tuple(box) for box in seen["candidates"].boxes.tolist()}
    assert {tuple(box) for box in instances.pred_boxes.tensor.tolist()} <= candidates
    losses = model.train()([image_input(0, query="red cup", query_targets=targets(1))])
    assert set(losses) == {"loss_relatedness"}


# --- precision and memory ----------------------------------------------------------------------


@pytest.mark.parametrize("relatedness", MODULES)
def test_half_precision_is_for_the_branch_alone(config, head, relatedness):
    cfg = config(head, relatedness)
    cfg.MODEL.VLNMS.MAX_CANDIDATES = cfg.MODEL.VLNMS.TRAIN_CANDIDATES = 20
    single = build(cfg)
    cfg.MODEL.VLNMS.PRECISION = "bfloat16"
    half = build(cfg)
    half.load_state_dict(single.state_dict())
    seen = spied(half)
    plain, asked = image_input(1), image_input(0, query=["red cup", "dog"])
    assert same_instances(run(half, plain)[0], run(single, plain)[0])
    expected = spied(single)
    run(single, asked)
    (instances,) = run(half, asked)
    for field in ("scores", "relatedness", "cls_scores"):
        assert instances.get(field).dtype == torch.float32
    assert torch.equal(seen["candidates"].boxes, expected["candidates"].boxes)
    assert torch.equal(seen["candidates"].scores, expected["candidates"].scores)
    r, exact = (each["outputs"][-1].logits.sigmoid() for each in (seen, expected))
    assert 0 < (r - exact).abs().max() < 0.05

    losses = half.train()([image_input(0, query=["red cup", "dog"], query_targets=targets(2))])
    sum(losses.values()).backward()
    for name, parameter in half.roi_heads.vlnms.relatedness.named_parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize(
    ("relatedness", "attention"), [("FC", "linear"), ("FC", "additive"), ("Trans", "linear")]
)
def test_little_memory_gives_the_same_result(config, relatedness, attention):
    cfg = config(relatedness=relatedness)
    cfg.MODEL.VLNMS.ATTENTION = attention
    cfg.MODEL.VLNMS.OUTPUT_ATTENTION = True
    queries = ["red cup", "the left dog of the cup", "", "cup", "zyx"]
    results, calls = [], []
    for megabytes in (256, 0):
        cfg.MODEL.VLNMS.CHUNK_MEMORY_MB = megabytes
        model = build(cfg)
        seen = spied(model)
        results += run_raw(model, image_input(0, query=queries))
        calls.append(len(seen["outputs"]))
    assert calls == [1, 5]
    large, small = results
    assert_instances_alike(small, large)


def test_masks_are_computed_once_per_distinct_box(config, monkeypatch):
    model = build(config())
    seen = []
    forward = type(model.roi_heads)._forward_mask

    def count(self, features, instances):
        seen.append(sum(len(i) for i in instances))
        return forward(self, features, instances)

    monkeypatch.setattr(type(model.roi_heads), "_forward_mask", count)
    (instances,) = run(model, image_input(0, query=["red cup"] * 20))
    assert len(instances) == 20 * seen[0]


def test_the_detector_runs_once_whatever_the_number_of_queries(config):
    model = build(config())
    calls = []
    for part in (model.backbone, model.proposal_generator, model.roi_heads.box_head):
        part.register_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    own = model.roi_heads.vlnms.visual_encoder
    own.register_forward_hook(lambda *_: calls.append("visual_encoder"))
    run(model, image_input(0, query=["red", "dog", "cup", "blue cup"]))
    assert sorted(calls) == ["FPN", "FastRCNNConvFCHead", "RPN", "visual_encoder"]


# --- configs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "registered"),
    [
        ("TEXT_ENCODER", "BiGRU"),
        ("RELATEDNESS", "FC"),
        ("RELATEDNESS", "Trans"),
        ("POSTPROCESSOR", "VLNMSPostprocessor"),
        ("ATTENTION", "additive"),
        ("VISUAL_ENCODER", "shared"),
        ("FUSION", "weighted_sum"),
        ("LOSS", "bce"),
        ("PRECISION", "bfloat16"),
    ],
)
def test_an_unknown_name_in_the_config_lists_the_known_ones(config, key, registered):
    cfg = config()
    cfg.MODEL.VLNMS[key] = "Sphinx"
    with pytest.raises(ValueError, match="Sphinx") as error:
        build(cfg)
    assert registered in str(error.value)


def test_the_stock_zoo_config_needs_one_line_only(head):
    cfg = get_cfg()
    add_vlnms_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file(HEADS[head]))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ROI_HEADS.NAME = head
    model = build_model(cfg)
    assert type(model) is GeneralizedRCNN
    assert isinstance(model.roi_heads, ROI_HEADS_REGISTRY.get(head))
