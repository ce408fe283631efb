"""NMS of many queries as the stable state of a rule: few, large steps, as a GPU likes them.

Cluster-NMS (Zheng et al., "Enhancing Geometric Factors in Model Learning and Inference for Object
Detection and Instance Segmentation", 2021, Sec. IV) shows how to do without walking down the
ranking: start with every box kept and repeat "a box is kept if no better-ranked box that overlaps
it is kept" until nothing changes. Suppression only runs down the ranking, so after t rounds at
least the best t boxes are final and the stable state is the greedy result itself, not an
approximation. The number of rounds is the length of the longest chain of suppressions: at most
N + 1, a handful in practice.
"""

import torch
from torch import Tensor

from .nms_arithmetic import compared_boxes, iou, kernel_threshold

# Largest number of elements of one temporary tensor; the work is split into chunks to hold it.
_MAX_ELEMENTS = 1 << 22


def nms_fixed_point(
    boxes: Tensor, scores: Tensor, classes: Tensor, iou_threshold: float, topk: int
) -> tuple[Tensor, Tensor]:
    """Arguments and results of ``multi_query_nms``, checked; at least one box and one query."""
    # Stable, so that equal scores rank by index as in torchvision's kernels.
    order = scores.argsort(dim=1, descending=True, stable=True)
    kept = _kept_boxes(boxes, order, classes, iou_threshold)
    return _best(kept.gather(1, order), order, topk)


def _kept_boxes(boxes: Tensor, order: Tensor, classes: Tensor, iou_threshold: float) -> Tensor:
    """Mask bool [Q, N] of the boxes that queries keep; ``order`` int64 [Q, N] is their ranking."""
    num_boxes = order.shape[1]
    positions = torch.arange(num_boxes, dtype=torch.int32, device=order.device)
    rank = torch.empty_like(order, dtype=torch.int32).scatter_(1, order, positions.expand_as(order))
    boxes, groups = compared_boxes(boxes, classes)
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
    threshold = kernel_threshold(iou_threshold, boxes)
    positions = torch.arange(num_boxes, device=boxes.device)
    set_start = torch.arange(num_sets, device=boxes.device) * num_boxes
    rows = max(1, _MAX_ELEMENTS // (num_sets * num_boxes))
    corners = boxes.movedim(-1, 0)
    src, dst = [], []
    for own in positions.split(rows):
        # The fused IoU depends on which box is the better one, the other is found once a pair.
        asked = own[:, None] != positions if boxes.is_cuda else own[:, None] < positions
        if classes is not None:
            asked &= classes[own, None] == classes
        i, j = asked.nonzero(as_tuple=True)
        i = own[i]
        above = iou(corners[..., i], corners[..., j], boxes.is_cuda) > threshold
        which, pair = above.nonzero(as_tuple=True)
        src.append(set_start[which] + i[pair])
        dst.append(set_start[which] + j[pair])
    if not boxes.is_cuda:
        src, dst = src + dst, dst + src
    return torch.cat(src), torch.cat(dst)


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
