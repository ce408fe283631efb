"""What a detector with a VL-NMS head sees in an image before any query is asked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import Tensor

from .candidates import Candidates
from .query_conditioned import Features, QueryConditionedMixin

LAYERS = ("detector", "relatedness")
"""Where box features are taken from; see `box_features`."""


@dataclass
class Seen:
    """An image as the detector sees it.

    Attributes:
        image_size: (height, width) in pixels of the network's input.
        output_size: (height, width) in pixels of the image.
        maps: feature maps of the backbone.
        candidates: all of them, pooled.
        stock: the detector's own result: `pred_boxes`, `scores`, `pred_classes`.
    """

    image_size: tuple[int, int]
    output_size: tuple[int, int]
    maps: Features
    candidates: Candidates
    stock: Instances


def check_model(model: torch.nn.Module, config_name: str) -> None:
    """Refuse a model that does not go from images to candidates.

    Args:
        config_name: of the config that describes it, for the message.

    Raises:
        ValueError: it is no GeneralizedRCNN with a VL-NMS head that makes its own proposals.
    """
    head = getattr(model, "roi_heads", None)
    if not isinstance(model, GeneralizedRCNN) or not isinstance(head, QueryConditionedMixin):
        raise ValueError(
            f"{config_name} describes {type(model).__name__} with {type(head).__name__}, expected "
            "GeneralizedRCNN with MODEL.ROI_HEADS.NAME VLNMSHead, VLNMSRes5Head or "
            "VLNMSCascadeHead"
        )
    if model.proposal_generator is None:
        raise ValueError(
            f"{config_name}: MODEL.PROPOSAL_GENERATOR.NAME is PrecomputedProposals, expected a "
            "detector that makes its own proposals"
        )


@torch.no_grad()
def look_at(model: GeneralizedRCNN, image_input: dict) -> Seen:
    """Run the detector on one image, up to its candidates.

    Args:
        model: see `check_model`.
        image_input: with `image`, uint8 or float [C, H, W], `height` and `width`.
    """
    images = model.preprocess_image([image_input])
    maps = model.backbone(images.tensor)
    proposals, _ = model.proposal_generator(images, maps, None)
    [candidates], [stock] = model.roi_heads.detect(maps, proposals)
    output_size = (image_input["height"], image_input["width"])
    return Seen(tuple(images.image_sizes[0]), output_size, maps, candidates, stock)


@torch.no_grad()
def box_features(head: QueryConditionedMixin, seen: Seen, layer: str) -> Tensor:
    """Features of the candidates' boxes, as they are before a query refines them.

    Args:
        head: of the model that saw the image.
        seen: the image.
        layer: "relatedness", what the relatedness module takes: the branch's own copy of the
            detector's head on the pooled boxes, or what `MODEL.VLNMS.VISUAL_ENCODER` says
            (where box refinement has features of its own they follow); or "detector", the
            detector's own head on the pooled boxes.

    Returns:
        float32 [N, D].
    """
    candidates = seen.candidates
    if layer == "relatedness":
        with head.own_precision():
            return head.encode_candidates([candidates])[0].float()
    pooled = candidates.pooled
    if head.visual_encoder != "finetune":
        pooled = head.pool_boxes(seen.maps, [Boxes(candidates.boxes)])
    return head.encode_pooled(head.get_submodule(head.visual_encoder_source), pooled).float()


@torch.no_grad()
def in_image(instances: Instances, output_size: tuple[int, int]) -> tuple[Instances, Tensor]:
    """Instances in pixels of the image, as Detectron2 gives them at the end.

    Args:
        instances: in pixels of the network's input, with `pred_boxes`.
        output_size: (height, width) in pixels of the image.

    Returns:
        Those whose box has an area, and which they are: int64 [M].
    """
    fields = dict(instances.get_fields())
    # Detectron2 scales the boxes that it is given in place.
    fields["pred_boxes"] = instances.pred_boxes.clone()
    fields["place"] = torch.arange(len(instances), device=instances.pred_boxes.device)
    scaled = detector_postprocess(Instances(instances.image_size, **fields), *output_size)
    return scaled, scaled.place
