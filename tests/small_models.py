"""Small models of the three kinds that the heads stand for, and images to feed them."""

from __future__ import annotations

import functools
import io
import pickle

import numpy as np
import torch
from conftest import HEADS
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances

from vlnms_d2 import add_vlnms_config, use_queries
from vlnms_d2.modeling.relatedness import Trans

WORDS = ("a", "red", "blue", "cup", "dog", "left", "of", "the")


def stock_config(zoo_config: str) -> CfgNode:
    """A model-zoo config of few channels, proposals and classes, for a CPU."""
    return _stock_config(zoo_config).clone()


@functools.cache
def _stock_config(zoo_config: str) -> CfgNode:
    cfg = get_cfg()
    add_vlnms_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file(zoo_config))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    # Random weights explode with FrozenBN's unit statistics.
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 8
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 16
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 8
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.FPN.NORM = "BN"
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 40
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 5
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 16
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 8
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = min(2, cfg.MODEL.ROI_MASK_HEAD.NUM_CONV)
    cfg.TEST.DETECTIONS_PER_IMAGE = 15
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 96, 160
    return cfg


def small_config(head: str, relatedness: str, vocabulary_file: str) -> CfgNode:
    """A config that differs from the stock one of a head in these two names alone, but for the
    sizes and a vocabulary."""
    cfg = stock_config(HEADS[head])
    cfg.MODEL.ROI_HEADS.NAME = head
    cfg.MODEL.VLNMS.RELATEDNESS = relatedness
    cfg.MODEL.VLNMS.VOCAB = vocabulary_file
    cfg.MODEL.VLNMS.BIGRU.EMBED_DIM = 12
    cfg.MODEL.VLNMS.BIGRU.HIDDEN_DIM = 8
    cfg.MODEL.VLNMS.FC.HIDDEN_DIM = 24
    cfg.MODEL.VLNMS.TRANS.HIDDEN_DIM = 16
    cfg.MODEL.VLNMS.TRANS.NUM_HEADS = 2
    cfg.MODEL.VLNMS.TRANS.FFN_DIM = 24
    return cfg


def build(cfg: CfgNode, seed: int = 0) -> torch.nn.Module:
    """A model in eval mode with reproducible random weights that behave like trained ones: unit
    statistics after batch norm, class scores that differ, boxes near their proposals, refined
    boxes (Trans) near their candidates.

    A model that only its config describes is built once and copied, which takes a twentieth of
    the time; afterwards torch's random numbers are the same as if it had been built."""
    if cfg.MODEL.VLNMS.RELATEDNESS not in ("FC", "Trans"):  # those depend on the metadata too
        return _built(cfg, seed)
    key = (repr(cfg), seed)
    if key not in _BUILT:
        if len(_BUILT) == 40:
            _BUILT.pop(next(iter(_BUILT)))
        _BUILT[key] = (_Copies(_built(cfg, seed)), torch.get_rng_state())
    copies, random_numbers = _BUILT[key]
    torch.set_rng_state(random_numbers)
    return copies.one()


class _Copies:
    """Copies of a model: pickle's C code is much faster at its thousands of small objects than
    `copy.deepcopy`, and the tensors are copied apart."""

    def __init__(self, model: torch.nn.Module) -> None:
        numbers, self._tensors = {}, []

        class Pickler(pickle.Pickler):
            def persistent_id(_, value: object) -> int | None:
                if not isinstance(value, torch.Tensor):
                    return None
                if id(value) not in numbers:
                    numbers[id(value)] = len(self._tensors)
                    self._tensors.append(value)
                return numbers[id(value)]

        file = io.BytesIO()
        Pickler(file).dump(model)
        self._rest = file.getvalue()

    def one(self) -> torch.nn.Module:
        tensors = [_copy_of(tensor) for tensor in self._tensors]
        unpickler = pickle.Unpickler(io.BytesIO(self._rest))
        unpickler.persistent_load = tensors.__getitem__
        return unpickler.load()


def _copy_of(tensor: torch.Tensor) -> torch.Tensor:
    copied = tensor.detach().clone()
    is_parameter = isinstance(tensor, torch.nn.Parameter)
    return torch.nn.Parameter(copied, tensor.requires_grad) if is_parameter else copied


_BUILT: dict[tuple[str, int], tuple[_Copies, torch.Tensor]] = {}


def _built(cfg: CfgNode, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = build_model(cfg).eval()
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    predictors = [m for m in model.modules() if isinstance(m, FastRCNNOutputLayers)]
    with torch.no_grad():
        model([image_input(seed)])
        for predictor in predictors:
            calibrate(predictor.cls_score, 1.5)
            calibrate(predictor.bbox_pred, 0.5)
        model([image_input(seed)])
    for norm in norms:
        norm.eval()
    # Loading lets the visual encoder start from the calibrated head.
    detector = {k: v for k, v in model.state_dict().items() if ".vlnms." not in k}
    model.load_state_dict(detector, strict=False)
    refinements = [m.mlp_t.out for m in model.modules() if isinstance(m, Trans) and m.mlp_t]
    for refinement in refinements:
        # Such that boxes move by about 0.3 of their size, in the units of the last predictor.
        calibrate(refinement, 0.3 * predictors[-1].box2box_transform.weights[0])
        with torch.no_grad():
            model([image_input(seed, query="the red cup")])
    return model


def calibrate(layer: torch.nn.Linear, spread: float) -> None:
    """Scale the layer at its next call so that its outputs have this standard deviation."""

    def rescale(layer, inputs, output):
        hook.remove()
        layer.weight.mul_(spread / output.std())
        return output * (spread / output.std())

    hook = layer.register_forward_hook(rescale)


def image_input(seed: int = 0, height: int = 96, width: int = 128, **fields) -> dict:
    """A model input of blurred noise, the way Detectron2's mapper makes it."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.uniform(0, 255, (1, 3, 6, 8))).float()
    image = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0]
    return {"image": image.clamp(0, 255), "height": height, "width": width, **fields}


def targets(num_queries: int) -> list[Instances]:
    """Two foreground boxes for each query on an image of 96 x 128."""
    found = []
    for i in range(num_queries):
        target = Instances((96, 128))
        target.gt_boxes = Boxes(torch.tensor([[10.0 + i, 10, 60, 60], [5, 5, 120, 90]]))
        found.append(target)
    return found


@torch.no_grad()
def run(model: torch.nn.Module, *inputs: dict) -> list[Instances]:
    return [output["instances"] for output in model(list(inputs))]


@torch.no_grad()
def run_raw(model: torch.nn.Module, *inputs: dict) -> list[Instances]:
    """What the network itself gives: masks as the mask head made them, empty boxes too."""
    with use_queries(model, [each.get("query") for each in inputs]):
        return model.inference(list(inputs), do_postprocess=False)


def same_instances(a, b) -> bool:
    """Equal fields of equal values, to the bit."""
    fields_a, fields_b = a.get_fields(), b.get_fields()
    if fields_a.keys() != fields_b.keys() or a.image_size != b.image_size:
        return False
    return all(
        torch.equal(getattr(x, "tensor", x), getattr(fields_b[k], "tensor", fields_b[k]))
        for k, x in fields_a.items()
    )
