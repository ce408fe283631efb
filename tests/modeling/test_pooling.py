"""Pooling by the faster way, against the detector's own pooler."""

import pytest
import torch
from closeness import assert_rounds_alike
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from small_models import build, image_input

from vlnms_d2.modeling import candidates as pooling
from vlnms_d2.modeling.candidates import pool_boxes

SCALES = (0.25, 0.125, 0.0625, 0.03125)


def make_pooler(scales=SCALES, kind="ROIAlignV2", sampling_ratio=0) -> ROIPooler:
    return ROIPooler(7, scales, sampling_ratio, kind)


def make_maps(scales=SCALES, images=2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(int(256 * scale), int(320 * scale)) for scale in scales]
    return [torch.randn(images, 6, *size, generator=generator) for size in sizes]


def random_boxes(number: int, seed: int) -> Boxes:
    """From a few pixels to the whole image of 256 x 320."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(number, 2, 2, generator=generator) ** 2 * torch.tensor([320.0, 256.0])
    return Boxes(corners.sort(dim=1).values.flatten(1))


@pytest.fixture
def fast(monkeypatch):
    """How often the faster way was taken."""
    calls = []
    way = pooling.roi_align_rows
    monkeypatch.setattr(pooling, "roi_align_rows", lambda *a: calls.append(0) or way(*a))
    return calls


@pytest.mark.parametrize("scales", [SCALES, (0.0625,)], ids=["FPN", "C4"])
@pytest.mark.parametrize("numbers", [(40, 25), (0, 9), (0, 0)])
def test_it_gives_what_the_pooler_gives(fast, scales, numbers):
    pooler, maps = make_pooler(scales), make_maps(scales)
    boxes = [random_boxes(number, seed) for seed, number in enumerate(numbers)]
    found = pool_boxes(pooler, maps, boxes)
    assert len(fast) == 1
    assert_rounds_alike(found, pooler(maps, boxes))


@pytest.mark.parametrize(
    ("kind", "sampling_ratio", "dtype"),
    [
        ("ROIAlign", 0, torch.float32),
        ("ROIAlignV2", 2, torch.float32),
        ("ROIPool", 0, torch.float32),
        ("ROIAlignV2", 0, torch.float64),
    ],
)
def test_what_the_faster_way_does_not_know_goes_to_the_pooler(fast, kind, sampling_ratio, dtype):
    pooler = make_pooler(kind=kind, sampling_ratio=sampling_ratio)
    maps = [m.to(dtype) for m in make_maps()]
    boxes = [Boxes(random_boxes(5, seed).tensor.to(dtype)) for seed in (0, 1)]
    assert torch.equal(pool_boxes(pooler, maps, boxes), pooler(maps, boxes))
    assert not fast


def test_maps_that_learn_get_their_gradients(fast):
    pooler, maps = make_pooler(), make_maps()
    boxes = [random_boxes(5, seed) for seed in (0, 1)]
    maps[0].requires_grad_()
    pool_boxes(pooler, maps, boxes).sum().backward()
    assert maps[0].grad.abs().sum() > 0 and not fast
    with torch.no_grad():
        pool_boxes(pooler, maps, boxes)
    assert fast


@torch.no_grad()
def test_the_models_candidates_are_pooled_as_by_its_pooler(config, head, fast):
    model = build(config(head))
    images = model.preprocess_image([image_input(0), image_input(1)])
    maps = model.backbone(images.tensor)
    proposals, _ = model.proposal_generator(images, maps, None)
    fast.clear()
    candidates, _ = model.roi_heads.detect(maps, proposals)
    assert len(fast) == 1
    pooler = getattr(model.roi_heads, "box_pooler", None) or model.roi_heads.pooler
    names = getattr(model.roi_heads, "box_in_features", None) or model.roi_heads.in_features
    boxes = [Boxes(found.boxes) for found in candidates]
    expected = pooler([maps[name] for name in names], boxes)
    found = torch.cat([own.pooled for own in candidates])
    assert len(found) > 20
    assert_rounds_alike(found, expected)
