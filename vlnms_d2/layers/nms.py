"""Greedy NMS of N boxes for Q queries at once, where each query scores the boxes differently.

VL-NMS (Sec. 3.2) runs NMS once per query on the fused score. The IoUs of the boxes do not depend on
the query, so they are computed once per image. What remains for each query is to decide which boxes
suppress which others:

* torchvision does this for a single query. On the CPU it also does it, query by query, for a few
  queries, and if so many boxes overlap that it is faster.
* For several queries on CUDA (``nms_cuda``) and many on the CPU (``nms_cpu``) there is no loop over
  the ranked boxes. As in Cluster-NMS (Zheng et al., "Enhancing Geometric Factors in Model Learning
  and Inference for Object Detection and Instance Segmentation", 2021, Sec. IV), start with every
  box kept, and repeat the rule "a box is kept if no better-ranked box that overlaps it is kept"
  until nothing changes. Boxes are only suppressed by better-ranked ones, so after t repetitions at
  least the best t boxes are final, and the result is that of greedy NMS, not an approximation. The
  number of repetitions is at most N + 1 and in practice a handful, the length of the longest chain
  of boxes that suppress one another.

What equality with torchvision means
------------------------------------
For every query the result is that of ``torchvision.ops.batched_nms`` on the same device:

* The set of kept boxes is the same, rounding included. Depending on the number of boxes, both shift
  boxes apart by class (the "coordinate trick") or compare them class by class ("vanilla"), and the
  IoU and the threshold are computed in the order of operations and the precision of the kernels.
  The CUDA kernel adds the area of the worse-ranked box in a fused multiply-add. For float32 boxes
  this is reproduced in float64, exactly for thresholds of at least 0.1. For float64 boxes on CUDA
  it is not, so the decision may differ if an IoU is within rounding error of the threshold. The CPU
  kernel is assumed to be compiled without fused operations, as in torchvision's x86-64 wheels.
* Boxes are in descending score order, equal scores in ascending index order, as in torchvision
  with the coordinate trick. The vanilla strategy (more than 1,000 boxes on the CPU, 25,000 on CUDA)
  ends in an unstable sort, so torchvision does not define the order of equal scores. Here it is
  ascending index order in that case too, and of equal scores at the ``topk`` limit the lower
  indices are kept.
* As in torchvision, NaN scores rank first, zero-area boxes suppress nothing, and with the
  coordinate trick boxes with negative coordinates may suppress boxes of another class.
* float16 and bfloat16 input is converted to float32 first, as in Detectron2.
"""

import numpy as np
import torch
import torchvision  # noqa: F401  registers the operator
from torch import Tensor

from .nms_cpu import nms_cpu
from .nms_iou import (
    TRICK_MAX_NUMEL_CPU,
    TRICK_MAX_NUMEL_CUDA,
    iou,
    kernel_threshold,
    separate_classes,
    shift_by_class,
    uses_trick,
)

# On the CPU, the minimum number of queries for which nms_cpu is faster than torchvision.
_MIN_QUERIES = 8
# On CUDA, work is split into chunks so that no temporary tensor has more elements.
_MAX_ELEMENTS = 1 << 22
# More than the usual length of the longest chain of boxes that suppress one another.
_REPETITIONS = 8

# The operator itself, without the checks of torchvision.ops.nms at each call.
_nms = torch.ops.torchvision.nms


def multi_query_nms(
    boxes: Tensor, scores: Tensor, classes: Tensor, iou_threshold: float, topk: int | None = None
) -> tuple[Tensor, Tensor]:
    """NMS within classes for Q queries, each with its own scores of the same N boxes.

    Args:
        boxes: float [N, 4], or [Q, N, 4] if each query has its own boxes; xyxy in pixels.
        scores: float [Q, N], of the dtype of the boxes.
        classes: int [N]; only boxes of the same class suppress each other.
        iou_threshold: in [0, 1]; a box is suppressed if its IoU with a better-ranked kept box is
            above this, not equal to it.
        topk: the maximum number of boxes to return per query; None or negative for all.

    Returns:
        ``(keep, num_kept)``: ``keep`` int64 [Q, K], K = min(topk, N), the indices of the boxes that
        each query keeps, in descending score order and padded with -1; ``num_kept`` int64 [Q],
        their number. Each row equals ``batched_nms(...)[:topk]`` in the sense of the module's
        docstring.

    Raises:
        ValueError: the shapes do not match, or the threshold is outside [0, 1].
        TypeError: boxes and scores differ in dtype, or it is not a floating-point dtype.
    """
    boxes, scores = _checked(boxes, scores, classes, iou_threshold)
    num_queries, num_boxes = scores.shape
    topk = num_boxes if topk is None or topk < 0 else min(topk, num_boxes)
    if num_queries == 0 or num_boxes == 0:
        keep = torch.full((num_queries, topk), -1, device=scores.device)
        return keep, keep.new_zeros(num_queries)
    if num_queries == 1:
        return _one_query(boxes, scores, classes, iou_threshold, topk)
    if not boxes.is_cpu:
        return nms_cuda(boxes, scores, classes, iou_threshold, topk)
    if num_queries >= _MIN_QUERIES:
        result = nms_cpu(boxes, scores, classes, iou_threshold, topk)
        if result is not None:
            return result
    return _query_by_query(boxes, scores, classes, iou_threshold, topk)


def _checked(
    boxes: Tensor, scores: Tensor, classes: Tensor, iou_threshold: float
) -> tuple[Tensor, Tensor]:
    """Check the arguments of ``multi_query_nms``; return boxes and scores in at least float32."""
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
    boxes, scores = _at_least_float32(boxes), _at_least_float32(scores)
    if boxes.dtype != scores.dtype or not boxes.is_floating_point():
        raise TypeError(
            "boxes and scores must have the same floating-point dtype, got "
            f"{boxes.dtype} and {scores.dtype}"
        )
    return boxes, scores


def _at_least_float32(values: Tensor) -> Tensor:
    """The values, detached, and in float32 if they have half precision."""
    if values.requires_grad:
        values = values.detach()
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _one_query(
    boxes: Tensor, scores: Tensor, classes: Tensor, iou_threshold: float, topk: int
) -> tuple[Tensor, Tensor]:
    """NMS of one query by torchvision, which is so fast that any operation around it is felt."""
    query_boxes, query_scores = boxes if boxes.dim() == 2 else boxes[0], scores[0]
    if boxes.numel() <= (TRICK_MAX_NUMEL_CPU if boxes.is_cpu else TRICK_MAX_NUMEL_CUDA):
        # shift_by_class, inlined to save the call.
        shifted = query_boxes + classes.to(boxes)[:, None] * (query_boxes.max() + 1)
        kept = _nms(shifted, query_scores, iou_threshold)
    else:
        kept = _class_by_class(query_boxes, query_scores, classes, iou_threshold)
    # A negative pad width cuts the row to topk.
    keep = torch.constant_pad_nd(kept[None], (0, topk - len(kept)), -1)
    return keep, kept.new_full((1,), min(len(kept), topk))


def _query_by_query(
    boxes: Tensor, scores: Tensor, classes: Tensor, iou_threshold: float, topk: int
) -> tuple[Tensor, Tensor]:
    """NMS of a few queries by torchvision, on the CPU."""
    trick = uses_trick(boxes)
    if trick:
        boxes = shift_by_class(boxes, classes)
    keep = np.full((len(scores), topk), -1)
    num_kept = np.empty(len(scores), dtype=np.int64)
    for query, query_boxes in enumerate(boxes.expand(len(scores), -1, -1).unbind()):
        if trick:
            kept = _nms(query_boxes, scores[query], iou_threshold)
        else:
            kept = _class_by_class(query_boxes, scores[query], classes, iou_threshold)
        num_kept[query] = count = min(len(kept), topk)
        keep[query, :count] = kept.numpy()[:count]
    return torch.from_numpy(keep), torch.from_numpy(num_kept)


def _class_by_class(boxes: Tensor, scores: Tensor, classes: Tensor, iou_threshold: float) -> Tensor:
    """NMS of boxes [N, 4] within each class in turn, as ``batched_nms`` does for many boxes, but
    with a stable sort at the end. Returns int64 [K], in descending score order."""
    by_class = classes.argsort(stable=True)
    sizes = classes[by_class].unique_consecutive(return_counts=True)[1].tolist()
    if len(sizes) == 1:
        return _nms(boxes, scores, iou_threshold)
    kept = [m[_nms(boxes[m], scores[m], iou_threshold)] for m in by_class.split(sizes)]
    # In index order, so that the stable sort leaves equal scores in it.
    kept = torch.cat(kept).sort().values
    return kept[scores[kept].argsort(descending=True, stable=True)]


def nms_cuda(
    boxes: Tensor, scores: Tensor, classes: Tensor, iou_threshold: float, topk: int
) -> tuple[Tensor, Tensor]:
    """``multi_query_nms`` with checked arguments on CUDA; neither N nor Q is 0.

    In few and large operations: the host waits for the device twice, whatever the number of
    queries, for the number of pairs, and to test whether anything still changes after
    ``_REPETITIONS`` applications of the rule. On any other device, the IoU is that of the CPU.
    """
    num_queries, num_boxes = scores.shape
    # Stable, so that equal scores rank by index as in torchvision's kernels.
    order = scores.argsort(dim=1, descending=True, stable=True)  # [Q, N]
    positions = torch.arange(num_boxes, dtype=torch.int32, device=order.device)
    rank = torch.empty_like(order, dtype=torch.int32).scatter_(1, order, positions.expand_as(order))
    boxes, groups = separate_classes(boxes, classes)
    threshold = kernel_threshold(iou_threshold, boxes)
    src, dst = _pairs(boxes, groups, threshold)  # [P]
    kept = torch.ones_like(rank, dtype=torch.bool)
    step = max(1, _MAX_ELEMENTS // max(1, len(src)))
    changes, repetitions = True, _REPETITIONS
    while changes:
        changed = []
        for start in range(0, num_queries, step):
            chunk = slice(start, start + step)  # of q queries
            suppresses = rank[chunk, src] < rank[chunk, dst]  # [q, P]
            if boxes.dim() == 3:
                corners = boxes[chunk].movedim(-1, 0)  # [4, q, N]
                overlaps = iou(corners[..., src], corners[..., dst], boxes.is_cuda) > threshold
                suppresses &= overlaps
            after = kept[chunk]  # [q, N]
            for _ in range(repetitions):
                before = after
                blocked = (before[:, src] & suppresses).int()
                after = torch.zeros_like(rank[chunk]).index_add_(1, dst, blocked) == 0
            kept[chunk] = after
            changed.append((after != before).any())
        changes, repetitions = bool(torch.stack(changed).any()), 2 * repetitions
    return _best(kept.gather(1, order), order, topk)


def _pairs(boxes: Tensor, groups: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Pairs of boxes of which the first, if kept and better ranked, may suppress the second.

    Args:
        boxes: float [N, 4] or [Q, N, 4], xyxy in pixels. Of the former, only pairs that overlap.
        groups: int [N]; only boxes of one group form pairs.
        threshold: the IoU of a pair is above it.

    Returns:
        ``(src, dst)``, int64 [P] each; each pair in both directions.
    """
    positions = torch.arange(len(groups), device=boxes.device)
    src, dst = [], []
    for rows in positions.split(max(1, _MAX_ELEMENTS // len(groups))):
        pairs = (groups[rows, None] == groups) & (rows[:, None] != positions)
        if boxes.dim() == 2:
            pairs &= iou(boxes.T[:, rows, None], boxes.T[:, None], boxes.is_cuda) > threshold
        i, j = pairs.nonzero(as_tuple=True)
        src.append(rows[i])
        dst.append(j)
    return torch.cat(src), torch.cat(dst)


def _best(kept: Tensor, order: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The first ``topk`` kept boxes of each row, ``kept`` bool [Q, N] being in ranking order."""
    place = kept.cumsum(dim=1) - 1
    # All others are written to one extra column, which is dropped.
    place = torch.where(kept & (place < topk), place, topk)
    keep = order.new_full((len(order), topk + 1), -1).scatter_(1, place, order)[:, :topk]
    return keep.contiguous(), kept.sum(dim=1).clamp_(max=topk)
