"""A detector with random weights and the workload of a trained one, with and without VL-NMS."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.modeling import GeneralizedRCNN, build_model
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from torch import Tensor

CONFIG = model_zoo.get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml")
HEADS = {"VLNMSHead": "StandardROIHeads", "VLNMSCascadeHead": "CascadeROIHeads"}
IMAGE_SIZE = (480, 640)
QUERY = "the small red cup left of the chair near number"  # 11 words with the number
# Standard deviation of the maps of an FPN, finest first. As it grows with the level, the candidates
# have all sizes, a third of them above 200 pixels; otherwise they would be the smallest anchors.
LEVEL_SPREAD = {"p2": 1.0, "p3": 1.1, "p4": 1.25, "p5": 1.5}


@dataclass
class Pair:
    """Stock Detectron2 and VL-NMS with the same detector weights, in eval mode.

    Attributes:
        stock: the stock detector.
        vlnms: the detector with a VL-NMS head.
        image_input: an input of noise for both.
        score_thresh: class confidence exceeded by `num_candidates` pairs of proposal and class.
    """

    stock: GeneralizedRCNN
    vlnms: GeneralizedRCNN
    image_input: dict
    score_thresh: float


@torch.no_grad()
def build_pair(cfg: CfgNode, num_candidates: int) -> Pair:
    """Build both models, with the score threshold that gives `num_candidates` candidates.

    Args:
        cfg: config of a detector with an FPN; a stock head is replaced by the VL-NMS head.
        num_candidates: candidates of the image.

    Raises:
        ValueError: the detector is of another kind, or has too few pairs of proposal and class.
    """
    cfg = cfg.clone()
    head_name = {stock: head for head, stock in HEADS.items()}.get(
        cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.ROI_HEADS.NAME
    )
    if head_name not in HEADS or not cfg.MODEL.BACKBONE.NAME.endswith("fpn_backbone"):
        raise ValueError(
            f"MODEL.ROI_HEADS.NAME is {cfg.MODEL.ROI_HEADS.NAME} and MODEL.BACKBONE.NAME "
            f"{cfg.MODEL.BACKBONE.NAME}, expected one of {', '.join(HEADS)}, or the stock head "
            "that it replaces, on an FPN"
        )
    cfg.MODEL.VLNMS.MAX_CANDIDATES = num_candidates
    torch.manual_seed(0)
    vlnms = _build(cfg, head_name)
    image_input = {"image": torch.rand(3, *IMAGE_SIZE) * 255}
    _spread_maps(vlnms, image_input)
    # As after loading a detector's checkpoint.
    stock = _build(cfg, HEADS[head_name])
    stock.load_state_dict({k: v for k, v in vlnms.state_dict().items() if ".vlnms." not in k})
    thresh = _score_of_last(vlnms, image_input, num_candidates)
    vlnms.roi_heads.score_thresh = thresh
    for model in (stock, vlnms):
        for module in model.roi_heads.modules():
            if isinstance(module, FastRCNNOutputLayers):
                module.test_score_thresh = thresh
    return Pair(stock, vlnms, image_input, thresh)


def _build(cfg: CfgNode, head: str) -> GeneralizedRCNN:
    cfg = cfg.clone()
    cfg.MODEL.ROI_HEADS.NAME = head
    return build_model(cfg).eval()


def _spread_maps(model: GeneralizedRCNN, image_input: dict) -> None:
    """Rescale the maps, which explode with random weights and no batch norm statistics."""
    images = model.preprocess_image([image_input])
    maps = model.backbone(images.tensor)
    for name, spread in LEVEL_SPREAD.items():
        layer = getattr(model.backbone, f"fpn_output{name[1:]}")
        layer.weight.mul_(spread / maps[name].std())


def _score_of_last(model: GeneralizedRCNN, image_input: dict, num_candidates: int) -> float:
    """A class confidence exceeded by `num_candidates` pairs of proposal and class."""
    scores = pair_scores(model, image_input)
    if len(scores) <= num_candidates:
        raise ValueError(
            f"the detector has {len(scores)} pairs of proposal and class, expected more than the "
            f"{num_candidates} of --candidates; raise MODEL.RPN.POST_NMS_TOPK_TEST"
        )
    best = scores.topk(num_candidates + 1).values
    return float(best[-2:].double().mean())


def pair_scores(model: GeneralizedRCNN, image_input: dict) -> Tensor:
    """The class confidence of each pair of proposal and class: float [R * K]."""
    images = model.preprocess_image([image_input])
    features = model.backbone(images.tensor)
    proposals, _ = model.proposal_generator(images, features, None)
    [scores] = model.roi_heads.predict(features, proposals).scores
    return scores[:, :-1].flatten()


@torch.no_grad()
def ask(model: GeneralizedRCNN, image_input: dict, num_queries: int) -> None:
    """Run a model on an image with `num_queries` distinct queries; without queries if 0."""
    model([image_input | ({"query": made_up_queries(num_queries)} if num_queries else {})])


def made_up_queries(count: int) -> list[str]:
    """Distinct queries of eleven words."""
    return [f"{QUERY} {number}" for number in range(count)]
