"""Pooling of boxes: the detector's own pooler, or the same numbers faster."""

from __future__ import annotations

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import (
    ROIPooler,
    assign_boxes_to_levels,
    convert_boxes_to_pooler_format,
)
from detectron2.structures import Boxes
from torch import Tensor

from ..layers.roi_align import roi_align_rows


def pool_boxes(pooler: ROIPooler, maps: list[Tensor], boxes: list[Boxes]) -> Tensor:
    """What `pooler(maps, boxes)` gives, on the CPU by a faster way that is the same but for
    rounding; that is for the branch's boxes, the detector's own are pooled by the stock one.

    Args:
        pooler: of the detector.
        maps: per level float [I, C, height, width].
        boxes: per image.

    Returns:
        float [sum of N, C, height, width].
    """
    if not _has_fast_way(pooler, maps):
        return pooler(maps, boxes)
    of_image = convert_boxes_to_pooler_format(boxes)
    image, corners = of_image[:, 0].long(), of_image[:, 1:]
    if len(maps) == 1:
        level = torch.zeros_like(image)
    else:
        level = assign_boxes_to_levels(
            boxes,
            pooler.min_level,
            pooler.max_level,
            pooler.canonical_box_size,
            pooler.canonical_level,
        )
    scales = [own.spatial_scale for own in pooler.level_poolers]
    return roi_align_rows(maps, corners, image, level, scales, pooler.output_size)


def _has_fast_way(pooler: ROIPooler, maps: list[Tensor]) -> bool:
    return all(
        isinstance(own, ROIAlign) and own.aligned and own.sampling_ratio == 0
        for own in pooler.level_poolers
    ) and all(m.is_cpu and m.dtype == torch.float32 and not _learns(m) for m in maps)


def _learns(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()
