"""Greedy NMS of the same N boxes under Q score lists at once.

VL-NMS (Sec. 3.2) runs NMS once per query on the fused score. The boxes' overlaps do not depend on
the query, so they are found once per image; what remains for each query is to resolve who
suppresses whom. There are three ways, of which the fastest is taken:

* One query is left to torchvision, and so are a few queries on the CPU, and boxes that overlap so
  much that a greedy walk ends after few of them.
* Many queries on the CPU walk down their rankings side by side, see ``nms_bitsets``.
* Many queries on CUDA repeat a rule until nothing changes, see ``nms_fixed_point``.

What equality with torchvision means
------------------------------------
For every query the result is that of ``torchvision.ops.batched_nms`` on the same device:

* The set of kept boxes is the same, rounding included: boxes are shifted apart by class (the
  "coordinate trick") or compared class by class ("vanilla") at the same sizes, and the IoU is
  computed with the kernels' own order of operations and their own conversion of the threshold.
  The CUDA kernel adds the area of the worse-ranked box in a fused multiply-add; for float32
  boxes that is reproduced in float64, exactly for thresholds from 0.1 up. For float64 boxes on
  CUDA it is not: an IoU within rounding of the threshold may be decided otherwise. The CPU kernel
  is taken as compiled without fused steps, as in torchvision's x86-64 wheels.
* The order is by falling score, equal scores by rising index: the same as torchvision's for the
  coordinate trick. The vanilla strategy (more than 1,000 boxes on the CPU, 25,000 on CUDA) ends
  in an unstable sort, so torchvision does not define its order among equal scores; here it is
  the rising index also there, and of boxes that tie at the cut the lower indices stay.
* NaN scores rank first and zero-area boxes suppress nothing, as in torchvision. Boxes with
  negative coordinates may suppress boxes of another class where torchvision lets them do so.
* float16 and bfloat16 input is raised to float32 first, as Detectron2 does.
"""

import numpy as np
import torch
import torchvision  # noqa: F401  registers the operator
from torch import Tensor

from .nms_arithmetic import shifted_by_class, uses_trick
from .nms_bitsets import nms_bitsets
from .nms_fixed_point import nms_fixed_point

# Called as such, torchvision.ops.nms has checks that take time at each call.
_nms = torch.ops.torchvision.nms


def multi_query_nms(
    boxes: Tensor, scores: Tensor, classes: Tensor, iou_threshold: float, topk: int | None = None
) -> tuple[Tensor, Tensor]:
    """NMS within classes for Q queries, each with its own scores of the same N boxes.

    Args:
        boxes: float [N, 4], or [Q, N, 4] where each query has boxes of its own; xyxy in pixels.
        scores: float [Q, N], of the dtype of the boxes.
        classes: int [N], the class of each box; boxes of different classes do not compete.
        iou_threshold: in [0, 1]; a box goes if its IoU with a better kept one is above
            (not at) it.
        topk: most boxes to return per query; None or negative for all.

    Returns:
        ``(keep, num_kept)``: ``keep`` int64 [Q, K], K = min(topk, N), the indices into the N boxes
        that each query keeps, by falling score, then filled up with -1; ``num_kept`` int64 [Q],
        how many there are in each row. Per query equal to ``batched_nms(...)[:topk]``, in the
        sense that the module's documentation gives.

    Raises:
        ValueError: shapes that do not fit together, or a threshold outside [0, 1].
        TypeError: boxes and scores of different or of no floating-point dtypes.
    """
    boxes, scores = _checked(boxes, scores, classes, iou_threshold)
    num_queries, num_boxes = scores.shape
    topk = num_boxes if topk is None or topk < 0 else min(topk, num_boxes)
    if num_queries == 0 or num_boxes == 0:
        keep = torch.full((num_queries, topk), -1, device=scores.device)
        return keep, keep.new_zeros(num_queries)
    problem = (boxes, scores, classes, iou_threshold, topk)
    if num_queries == 1:
        return _single(*problem)
    if not boxes.is_cpu:
        return nms_fixed_point(*problem)
    return nms_bitsets(*problem) or _one_by_one(*problem)


def _checked(
    boxes: Tensor, scores: Tensor, classes: Tensor, iou_threshold: float
) -> tuple[Tensor, Tensor]:
    """Boxes and scores in at least float32; raises as ``multi_query_nms`` documents."""
    if scores.dim() != 2:
        raise ValueError(f"expected scores [Q, N], got {list(scores.shape)}")
    num_queries, num_boxes = scores.shape
    if boxes.shape not in ((num_boxes, 4), (num_queries, num_boxes, 4)):
        raise ValueError(
            f"expected boxes {[num_boxes, 4]} or {[num_queries, num_boxes, 4]} for scores "
            f"{list(scores.shape)}, got {list(boxes.shape)}"
        )
    if classes.shape != (num_boxes,):
        raise ValueError(f"expected classes {[num_boxes]}, got {list(classes.shape)}")
    if not 0.0 <= iou_threshold <= 1.0:
        raise ValueError(f"the IoU threshold must lie in [0, 1], got {iou_threshold}")
    boxes, scores = _plain(boxes), _plain(scores)
    if boxes.dtype != scores.dtype or not boxes.is_floating_point():
        raise TypeError(
            "boxes and scores must have one floating-point dtype, got "
            f"{boxes.dtype} and {scores.dtype}"
        )
    return boxes, scores


def _plain(values: Tensor) -> Tensor:
    """The values without gradient and in at least float32."""
    if values.requires_grad:
        values = values.detach()
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _single(
    boxes: Tensor, scores: Tensor, classes: Tensor, iou_threshold: float, topk: int
) -> tuple[Tensor, Tensor]:
    """The one query's NMS by torchvision. Each operation counts beside its own few."""
    own = boxes if boxes.dim() == 2 else boxes[0]
    kept = _kept_by_one(own, scores[0], classes, iou_threshold)
    # A negative width cuts.
    keep = torch.constant_pad_nd(kept[None], (0, topk - len(kept)), -1)
    return keep, kept.new_full((1,), min(len(kept), topk))


def _kept_by_one(boxes: Tensor, scores: Tensor, classes: Tensor, iou_threshold: float) -> Tensor:
    """The boxes [N, 4] that one query keeps under its scores [N], int64, by falling score."""
    if uses_trick(boxes):
        return _nms(shifted_by_class(boxes, classes), scores, iou_threshold)
    # Class by class, as `batched_nms` does, but with a stable order at the end.
    members = classes.argsort(stable=True)
    sizes = classes[members].unique_consecutive(return_counts=True)[1].tolist()
    if len(sizes) == 1:
        return _nms(boxes, scores, iou_threshold)
    members = members.split(sizes)
    kept = [own[_nms(boxes[own], scores[own], iou_threshold)] for own in members]
    kept = torch.cat(kept).sort().values
    return kept[scores[kept].argsort(descending=True, stable=True)]


def _one_by_one(
    boxes: Tensor, scores: Tensor, classes: Tensor, iou_threshold: float, topk: int
) -> tuple[Tensor, Tensor]:
    """Torchvision's NMS for one query after the other, on the CPU."""
    trick = uses_trick(boxes)
    if trick:
        boxes = shifted_by_class(boxes, classes)
    keep = np.full((len(scores), topk), -1)
    num_kept = np.empty(len(scores), dtype=np.int64)
    every = zip(boxes.expand(len(scores), -1, -1).unbind(), scores.unbind(), strict=True)
    for query, (own, row) in enumerate(every):
        if trick:
            kept = _nms(own, row, iou_threshold)
        else:
            kept = _kept_by_one(own, row, classes, iou_threshold)
        num_kept[query] = count = min(len(kept), topk)
        keep[query, :count] = kept.numpy()[:count]
    return torch.from_numpy(keep), torch.from_numpy(num_kept)
