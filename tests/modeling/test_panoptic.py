"""A VL-NMS head in Detectron2's PanopticFPN."""

import pytest
import torch
from detectron2.structures import Instances
from small_models import build, image_input, run, stock_config, targets

ZOO_CONFIG = "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml"


@pytest.fixture
def panoptic_config(config):
    cfg = stock_config(ZOO_CONFIG)
    cfg.MODEL.ROI_HEADS.NAME = "VLNMSHead"
    cfg.MODEL.VLNMS = config().MODEL.VLNMS
    cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM, cfg.MODEL.SEM_SEG_HEAD.NORM = 8, ""
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 6
    cfg.MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH = 0.0
    return cfg


def segments(model, *queries: str | list[str]) -> list[tuple[torch.Tensor, list[dict]]]:
    with torch.no_grad():
        outputs = model([image_input(i, query=query) for i, query in enumerate(queries)])
    return [output["panoptic_seg"] for output in outputs]


def test_everything_but_the_branch_is_frozen_whenever_it_joined(panoptic_config):
    model = build(panoptic_config)
    model.late = torch.nn.Linear(2, 2)
    model.add_module("later", torch.nn.Sequential(torch.nn.Linear(2, 2)))
    model.nothing = None
    model.add_module("none", None)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable and all(name.startswith("roi_heads.vlnms.") for name in trainable)


def test_what_replaces_the_head_is_not_frozen(config):
    model = build(config())
    model.roi_heads = torch.nn.Linear(2, 2)
    model.late = torch.nn.Linear(2, 2)
    assert model.roi_heads.weight.requires_grad and model.late.weight.requires_grad


def test_nothing_is_frozen_where_the_detector_learns(panoptic_config):
    panoptic_config.MODEL.VLNMS.FREEZE_DETECTOR = False
    model = build(panoptic_config)
    assert all(p.requires_grad for p in model.sem_seg_head.parameters())


@pytest.mark.parametrize("masks", ["auto", "pasted", "shared"])
def test_segments_are_those_of_the_proposals(panoptic_config, masks):
    """With one query, and with several, whose proposals compete for each pixel by their scores."""
    panoptic_config.MODEL.VLNMS.MASKS = masks
    model = build(panoptic_config)
    inputs = [image_input(0, query="red cup"), image_input(1, query=["dog", "the red cup"])]
    proposals = run(model, *inputs)
    answers = segments(model, *[each["query"] for each in inputs])
    for instances, (panoptic, infos) in zip(proposals, answers, strict=True):
        things = [info for info in infos if info["isthing"]]
        assert panoptic.shape == (96, 128) and things
        for info in things:
            pixels = panoptic == info["id"]
            assert not (pixels & ~instances.pred_masks[info["instance_id"]]).any()
            assert info["score"] == float(instances.scores[info["instance_id"]])
        scores = [info["score"] for info in things]
        assert scores == sorted(scores, reverse=True)


def test_the_branch_trains_without_panoptic_ground_truth(panoptic_config):
    model = build(panoptic_config).train()
    inputs = [image_input(0, query=["red cup", "dog"], query_targets=targets(2))]
    losses = model(inputs)
    assert set(losses) == {"loss_relatedness"} and inputs[0].keys().isdisjoint({"sem_seg"})
    losses["loss_relatedness"].backward()
    with_it = [
        {**inputs[0], "sem_seg": torch.zeros(96, 128).long(), "instances": Instances((1, 1))}
    ]
    assert set(model(with_it)) == {"loss_relatedness"}


@pytest.mark.parametrize("key", ["sem_seg", "instances"])
def test_a_detector_that_learns_needs_panoptic_ground_truth(panoptic_config, key):
    panoptic_config.MODEL.VLNMS.FREEZE_DETECTOR = False
    model = build(panoptic_config).train()
    given = {"sem_seg": torch.zeros(96, 128).long(), "instances": targets(1)[0]}
    del given[key]
    with pytest.raises(ValueError, match=rf'batched_inputs lack "{key}".*FREEZE_DETECTOR'):
        model([image_input(0, query="dog", query_targets=targets(1), **given)])
