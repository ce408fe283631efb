"""What the detector's head says of its proposals, before any threshold."""

from __future__ import annotations

from dataclasses import dataclass

from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers, fast_rcnn_inference
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


def stock_results(
    predictor: FastRCNNOutputLayers,
    detections: Detections,
    image_sizes: list[tuple[int, int]],
    images: list[int],
) -> list[Instances]:
    """The detector's own result, boxes only.

    Args:
        predictor: with the detector's thresholds.
        detections: of all images.
        image_sizes: of all images, (height, width) in pixels.
        images: which of them are asked for.

    Returns:
        Instances with `pred_boxes`, `scores` and `pred_classes` per image asked for.
    """
    results, _ = fast_rcnn_inference(
        [detections.boxes[i] for i in images],
        [detections.scores[i] for i in images],
        [image_sizes[i] for i in images],
        predictor.test_score_thresh,
        predictor.test_nms_thresh,
        predictor.test_topk_per_image,
    )
    return results
