"""The detector-alone baseline of the recall evaluation, from one pass of the detector per image."""

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from small_models import build, image_input, run, same_instances

from vlnms_d2 import split_by_query
from vlnms_d2.engine.trainer import VLNMSTrainer
from vlnms_d2.evaluation.recall import predict_with_detector

QUERIES = ["the red cup", "dog", "left of the blue dog"]
RELATEDNESS = pytest.mark.parametrize("relatedness", ["FC", "Trans"])


@pytest.fixture
def without_masks(config):
    """Like `config`; only boxes are evaluated."""

    def make(*args):
        cfg = config(*args)
        cfg.MODEL.MASK_ON = False
        return cfg

    return make


def assert_baseline_is_the_stock_detector(model, **fields):
    asked = image_input(0, query=QUERIES, **fields)
    [output] = predict_with_detector(model, [asked])
    [alone] = run(model, image_input(0, **fields))
    assert same_instances(output["detector"], alone)
    assert same_instances(output["instances"], run(model, asked)[0])
    return alone


@RELATEDNESS
def test_an_empty_query_is_the_detector_to_the_bit(without_masks, head, relatedness):
    model = build(without_masks(head, relatedness))
    alone, empty = run(model, image_input(0))[0], run(model, image_input(0, query=""))[0]
    assert len(alone) > 1
    assert torch.equal(empty.pred_boxes.tensor, alone.pred_boxes.tensor)
    assert torch.equal(empty.scores, alone.scores)
    assert torch.equal(empty.pred_classes, alone.pred_classes)


@RELATEDNESS
def test_the_baseline_is_the_detector_to_the_bit(without_masks, head, relatedness):
    model = build(without_masks(head, relatedness))
    assert len(assert_baseline_is_the_stock_detector(model)) > 1
    # The output size differs from the network's input size.
    resized = assert_baseline_is_the_stock_detector(model, height=192, width=200)
    assert resized.image_size == (192, 200)


@pytest.mark.parametrize(
    "settings",
    [
        # No candidate above delta: a query still has a proposal, the stock detector has none.
        {"MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.9999},
        {"MODEL.VLNMS.MAX_CANDIDATES": 3},
        {"MODEL.VLNMS.FINAL_SCORE_THRESH": 0.5},
        {"MODEL.VLNMS.FUSION": "weighted_sum"},
        {"MODEL.VLNMS.CLASS_AGNOSTIC_NMS": True, "MODEL.ROI_HEADS.NMS_THRESH_TEST": 0.1},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_no_setting_of_vlnms_changes_the_baseline(without_masks, head, settings):
    cfg = without_masks(head, "FC")
    cfg.merge_from_list([x for pair in settings.items() for x in pair])
    model = build(cfg)
    alone = assert_baseline_is_the_stock_detector(model)
    [empty] = run(model, image_input(0, query=""))
    assert len(empty) > 0
    # Or nothing was tested: here an empty query differs from the detector.
    assert len(empty) != len(alone) or not torch.equal(empty.scores, alone.scores)


def test_masks_are_not_computed(config):
    model = build(config())
    assert model.roi_heads.mask_on
    [output] = predict_with_detector(model, [image_input(0, query=QUERIES)])
    assert not any(instances.has("pred_masks") for instances in output.values())
    assert len(split_by_query(output["instances"], len(QUERIES))) == len(QUERIES)


def test_a_cached_detector_gives_the_same(without_masks, tmp_path):
    cfg = without_masks()
    plain = build(cfg)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.VLNMS.CACHE_DIR = "CachedRCNN", str(tmp_path)
    cached = build_model(cfg).eval()
    cached.load_state_dict(plain.state_dict())
    expected, *both = (
        predict_with_detector(model, [image_input(0, query=QUERIES)])[0]
        for model in (plain, cached, cached)
    )
    assert len(list(tmp_path.glob("*/*.pt"))) == 1
    for output in both:
        for name in ("instances", "detector"):
            assert same_instances(output[name], expected[name])


def test_wrong_models_and_inputs(config):
    cfg = config()
    with pytest.raises(TypeError, match=r'"query" of 7\.jpg must be a string or a list'):
        predict_with_detector(build(cfg), [image_input(0, file_name="7.jpg")])
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    with pytest.raises(ValueError, match=r"StandardROIHeads, expected .*VLNMSHead"):
        predict_with_detector(build_model(cfg), [image_input(0, query="dog")])


def test_evaluation_runs_the_detector_once_per_image(config, tiny_refshapes, tmp_path):
    cfg, name = config(), f"{tiny_refshapes}_val"
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 60, 120
    cfg.DATASETS.TEST, cfg.OUTPUT_DIR = (name,), str(tmp_path)
    model = build(cfg).train()
    batch_sizes = []
    model.backbone.register_forward_hook(lambda _, args, __: batch_sizes.append(len(args[0])))
    VLNMSTrainer.test(cfg, model)
    assert batch_sizes == [1] * len(DatasetCatalog.get(name))
    assert model.training
