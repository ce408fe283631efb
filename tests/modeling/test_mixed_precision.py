"""A model inside `torch.autocast`, as `SOLVER.AMP.ENABLED` runs it."""

import pytest
import torch
from detectron2.utils.events import EventStorage
from pretend_cuda import DEVICES
from small_models import build, image_input, run, targets
from tiny_bert import save_model

from vlnms_d2.modeling.candidates import select_candidates
from vlnms_d2.modeling.relatedness import FC

# What Detectron2 uses on a GPU; float16 is slow on most CPUs.
HALF = {"cpu": torch.bfloat16, "cuda": torch.float16}


def autocast(enabled: bool = True, device: str = "cpu") -> torch.autocast:
    return torch.autocast(device, dtype=HALF[device], enabled=enabled)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("head", "relatedness", "text_encoder", "loss"),
    [
        ("VLNMSHead", "FC", "BiGRU", "ranking"),
        ("VLNMSHead", "FC", "BERT", "bce"),
        ("VLNMSHead", "Trans", "BiGRU", "ranking"),
        ("VLNMSHead", "Trans", "BERT", "bce"),
        ("VLNMSRes5Head", "Trans", "BiGRU", "bce"),
        ("VLNMSCascadeHead", "FC", "BiGRU", "bce"),
    ],
)
def test_it_follows_the_surrounding_autocast(
    config, tmp_path, head, relatedness, text_encoder, loss, device
):
    cfg = config(head, relatedness)
    cfg.MODEL.VLNMS.TEXT_ENCODER, cfg.MODEL.VLNMS.LOSS = text_encoder, loss
    cfg.MODEL.VLNMS.OUTPUT_ATTENTION = True
    cfg.MODEL.VLNMS.MAX_WORDS = 10
    if head == "VLNMSRes5Head":  # a convolution per box, which CPUs do slowly in bfloat16
        cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 10
    if text_encoder == "BERT":
        cfg.MODEL.VLNMS.BERT.NAME = save_model(tmp_path / "bert")
        cfg.MODEL.VLNMS.BERT.EMBEDDINGS_ONLY = False
    model = build(cfg).to(device)
    check_inference(model, device)
    check_training_step(model.train(), device)


def check_inference(model: torch.nn.Module, device: str) -> None:
    dtypes = []
    relatedness = model.roi_heads.vlnms.relatedness
    layer = relatedness.mlp_b[0] if isinstance(relatedness, FC) else relatedness.fc_r
    hook = layer.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    inputs = [image_input(0, query=["red cup", "dog", ""]), image_input(1)]
    exact, _ = run(model, *inputs)
    with autocast(device=device):
        half, stock = run(model, *inputs)
    hook.remove()
    assert dtypes == [torch.float32, HALF[device]]
    assert len(half) and not stock.has("query_index")
    for name in ("scores", "cls_scores", "relatedness", "word_attention", "pred_boxes"):
        value = half.get(name)
        assert getattr(value, "tensor", value).dtype == torch.float32, name
    assert abs(half.relatedness.mean() - exact.relatedness.mean()) < 0.05
    assert torch.equal(half.scores, half.cls_scores * half.relatedness)


def check_training_step(model: torch.nn.Module, device: str) -> None:
    inputs = [image_input(0, query=["red cup", "dog"], query_targets=targets(2))]
    gradients = []
    for enabled in (False, True):
        with autocast(enabled, device):
            losses = model(inputs)
        assert {value.dtype for value in losses.values()} == {torch.float32}
        model.zero_grad()
        sum(losses.values()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    exact, half = gradients
    assert exact.keys() == half.keys()  # the same parameters learn
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in half.values())


@pytest.mark.parametrize("variant", ["shared", "additive", "relu", "co_attention"])
def test_the_variants_follow_it_too(config, variant):
    cfg = config("VLNMSHead", "Trans" if variant == "co_attention" else "FC")
    vlnms = cfg.MODEL.VLNMS
    vlnms.VISUAL_ENCODER = "shared" if variant == "shared" else "finetune"
    vlnms.ATTENTION = "additive" if variant == "additive" else "linear"
    vlnms.FC.RELU, vlnms.FC.DROPOUT = variant == "relu", 0.5
    vlnms.TRANS.FUSION = "co_attention" if variant == "co_attention" else "joint"
    model = build(cfg)
    inputs = image_input(0, query=["red cup", "dog"], query_targets=targets(2))
    with autocast():
        assert run(model, inputs)[0].scores.dtype == torch.float32
        assert all(loss.isfinite() for loss in model.train()([inputs]).values())


def test_the_detector_trains_too_inside_autocast(config):
    cfg = config()
    cfg.MODEL.VLNMS.FREEZE_DETECTOR = False
    cfg.MODEL.MASK_ON = False
    model = build(cfg).train()
    ground_truth = targets(1)[0]
    ground_truth.gt_classes = torch.tensor([1, 2])
    inputs = image_input(0, query="dog", query_targets=targets(1), instances=ground_truth)
    with autocast(), EventStorage():
        losses = model([inputs])
    sum(losses.values()).backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_the_precision_of_the_branch(config):
    """float32 leaves the surrounding autocast as it is, bfloat16 replaces it."""
    branch = build(config()).roi_heads.vlnms
    for outside in (False, True):
        with autocast(outside), branch.autocast():
            assert torch.is_autocast_enabled("cpu") == outside
    branch.precision = "bfloat16"
    with torch.autocast("cpu", torch.float16), branch.autocast():
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16


def test_candidates_of_half_precision_scores_are_float32():
    boxes, scores = torch.tensor([[0.0, 0, 8, 8]]).bfloat16(), torch.tensor([[0.5, 0.5]]).bfloat16()
    candidates = select_candidates(boxes, scores, (9, 9), score_thresh=0.05, max_candidates=10)
    assert candidates.boxes.dtype == candidates.scores.dtype == torch.float32
