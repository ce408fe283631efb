"""Masks that are pasted on demand, against Detectron2's own pasting."""

import copy
import pickle

import numpy as np
import pytest
import torch
from closeness import assert_instances_alike
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import BitMasks, Boxes, Instances
from small_models import build, image_input, run
from torchvision.ops import masks_to_boxes

from vlnms_d2 import split_by_query
from vlnms_d2.modeling import masks as masks_module
from vlnms_d2.modeling.masks import SharedMasks, SharedRoiMasks

SIZE = (30, 40)
INDEX = torch.tensor([2, 0, 2, 1, 0])
BOXES = torch.tensor([[5.0, 5, 20, 15], [0, 0, 40, 30], [10, 10, 30, 30]])


def distinct() -> torch.Tensor:
    return torch.rand(3, 28, 28, generator=torch.Generator().manual_seed(0))


def output(masks) -> Instances:
    """Five instances of three boxes as they leave the network, the second one empty."""
    boxes = BOXES[INDEX].clone()
    boxes[1, 2] = boxes[1, 0]
    return Instances(SIZE, pred_boxes=Boxes(boxes), pred_masks=masks)


@pytest.fixture
def pair() -> tuple[SharedMasks, torch.Tensor]:
    """Shared masks and stock Detectron2's, both resized to 45 x 80."""
    shared = detector_postprocess(output(SharedRoiMasks(distinct(), INDEX)), 45, 80)
    stock = detector_postprocess(output(distinct()[INDEX][:, None]), 45, 80)
    assert len(shared) == len(stock) == 4
    return shared.pred_masks, stock.pred_masks


def test_pasted_they_are_stock_detectron2s(pair):
    shared, stock = pair
    assert isinstance(shared, SharedMasks) and stock.any() and not stock.all()
    assert torch.equal(shared.tensor, stock)
    assert shared.shape == stock.shape and shared.dtype == stock.dtype
    assert shared.device == stock.device and len(shared) == len(stock)
    assert np.array_equal(np.asarray(shared), stock.numpy())
    assert np.array_equal(shared.cpu().numpy(), stock.numpy())


def test_indexing_and_iterating(pair):
    shared, stock = pair
    for item in (0, 3, -1):
        assert torch.equal(shared[item], stock[item])
    some = [slice(1, 3), torch.tensor([3, 0]), torch.tensor([True, False, True, True]), [], [2]]
    for item in some:
        assert torch.equal(shared[item].tensor, stock[item])
    assert all(map(torch.equal, shared, stock))
    with pytest.raises(IndexError):
        shared[4]


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8, torch.tensor, int])
def test_an_integer_of_numpy_or_torch_gives_one_mask(pair, kind):
    shared, stock = pair
    assert torch.equal(shared[kind(2)], stock[2])
    if kind is not int:
        with pytest.raises(IndexError):
            shared[kind(4)]


@pytest.mark.parametrize(
    "item",
    [
        np.array([3, 0]),
        np.array([True, False, True, True]),
        torch.tensor([2, 1], dtype=torch.int32),
        torch.tensor([1, 0, 0, 1], dtype=torch.uint8).bool(),
        (0, slice(3, 9)),
        (slice(None), 2),
        (slice(1, 3), ..., 5),
        ...,
        None,
        torch.tensor([[0, 1], [2, 3]]),
    ],
)
def test_other_indices_are_those_of_the_tensor(pair, item):
    shared, stock = pair
    answer = shared[item]
    assert torch.equal(answer if isinstance(answer, torch.Tensor) else answer.tensor, stock[item])


READERS = {
    "to dtype": lambda m: m.to(torch.float16),
    "to dtype=": lambda m: m.to(dtype=torch.uint8, device="cpu"),
    "float": lambda m: m.float(),
    "sum": lambda m: m.sum(),
    "sum of each": lambda m: m.sum(dim=(1, 2)),
    "any": lambda m: m.flatten(1).any(dim=1),
    "numpy": lambda m: torch.from_numpy(m.numpy()),
    "cat": lambda m: torch.cat([m, m]),
    "cat with a tensor": lambda m: torch.cat([torch.ones(2, 45, 80, dtype=torch.bool), m]),
    "stack": lambda m: torch.stack((m, m), dim=1),
    "torch.sum": lambda m: torch.sum(m, dim=0),
    "where": lambda m: torch.where(m, 1.0, 2.0),
    "interpolate": lambda m: torch.nn.functional.interpolate(m[None].float(), size=(9, 9)),
    "and": lambda m: m & torch.eye(45, 80, dtype=torch.bool),
    "and, from the right": lambda m: torch.eye(45, 80, dtype=torch.bool) & m,
    "not": lambda m: ~m,
    "above": lambda m: m > 0,
    "equal": lambda m: m == 1,
    "as_tensor": lambda m: torch.as_tensor(m, dtype=torch.uint8),
    "numpy's sum": lambda m: torch.from_numpy(np.sum(np.asarray(m), axis=0)),
    "BitMasks": lambda m: BitMasks(m).tensor,
    "boxes of BitMasks": lambda m: BitMasks(m).get_bounding_boxes().tensor,
    "boxes": lambda m: masks_to_boxes(m),
}


@pytest.mark.parametrize("read", READERS.values(), ids=list(READERS))
def test_what_reads_a_tensor_reads_them(pair, read):
    shared, stock = pair
    answer, expected = read(shared), read(stock)
    assert type(answer) is torch.Tensor and answer.dtype == expected.dtype
    assert torch.equal(answer, expected)


def test_their_size_is_known_without_pasting(pair, monkeypatch):
    shared, stock = pair
    monkeypatch.setattr(SharedMasks, "tensor", property(lambda self: pytest.fail("pasted")))
    assert shared.size() == stock.size() and shared.size(1) == stock.size(1)
    assert (shared.dim(), shared.ndim, shared.numel()) == (3, 3, stock.numel())


def test_to_a_device_or_to_bool_they_stay_shared(pair):
    shared, stock = pair
    for moved in (
        shared.to("cpu"),
        shared.to(device=torch.device("cpu"), non_blocking=True),
        shared.to(dtype=torch.bool, device="cpu"),
        shared.to(torch.zeros(1, dtype=torch.bool)),
    ):
        assert isinstance(moved, SharedMasks) and torch.equal(moved.tensor, stock)
    assert shared.to("meta").device.type == "meta"


def test_they_are_copied_and_pickled_and_not_written_to(pair):
    shared, stock = pair
    for twin in (copy.copy(shared), copy.deepcopy(shared), pickle.loads(pickle.dumps(shared))):
        assert isinstance(twin, SharedMasks) and torch.equal(twin.tensor, stock)
    with pytest.raises(AttributeError, match="fill_"):
        shared.fill_(True)
    with pytest.raises(TypeError):
        shared[0] = True
    assert not hasattr(shared, "polygons")


def test_instances_take_them_apart_and_put_them_together(pair):
    shared, stock = pair
    one, other = (Instances((45, 80), pred_masks=shared[i]) for i in (slice(0, 2), slice(2, 4)))
    whole = Instances.cat([other, one.to("cpu")])
    assert torch.equal(whole.pred_masks.tensor, torch.cat([stock[2:], stock[:2]]))
    assert "SharedMasks((4, 45, 80), 6 distinct)" in str(whole.pred_masks)


@pytest.mark.parametrize("relatedness", ["FC", "Trans"])
def test_what_the_model_gives(config, head, relatedness):
    """One query as in stock Detectron2; several as the key says, with the same masks."""
    cfg = config(head, relatedness)
    queries = ["red cup", "the left dog", "cup"]
    results = {}
    for masks in ("auto", "pasted", "shared"):
        cfg.MODEL.VLNMS.MASKS = masks
        model = build(cfg)
        (one,) = run(model, image_input(0, query=queries[:1]))
        assert isinstance(one.pred_masks, SharedMasks if masks == "shared" else torch.Tensor)
        (results[masks],) = run(model, image_input(0, query=queries))
    pasted = results["pasted"].pred_masks
    assert isinstance(pasted, torch.Tensor) and pasted.any()
    for masks in ("auto", "shared"):
        assert torch.equal(results[masks].pred_masks.tensor, pasted)
        for own, theirs in zip(
            split_by_query(results[masks], 3), split_by_query(results["pasted"], 3), strict=True
        ):
            assert torch.equal(own.pred_masks.tensor, theirs.pred_masks)
    if relatedness == "FC":  # without box refinement each box has one mask
        boxes = results["auto"].pred_boxes.tensor
        classes = results["auto"].pred_classes[:, None]
        number = len(torch.cat([boxes, classes.to(boxes)], dim=1).unique(dim=0))
        assert len(results["auto"].pred_masks.roi_masks) == number < len(boxes)


def test_a_few_boxes_at_a_time_give_the_same_masks(config, head, monkeypatch):
    cfg = config(head)
    cfg.MODEL.VLNMS.MASKS = "pasted"
    model = build(cfg)
    inputs = [image_input(0, query=["red cup", "dog"]), image_input(1), image_input(2, query=[])]
    at_once = run(model, *inputs)
    monkeypatch.setattr(masks_module, "_CHUNK", 4)
    for few, all_ in zip(run(model, *inputs), at_once, strict=True):
        assert torch.equal(few.pred_boxes.tensor, all_.pred_boxes.tensor)
        assert_instances_alike(few, all_)  # the masks of another batch: another order of sums


def test_an_unknown_kind_is_refused(config):
    cfg = config()
    cfg.MODEL.VLNMS.MASKS = "roi"
    with pytest.raises(ValueError, match=r"MODEL\.VLNMS\.MASKS is 'roi', expected 'auto' or"):
        build(cfg)
