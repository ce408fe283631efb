"""The box refinement's own copy of the detector's head: where it starts, and who teaches whom."""

import pytest
import torch
from closeness import assert_rounds_alike
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes
from small_models import build, image_input, run, targets
from tiny_relatedness import VISUAL, make_locations, make_text, make_trans, make_visual

from vlnms_d2.modeling.branch import refine_boxes


@pytest.fixture
def trans_model(config, head):
    return build(config(head, "Trans"))


def test_it_starts_from_the_detectors_head_and_a_checkpoint_of_its_own_wins(trans_model):
    heads = trans_model.roi_heads
    source = heads.get_submodule(heads.visual_encoder_source).state_dict()
    for own in (heads.vlnms.visual_encoder, heads.vlnms.refinement_encoder):
        assert own is not heads.get_submodule(heads.visual_encoder_source)
        assert all(torch.equal(value, source[key]) for key, value in own.state_dict().items())
    with torch.no_grad():
        for parameter in heads.vlnms.refinement_encoder.parameters():
            parameter.add_(1.0)
    saved = {key: value.clone() for key, value in trans_model.state_dict().items()}
    with torch.no_grad():
        for parameter in heads.vlnms.refinement_encoder.parameters():
            parameter.zero_()
    trans_model.load_state_dict(saved)
    for name, parameter in heads.vlnms.refinement_encoder.named_parameters():
        assert torch.equal(parameter, source[name] + 1), name


def taught(model, loss: str) -> set[str]:
    """The parts of the branch that a loss alone teaches."""
    model.zero_grad()
    model.train()
    given = image_input(0, query=["red cup", "dog"], query_targets=targets(2))
    model([given])[loss].backward()
    parameters = model.roi_heads.vlnms.named_parameters()
    names = [n for n, p in parameters if p.grad is not None and p.grad.any()]
    return {name.split(".")[1 if name.startswith("relatedness.") else 0] for name in names}


def test_relating_and_refining_teach_different_parts(trans_model):
    refining = taught(trans_model, "loss_refinement")
    relating = taught(trans_model, "loss_relatedness")
    assert refining == {"mlp_t", "refinement_encoder"}
    assert not refining & relating and {"visual_encoder", "layers", "fc_r"} <= relating


def test_relatedness_is_that_of_a_model_without_refinement(trans_model, config, head):
    cfg = config(head, "Trans")
    cfg.MODEL.VLNMS.REG_WEIGHT = 0.0
    without = build(cfg)
    weights = trans_model.state_dict()
    without.load_state_dict({key: weights[key] for key in without.state_dict()})
    assert without.roi_heads.vlnms.refinement_encoder is None
    given = image_input(0, query=["the red cup"])
    seen = []
    for model in (trans_model, without):
        model.roi_heads.vlnms.relatedness.register_forward_hook(
            lambda module, args, output: seen.append(output.logits)
        )
        run(model, given)
    assert_rounds_alike(*seen)


@pytest.mark.parametrize("head", ["VLNMSHead"])
def test_where_the_detectors_feature_is_shared_both_take_it(config, head):
    cfg = config(head, "Trans")
    cfg.MODEL.VLNMS.VISUAL_ENCODER = "shared"
    model = build(cfg)
    assert model.roi_heads.vlnms.refinement_encoder is None
    assert taught(model, "loss_refinement") == {"mlp_t"}


def test_each_takes_its_own_half_of_the_features():
    trans, text = make_trans(), make_text(2, 3)
    visual, geometry = make_visual(4), make_visual(4, seed=5)
    locations = make_locations(4)
    both = trans(torch.cat([visual, geometry], dim=1), locations, text)
    alone = trans(visual, locations, text)
    other = trans(torch.cat([geometry, geometry], dim=1), locations, text)
    assert visual.shape[1] == VISUAL
    assert_rounds_alike(both.logits, alone.logits)
    assert (both.deltas - alone.deltas).abs().max() > 0.01
    assert (both.logits - other.logits).abs().max() > 0.01


# --- a refinement, box after box ---------------------------------------------------------------


BOX2BOX = Box2BoxTransform((10.0, 10.0, 5.0, 5.0))
SIZE = (60, 80)


def refine(boxes: list, deltas: torch.Tensor) -> torch.Tensor:
    return refine_boxes(torch.tensor(boxes), deltas, SIZE, BOX2BOX)


def test_each_query_and_box_by_itself():
    boxes = [[10.0, 10, 40, 30], [0, 0, 80, 60], [50, 20, 79, 59]]
    deltas = torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(0))
    found = refine(boxes, deltas)
    assert found.shape == (4, 3, 4)
    for q in range(4):
        for n in range(3):
            own = Boxes(BOX2BOX.apply_deltas(deltas[q, n][None], torch.tensor(boxes[n])[None]))
            own.clip(SIZE)
            assert_rounds_alike(found[q, n], own.tensor[0])


def test_zeros_leave_the_box_to_the_bit_and_so_does_a_move_out_of_the_image():
    boxes = [[10.1, 10.3, 40.7, 30.9], [0.3, 0, 7.7, 9.1]]
    deltas = torch.zeros(2, 2, 4)
    deltas[1, :, 0] = 1e4
    assert torch.equal(refine(boxes, deltas), torch.tensor(boxes).expand(2, 2, 4))


def test_nothing():
    assert refine([[1.0, 2, 3, 4]], torch.zeros(0, 1, 4)).shape == (0, 1, 4)
    found = refine_boxes(torch.zeros(0, 4), torch.zeros(3, 0, 4), SIZE, BOX2BOX)
    assert found.shape == (3, 0, 4)
