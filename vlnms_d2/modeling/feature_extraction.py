"""One pass of the detector, up to its candidates: for export, caching and second stages.

Everything here is independent of the queries, which `QueryConditionedMixin.score_queries` then
answers as often as needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import Tensor

from .candidates import Candidates
from .roi_heads import Features, QueryConditionedMixin

LAYERS = ("detector", "relatedness")
"""Where box features are taken from; see `box_features`."""


@dataclass
class ImageFeatures:
    """What the detector computes for an image, whatever the queries.

    Attributes:
        image_size: (height, width) in pixels of the network's input.
        output_size: (height, width) in pixels of the image.
        candidates: all of them, pooled.
        detections: the stock detector's own result: `pred_boxes`, `scores`, `pred_classes`.
        maps: feature maps of the backbone; None where they were not kept.
    """

    image_size: tuple[int, int]
    output_size: tuple[int, int]
    candidates: Candidates
    detections: Instances
    maps: Features | None = None


def check_model(model: torch.nn.Module, config_name: str) -> None:
    """Reject a model that does not compute candidates from images alone.

    Args:
        model: any model.
        config_name: of the config that describes it, for the message.

    Raises:
        ValueError: it is no GeneralizedRCNN with a VL-NMS head that computes its own proposals.
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
            "detector that computes its own proposals"
        )


@torch.no_grad()
def extract_features(model: GeneralizedRCNN, image_input: dict) -> ImageFeatures:
    """Run the detector on one image, up to its candidates.

    Args:
        model: see `check_model`.
        image_input: of `batched_inputs`: `image`, uint8 or float [C, H, W], and, where the output
            has another size, `height` and `width`.
    """
    images = model.preprocess_image([image_input])
    maps = model.backbone(images.tensor)
    proposals, _ = model.proposal_generator(images, maps, None)
    [candidates], [detections] = model.roi_heads.detect(maps, proposals, images)
    height, width = images.image_sizes[0]
    output_size = (image_input.get("height", height), image_input.get("width", width))
    return ImageFeatures((height, width), output_size, candidates, detections, maps)


@torch.no_grad()
def box_features(head: QueryConditionedMixin, image: ImageFeatures, layer: str) -> Tensor:
    """Features of the candidates' boxes, before a query refines them.

    Args:
        head: of the model that computed the image's features.
        image: with `maps` for layer "detector".
        layer: "relatedness", the input of the relatedness module: the branch's copy of the
            detector's head applied to the pooled boxes, or what `MODEL.VLNMS.VISUAL_ENCODER` says
            (followed by the features of the box refinement where it has its own); or "detector",
            the detector's own head applied to the pooled boxes.

    Returns:
        float32 [N, D].
    """
    candidates = image.candidates
    if layer == "relatedness":
        with head.vlnms.autocast():
            return head.encode_candidates([candidates])[0].float()
    pooled = candidates.pooled
    if head.visual_encoder != "finetune":
        pooled = head.pool_boxes(image.maps, [Boxes(candidates.boxes)])
    return head.encode_pooled(head.get_submodule(head.visual_encoder_source), pooled).float()


@torch.no_grad()
def to_output_size(instances: Instances, output_size: tuple[int, int]) -> tuple[Instances, Tensor]:
    """Instances in pixels of the image, as Detectron2 returns them in the end.

    Args:
        instances: in pixels of the network's input, with `pred_boxes`.
        output_size: (height, width) in pixels of the image.

    Returns:
        Those whose box has an area, and their indices in the input: int64 [M].
    """
    fields = dict(instances.get_fields())
    # Detectron2 scales the boxes that it is given in place.
    fields["pred_boxes"] = instances.pred_boxes.clone()
    fields["index"] = torch.arange(len(instances), device=instances.pred_boxes.device)
    scaled = detector_postprocess(Instances(instances.image_size, **fields), *output_size)
    return scaled, scaled.index
