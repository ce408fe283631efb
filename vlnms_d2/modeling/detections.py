"""What the detector's head says of its proposals, before any threshold."""

from __future__ import annotations

from dataclasses import dataclass

from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Instances
from torch import Tensor


@dataclass
class Detections:
    """What the detector's head says of the proposals of I images, before any threshold.

    Attributes:
        boxes: per image float [R, K * 4] or [R, 4], xyxy in pixels of the network's input.
        scores: per image float [R, K + 1], background last.
        features: per image float [R, D], the features that the scores were made from.
    """

    boxes: list[Tensor]
    scores: list[Tensor]
    features: list[Tensor]


def predict(
    predictor: FastRCNNOutputLayers, box_features: Tensor, proposals: list[Instances]
) -> Detections:
    """Apply a box predictor to the box features of all images' proposals."""
    predictions = predictor(box_features)
    return Detections(
        list(predictor.predict_boxes(predictions, proposals)),
        list(predictor.predict_probs(predictions, proposals)),
        list(box_features.flatten(1).split([len(p) for p in proposals])),
    )
