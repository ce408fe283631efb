"""Greedy NMS of the same N boxes under Q score lists at once.

VL-NMS (Sec. 3.2) runs NMS once per query on the fused score. The boxes' overlaps do not depend on
the query, so they are found once per image; what remains for each query is to resolve who
suppresses whom. Cluster-NMS (Zheng et al., "Enhancing Geometric Factors in Model Learning and
Inference for Object Detection and Instance Segmentation", 2021, Sec. IV) shows how to do that
without walking down the ranking: start with every box kept and repeat "a box is kept if no
better-ranked box that overlaps it is kept" until nothing changes. Suppression only runs down the
ranking, so after t rounds at least the best t boxes are final and the stable state is the greedy
result itself, not an approximation. The number of rounds is the length of the longest chain of
suppressions: at most N + 1, a handful in practice.

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

import math

import torch
from torch import Tensor
from torchvision.ops import batched_nms

# Largest number of elements of one temporary tensor; the work is split into chunks to hold it.
_MAX_ELEMENTS = 1 << 22

# Sizes of the [N, 4] box tensor up to which torchvision uses the coordinate trick. Before 0.22 it
# left it at 20,000 on CUDA: between the two, boxes here may round otherwise than there.
_TRICK_MAX_NUMEL_CPU = 4_000
_TRICK_MAX_NUMEL_CUDA = 100_000


@torch.no_grad()
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
    # Stable, so that equal scores rank by index as in torchvision's kernels.
    order = scores.argsort(dim=1, descending=True, stable=True)
    if num_queries == 0 or num_boxes == 0:
        kept = torch.ones_like(scores, dtype=torch.bool)
    elif num_queries == 1:
        kept = torch.zeros_like(scores, dtype=torch.bool)
        kept[0, batched_nms(boxes.reshape(-1, 4), scores[0], classes, iou_threshold)] = True
    else:
        kept = _kept_boxes(boxes, order, classes, iou_threshold)
    return _best(kept.gather(1, order), order, topk)


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
    half = (torch.float16, torch.bfloat16)
    boxes = boxes.float() if boxes.dtype in half else boxes
    scores = scores.float() if scores.dtype in half else scores
    if boxes.dtype != scores.dtype or not boxes.is_floating_point():
        raise TypeError(
            "boxes and scores must have one floating-point dtype, got "
            f"{boxes.dtype} and {scores.dtype}"
        )
    return boxes, scores


def _kept_boxes(boxes: Tensor, order: Tensor, classes: Tensor, iou_threshold: float) -> Tensor:
    """Mask bool [Q, N] of the boxes that queries keep; ``order`` int64 [Q, N] is their ranking."""
    num_boxes = order.shape[1]
    positions = torch.arange(num_boxes, dtype=torch.int32, device=order.device)
    rank = torch.empty_like(order, dtype=torch.int32).scatter_(1, order, positions.expand_as(order))
    groups = classes
    if 4 * num_boxes <= (_TRICK_MAX_NUMEL_CPU if boxes.is_cpu else _TRICK_MAX_NUMEL_CUDA):
        boxes, apart = _shifted_by_class(boxes, classes)
        groups = classes if apart else None

    if boxes.dim() == 2:
        src, dst = _suppression_pairs(boxes[None], groups, iou_threshold)
        step = max(1, _MAX_ELEMENTS // max(1, len(src)))
        return torch.cat([_resolve(ranks, src, dst) for ranks in rank.split(step)])

    step = max(1, _MAX_ELEMENTS // num_boxes**2)
    kept = []
    for own_boxes, ranks in zip(boxes.split(step), rank.split(step), strict=True):
        src, dst = _suppression_pairs(own_boxes, groups, iou_threshold)
        # The boxes of all queries of the chunk form one graph without edges between queries.
        kept.append(_resolve(ranks.reshape(1, -1), src, dst).view(ranks.shape))
    return torch.cat(kept)


def _shifted_by_class(boxes: Tensor, classes: Tensor) -> tuple[Tensor, bool]:
    """Boxes [..., N, 4] moved apart by class, in the arithmetic of torchvision's trick, and
    whether it is certain that boxes of different classes do not overlap then."""
    stride = boxes.amax(dim=(-2, -1)) + 1
    # Up to here the rounding of a coordinate is smaller than half of the gap between classes.
    limit = 0.5 / torch.finfo(boxes.dtype).eps
    apart = (boxes >= 0).all() & (stride.max() * (classes.abs().max() + 1) <= limit)
    return boxes + (classes.to(boxes) * stride[..., None])[..., None], bool(apart)


def _suppression_pairs(
    boxes: Tensor, classes: Tensor | None, iou_threshold: float
) -> tuple[Tensor, Tensor]:
    """Pairs of boxes of which the first, if kept and better ranked, suppresses the second.

    Args:
        boxes: float [B, N, 4], B independent sets of boxes, xyxy in pixels.
        classes: int [N]; only boxes of one class form pairs. None: all may.
        iou_threshold: pairs have an IoU above it.

    Returns:
        ``(src, dst)`` int64 [E] each: positions in the B * N boxes.
    """
    num_sets, num_boxes, _ = boxes.shape
    threshold = _kernel_threshold(iou_threshold, boxes)
    positions = torch.arange(num_boxes, device=boxes.device)
    set_start = torch.arange(num_sets, device=boxes.device) * num_boxes
    rows = max(1, _MAX_ELEMENTS // (num_sets * num_boxes))
    src, dst = [], []
    for own in positions.split(rows):
        # The fused IoU depends on which box is the better one, the other is found once a pair.
        asked = own[:, None] != positions if boxes.is_cuda else own[:, None] < positions
        if classes is not None:
            asked &= classes[own, None] == classes
        i, j = asked.nonzero(as_tuple=True)
        i = own[i]
        which, pair = (_iou(boxes[:, i], boxes[:, j], boxes.is_cuda) > threshold).nonzero(
            as_tuple=True
        )
        src.append(set_start[which] + i[pair])
        dst.append(set_start[which] + j[pair])
    if not boxes.is_cuda:
        src, dst = src + dst, dst + src
    return torch.cat(src), torch.cat(dst)


def _iou(better: Tensor, worse: Tensor, fused: bool) -> Tensor:
    """IoU of boxes [..., 4] that broadcast, rounded step by step as torchvision's kernels do.

    ``fused``: add the area of the worse box in one rounding with its product of width and height,
    as the CUDA kernel does; this makes the result depend on which of two boxes is the better one.
    """
    inter_size = torch.minimum(better[..., 2:], worse[..., 2:]) - torch.maximum(
        better[..., :2], worse[..., :2]
    )
    inter = _width_times_height(inter_size.clamp_(min=0))
    better_area = _width_times_height(better[..., 2:] - better[..., :2])
    worse_size = worse[..., 2:] - worse[..., :2]
    if fused:
        # The product of two float32 is exact in float64. So is the sum, unless the better box is
        # more than 16 times as large as the other; then the IoU is below 1/16 in any case.
        areas = _width_times_height(worse_size.double()) + better_area.double()
        areas = areas.to(better.dtype)
    else:
        areas = better_area + _width_times_height(worse_size)
    return inter / (areas - inter)


def _width_times_height(size: Tensor) -> Tensor:
    return size[..., 0] * size[..., 1]


def _kernel_threshold(iou_threshold: float, boxes: Tensor) -> float:
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


def _resolve(rank: Tensor, src: Tensor, dst: Tensor) -> Tensor:
    """The greedy result as the stable state of "kept if no better-ranked neighbour is kept".

    Args:
        rank: int32 [R, M], R rankings of the M boxes of one graph, 0 the best.
        src: int64 [E], where each edge starts: that box suppresses the edge's other box in the
            rankings in which it is the better one and is kept itself.
        dst: int64 [E], where each edge ends.

    Returns:
        bool [R, M], the kept boxes.
    """
    row, edge = (rank[:, src] < rank[:, dst]).nonzero(as_tuple=True)
    row_start = row * rank.shape[1]
    better, worse = row_start + src[edge], row_start + dst[edge]
    kept = torch.ones(rank.numel(), dtype=torch.bool, device=rank.device)
    while True:
        blockers = torch.zeros_like(kept, dtype=torch.int32)
        blockers.index_add_(0, worse, kept[better].int())
        settled = blockers == 0
        # The one synchronisation of a round. Down the ranking each box of a stable state follows
        # from those before it, so there is only one such state: the greedy result.
        if torch.equal(settled, kept):
            return kept.view(rank.shape)
        kept = settled


def _best(kept: Tensor, order: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The first ``topk`` kept boxes of each row, ``kept`` bool [Q, N] being in ranking order."""
    place = kept.cumsum(dim=1) - 1
    # Whatever is not returned goes to one spare column, cut off below.
    place = torch.where(kept & (place < topk), place, topk)
    keep = order.new_full((len(order), topk + 1), -1).scatter_(1, place, order)[:, :topk]
    return keep.contiguous(), kept.sum(dim=1).clamp_(max=topk)
