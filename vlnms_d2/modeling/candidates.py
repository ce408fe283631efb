"""From the detector's predictions to candidates, and from candidates to pooled features.

A candidate is a (proposal, class) pair with class confidence above delta, before any NMS.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers, fast_rcnn_inference
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import clip_boxes_to_image

from ..layers.roi_align import roi_align_rows
from .relatedness.build import at_least_float32

# If an image has no candidate above delta, delta is lowered in steps of this size.
DELTA_STEP = 0.005


class Predictions(NamedTuple):
    """What the detector's head predicts for the R proposals of each image, before any threshold.

    Attributes:
        boxes: per image float [R, K * 4] or, class-agnostic, [R, 4]; xyxy in pixels of the
            network's input.
        scores: per image float [R, K + 1], class probabilities, background last.
        features: per image float [R, D], the input of the box predictor.
    """

    boxes: list[Tensor]
    scores: list[Tensor]
    features: list[Tensor]


def apply_box_predictor(
    predictor: FastRCNNOutputLayers, box_features: Tensor, proposals: list[Instances]
) -> Predictions:
    """Apply a box predictor to the box features of all images' proposals."""
    predictions = predictor(box_features)
    return Predictions(
        list(predictor.predict_boxes(predictions, proposals)),
        list(predictor.predict_probs(predictions, proposals)),
        list(box_features.flatten(1).split([len(p) for p in proposals])),
    )


def stock_results(
    predictor: FastRCNNOutputLayers,
    predictions: Predictions,
    image_sizes: list[tuple[int, int]],
    indices: list[int],
) -> list[Instances]:
    """The stock detector's own results, without masks and keypoints.

    Args:
        predictor: provides the detector's thresholds.
        predictions: of all images.
        image_sizes: of all images, (height, width) in pixels.
        indices: the images to return.

    Returns:
        Per image in `indices` an Instances with `pred_boxes`, `scores` and `pred_classes`.
    """
    results, _ = fast_rcnn_inference(
        [predictions.boxes[i] for i in indices],
        [predictions.scores[i] for i in indices],
        [image_sizes[i] for i in indices],
        predictor.test_score_thresh,
        predictor.test_nms_thresh,
        predictor.test_topk_per_image,
    )
    return results


@dataclass
class Candidates:
    """The N candidates of one image.

    Attributes:
        boxes: float [N, 4], class-specific refined boxes, xyxy in pixels of the network's input.
        scores: float [N], class confidence c.
        classes: int64 [N].
        proposal_index: int64 [N], the proposal that each candidate comes from.
        pooled: float [N, ...], the input of the visual encoder; None before pooling.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor
    proposal_index: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, index: Tensor) -> Candidates:
        """The candidates at `index`, bool [N] or int64 [M]."""
        fields = vars(self).items()
        return Candidates(**{k: None if v is None else v[index] for k, v in fields})

    def to(self, device: torch.device) -> Candidates:
        """The candidates on `device`."""
        fields = vars(self).items()
        return Candidates(**{k: None if v is None else v.to(device) for k, v in fields})


@torch.no_grad()
def select_candidates(
    boxes: Tensor,
    scores: Tensor,
    image_size: tuple[int, int],
    *,
    score_thresh: float,
    max_candidates: int,
    min_candidates: int = 1,
) -> Candidates:
    """Select the (proposal, class) pairs with confidence above `score_thresh`, without NMS.

    If fewer than `min_candidates` pairs are, the threshold is lowered in steps of 0.005 until that
    many are, or all. So there is always a candidate, unless there are no proposals or none with
    finite predictions: proposals with a box or score that is not finite are dropped, as in stock
    Detectron2.

    Args:
        boxes: float [R, K * 4] or, class-agnostic, [R, 4]; xyxy in pixels, as Detectron2's
            `predict_boxes` returns them. Clipped to the image here.
        scores: float [R, K + 1], class probabilities, background last.
        image_size: (height, width) in pixels.
        score_thresh: delta.
        max_candidates: if there are more, those of highest confidence are kept.
        min_candidates: at least 1 are kept.

    Returns:
        Candidates in the order of proposals, then classes, as in stock Detectron2.

    Raises:
        ValueError: `max_candidates` is below 1.
    """
    if max_candidates < 1:
        raise ValueError(f"MODEL.VLNMS.MAX_CANDIDATES is {max_candidates}, expected at least 1")
    # Under autocast the detector predicts in half precision, which is too coarse to rank by.
    boxes, scores = at_least_float32(boxes), at_least_float32(scores)
    finite = torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores).all(dim=1)
    scores = torch.where(finite[:, None], scores[:, :-1], float("-inf"))
    if scores.numel() == 0:
        empty = torch.zeros(0, dtype=torch.int64, device=boxes.device)
        return Candidates(boxes.new_zeros(0, 4), scores.new_zeros(0), empty, empty)

    last = scores.max()
    if min_candidates > 1:
        last = scores.flatten().topk(min(min_candidates, scores.numel())).values[-1]
    # The only operation here for which the host waits for a GPU.
    pairs = (scores > reachable_threshold(score_thresh, last)).nonzero()
    confidence = scores[pairs[:, 0], pairs[:, 1]]
    if len(pairs) > max_candidates:
        # A stable sort, so that ties at the limit are cut the same way everywhere.
        best = confidence.argsort(descending=True, stable=True)[:max_candidates].sort().values
        pairs, confidence = pairs[best], confidence[best]
    proposal, category = pairs.unbind(1)

    per_class = boxes.view(len(boxes), -1, 4)
    column = torch.zeros_like(category) if per_class.shape[1] == 1 else category
    return Candidates(
        clip_boxes_to_image(per_class[proposal, column], image_size), confidence, category, proposal
    )


def reachable_threshold(score_thresh: float, best: Tensor) -> Tensor:
    """`score_thresh`, lowered in steps of 0.005 until the probability `best` is above it.

    Minus infinity if `best` is that. It has the dtype of `best`, so that this comparison rounds as
    the caller's `scores > threshold`: a float32 score of 0.05 is above the Python float 0.05.
    """
    num_steps = max(0, int(score_thresh / DELTA_STEP)) + 2  # down to below 0
    steps = torch.arange(num_steps, device=best.device, dtype=torch.float64)
    thresholds = (score_thresh - steps * DELTA_STEP).to(best.dtype)
    return torch.where(best > thresholds, thresholds, float("-inf")).max()


class WaitFreePooler(ROIPooler):
    """`ROIPooler`, on a GPU by `pool_boxes`: for heads that run in many chunks. Bit-identical."""

    @staticmethod
    def replace(pooler: ROIPooler | None) -> None:
        """Make a stock pooler one of these, in place."""
        if type(pooler) is ROIPooler:
            pooler.__class__ = WaitFreePooler

    def forward(self, x: list[Tensor], box_lists: list[Boxes]) -> Tensor:
        """See `ROIPooler.forward`."""
        return super().forward(x, box_lists) if x[0].is_cpu else pool_boxes(self, x, box_lists)


def pool_boxes(pooler: ROIPooler, maps: list[Tensor], boxes: list[Boxes]) -> Tensor:
    """Pool boxes, on the CPU faster than `pooler(maps, boxes)`, on a GPU without waiting for it.

    On the CPU the result equals the pooler's only up to rounding, so the detector itself does not
    use this.

    Args:
        pooler: the detector's pooler.
        maps: per level float [I, C, height, width], for I images.
        boxes: per image, xyxy in pixels of the network's input.

    Returns:
        float [sum of N, C, height, width].
    """
    if not _has_fast_path(pooler, maps):
        return ROIPooler.forward(pooler, maps, boxes)
    xyxy = torch.cat([image_boxes.tensor for image_boxes in boxes])  # [sum of N, 4]
    image_index = torch.cat([b.tensor.new_full((len(b),), i) for i, b in enumerate(boxes)])
    if len(maps) == 1:
        level = torch.zeros_like(image_index, dtype=torch.int64)
    else:
        level = assign_boxes_to_levels(
            boxes,
            pooler.min_level,
            pooler.max_level,
            pooler.canonical_box_size,
            pooler.canonical_level,
        )
    if maps[0].is_cpu:
        scales = [level_pooler.spatial_scale for level_pooler in pooler.level_poolers]
        return roi_align_rows(maps, xyxy, image_index.long(), level, scales, pooler.output_size)
    # Each level pools the boxes of the others as empty boxes, which takes no time and gives zeros,
    # so that the host need not know which boxes a level has.
    return reduce(
        torch.add,
        (
            level_pooler(
                maps[i], torch.cat([image_index[:, None], xyxy * (level == i)[:, None]], 1)
            )
            for i, level_pooler in enumerate(pooler.level_poolers)
        ),
    )


def _has_fast_path(pooler: ROIPooler, maps: list[Tensor]) -> bool:
    """Whether `pool_boxes`, which has no gradient, computes by itself what the pooler does."""
    if torch.is_grad_enabled() and any(feature_map.requires_grad for feature_map in maps):
        return False
    return all(
        isinstance(level_pooler, ROIAlign)
        and level_pooler.aligned
        and level_pooler.sampling_ratio == 0
        for level_pooler in pooler.level_poolers
    ) and all(not m.is_cpu or m.dtype == torch.float32 for m in maps)
