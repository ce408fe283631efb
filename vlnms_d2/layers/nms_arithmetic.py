"""The arithmetic of torchvision's NMS, step by step, so that results equal it to the last bit."""

import math
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Corners = TypeVar("Corners", Tensor, np.ndarray)

# Sizes of the [N, 4] box tensor up to which torchvision uses the coordinate trick. Before 0.22 it
# left it at 20,000 on CUDA: between the two, boxes here may round otherwise than there.
_TRICK_MAX_NUMEL_CPU = 4_000
_TRICK_MAX_NUMEL_CUDA = 100_000


def uses_trick(boxes: Tensor) -> bool:
    """Whether torchvision moves boxes [..., N, 4] apart by class ("coordinate trick") rather than
    going class by class ("vanilla")."""
    return 4 * boxes.shape[-2] <= (_TRICK_MAX_NUMEL_CPU if boxes.is_cpu else _TRICK_MAX_NUMEL_CUDA)


def shifted_by_class(boxes: Tensor, classes: Tensor) -> Tensor:
    """Boxes [..., N, 4] moved apart by class int [N], in the arithmetic of torchvision's trick."""
    if boxes.is_cpu and boxes.dim() == 3:
        # With so many boxes torch uses all cores, and waits for those that other processes hold.
        own = boxes.numpy()
        with np.errstate(all="ignore"):
            largest = own.max(axis=(-2, -1), keepdims=True)
            shift = classes.numpy()[:, None].astype(own.dtype) * (largest + 1)
            return torch.from_numpy(own + shift)
    largest = boxes.max() if boxes.dim() == 2 else boxes.amax(dim=(-2, -1), keepdim=True)
    return boxes + classes.to(boxes)[:, None] * (largest + 1)


def compared_boxes(boxes: Tensor, classes: Tensor) -> tuple[Tensor, Tensor | None]:
    """The boxes as torchvision compares them, and within which groups it does.

    Args:
        boxes: float [..., N, 4], xyxy in pixels.
        classes: int [N].

    Returns:
        The boxes, moved apart by class where torchvision does so, and the classes, or None where
        boxes of different classes may suppress each other for all that.
    """
    if not uses_trick(boxes):
        return boxes, classes
    values = boxes.numpy() if boxes.is_cpu else boxes
    lowest, highest = map(torch.as_tensor, (values.min(), values.max()))
    # Up to here the rounding of a coordinate is smaller than half of the gap between classes.
    limit = 0.5 / torch.finfo(boxes.dtype).eps
    apart = (lowest >= 0) & ((highest + 1) * (classes.abs().max() + 1) <= limit)
    return shifted_by_class(boxes, classes), classes if apart else None


def iou(better: Corners, worse: Corners, fused: bool) -> Corners:
    """IoU of boxes [4, ...] that broadcast, rounded step by step as torchvision's kernels do.

    ``fused``: add the area of the worse box in one rounding with its product of width and height,
    as the CUDA kernel does; this makes the result depend on which of two boxes is the better one.
    For tensors only.
    """
    library = torch if isinstance(better, Tensor) else np
    inter_size = library.minimum(better[2:], worse[2:]) - library.maximum(better[:2], worse[:2])
    inter = _width_times_height(inter_size.clip(0))
    better_area = _width_times_height(better[2:] - better[:2])
    worse_size = worse[2:] - worse[:2]
    if fused:
        # The product of two float32 is exact in float64. So is the sum, unless the better box is
        # more than 16 times as large as the other; then the IoU is below 1/16 in any case.
        areas = _width_times_height(worse_size.double()) + better_area.double()
        areas = areas.to(better.dtype)
    else:
        areas = better_area + _width_times_height(worse_size)
    return inter / (areas - inter)


def _width_times_height(size: Corners) -> Corners:
    return size[0] * size[1]


def kernel_threshold(iou_threshold: float, boxes: Tensor) -> float:
    """The threshold to compare with in the boxes' dtype to decide as torchvision's kernels do."""
    if boxes.is_cpu and boxes.dtype == torch.float64:
        return iou_threshold
    # The CUDA kernels take the threshold as float32, for float64 boxes too.
    threshold = torch.tensor(iou_threshold, dtype=torch.float32)
    if boxes.is_cpu and threshold.item() > iou_threshold:
        # The CPU kernel compares in float64: float32 values above the threshold are those above
        # the largest float32 that is not above it.
        threshold = torch.nextafter(threshold, torch.tensor(-math.inf))
    return threshold.item()
