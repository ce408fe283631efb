"""The arithmetic of torchvision's NMS, step by step, such that results equal it to the last bit."""

import math
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Array = TypeVar("Array", Tensor, np.ndarray)

# Sizes of the [N, 4] box tensor up to which torchvision uses the coordinate trick. Versions before
# 0.22 use it up to 20,000 on CUDA: between the two, boxes may round differently here than there.
TRICK_MAX_NUMEL_CPU = 4_000
TRICK_MAX_NUMEL_CUDA = 100_000


def uses_trick(boxes: Tensor) -> bool:
    """Whether torchvision shifts boxes [..., N, 4] by class (the "coordinate trick") rather than
    running NMS class by class ("vanilla")."""
    return 4 * boxes.shape[-2] <= (TRICK_MAX_NUMEL_CPU if boxes.is_cpu else TRICK_MAX_NUMEL_CUDA)


def shift_by_class(boxes: Tensor, classes: Tensor) -> Tensor:
    """Boxes [..., N, 4] shifted apart by class int [N], in the arithmetic of the trick."""
    if boxes.is_cpu and boxes.dim() == 3:
        # For this many boxes torch uses all cores, and waits for those that other processes occupy.
        values = boxes.numpy()
        with np.errstate(all="ignore"):
            largest = values.max(axis=(-2, -1), keepdims=True)
            shift = classes.numpy()[:, None].astype(values.dtype) * (largest + 1)
            return torch.from_numpy(values + shift)
    largest = boxes.max() if boxes.dim() == 2 else boxes.amax(dim=(-2, -1), keepdim=True)
    return boxes + classes.to(boxes)[:, None] * (largest + 1)


def separate_classes(boxes: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """The boxes as torchvision compares them, and the groups within which it does.

    Args:
        boxes: float [..., N, 4], xyxy in pixels.
        classes: int [N].

    Returns:
        The boxes, shifted by class where torchvision does so; and the classes, or zeros if boxes of
        different classes may suppress each other in spite of the shift.
    """
    if not uses_trick(boxes):
        return boxes, classes
    values = boxes.numpy() if boxes.is_cpu else boxes
    lowest, highest = map(torch.as_tensor, (values.min(), values.max()))
    # Up to this limit, a coordinate is rounded by less than half of the gap between classes.
    limit = 0.5 / torch.finfo(boxes.dtype).eps
    apart = (lowest >= 0) & ((highest + 1) * (classes.abs().max() + 1) <= limit)
    return shift_by_class(boxes, classes), classes * apart


def iou(better: Array, worse: Array, fused: bool) -> Array:
    """IoU of boxes [4, ...] that broadcast, rounded at each step as in torchvision's kernels.

    ``fused``: multiply width and height of the worse box and add the area of the better one in a
    single rounding, as the CUDA kernel does. The result then depends on which box is the better
    one. For tensors only.
    """
    library = torch if isinstance(better, Tensor) else np
    width, height = library.minimum(better[2:], worse[2:]) - library.maximum(better[:2], worse[:2])
    inter = width.clip(0) * height.clip(0)
    better_width, better_height = better[2:] - better[:2]
    worse_width, worse_height = worse[2:] - worse[:2]
    better_area = better_width * better_height
    if fused:
        # The product of two float32 is exact in float64. So is the sum, unless the better box is
        # more than 16 times as large as the other, and then the IoU is below 1/16 in any case.
        areas = worse_width.double() * worse_height + better_area
        areas = areas.to(better.dtype)
    else:
        areas = better_area + worse_width * worse_height
    return inter / (areas - inter)


def kernel_threshold(iou_threshold: float, boxes: Tensor) -> float:
    """The threshold that, compared in the dtype of the boxes, decides as torchvision's kernels."""
    if boxes.is_cpu and boxes.dtype == torch.float64:
        return iou_threshold
    # The CUDA kernels take the threshold as float32, also for float64 boxes.
    threshold = torch.tensor(iou_threshold, dtype=torch.float32)
    if boxes.is_cpu and threshold.item() > iou_threshold:
        # The CPU kernel compares in float64: the float32 values above the threshold are those above
        # the largest float32 that is not above it.
        threshold = torch.nextafter(threshold, torch.tensor(-math.inf))
    return threshold.item()
