"""NMS of many queries on CUDA, in few and large operations.

The rule of ``nms``, "a box is kept if no better-ranked box that overlaps it is kept", is applied to
all queries at once. Each repetition synchronizes once, to test whether anything has changed.

Nothing here needs a GPU: on any other device, the IoU is computed as on the CPU.
"""

import torch
from torch import Tensor

from .nms_iou import iou, kernel_threshold, separate_classes

# The maximum number of elements of one temporary tensor; work is split into chunks to respect it.
_MAX_ELEMENTS = 1 << 22


def nms_cuda(
    boxes: Tensor, scores: Tensor, classes: Tensor, iou_threshold: float, topk: int
) -> tuple[Tensor, Tensor]:
    """``multi_query_nms`` with checked arguments; neither N nor Q is 0."""
    num_boxes = scores.shape[1]
    # Stable, so that equal scores rank by index as in torchvision's kernels.
    order = scores.argsort(dim=1, descending=True, stable=True)  # [Q, N]
    positions = torch.arange(num_boxes, dtype=torch.int32, device=order.device)
    rank = torch.empty_like(order, dtype=torch.int32).scatter_(1, order, positions.expand_as(order))
    boxes, groups = separate_classes(boxes, classes)
    kept = []
    if boxes.dim() == 2:
        src, dst = _overlapping_pairs(boxes[None], groups, iou_threshold)
        for ranks in rank.split(max(1, _MAX_ELEMENTS // max(1, len(src)))):
            kept.append(_resolve(ranks, src, dst))
    else:
        step = max(1, _MAX_ELEMENTS // num_boxes**2)
        for query_boxes, ranks in zip(boxes.split(step), rank.split(step), strict=True):
            src, dst = _overlapping_pairs(query_boxes, groups, iou_threshold)
            # The boxes of all queries of the chunk form one graph without edges between queries.
            kept.append(_resolve(ranks.reshape(1, -1), src, dst).view(ranks.shape))
    return _best(torch.cat(kept).gather(1, order), order, topk)


def _overlapping_pairs(
    boxes: Tensor, groups: Tensor | None, iou_threshold: float
) -> tuple[Tensor, Tensor]:
    """Pairs of boxes of which the first, if kept and better ranked, suppresses the second.

    Args:
        boxes: float [B, N, 4], B independent sets of boxes, xyxy in pixels.
        groups: int [N]; only boxes of one group form pairs. None: all do.
        iou_threshold: the IoU of a pair is above it.

    Returns:
        ``(src, dst)``, int64 [E] each: positions in the B * N boxes.
    """
    num_sets, num_boxes, _ = boxes.shape
    threshold = kernel_threshold(iou_threshold, boxes)
    positions = torch.arange(num_boxes, device=boxes.device)
    set_start = torch.arange(num_sets, device=boxes.device) * num_boxes
    corners = boxes.movedim(-1, 0)  # [4, B, N]
    src, dst = [], []
    for rows in positions.split(max(1, _MAX_ELEMENTS // (num_sets * num_boxes))):
        # The fused IoU depends on which box is the better one; the other is computed once a pair.
        candidates = rows[:, None] != positions if boxes.is_cuda else rows[:, None] < positions
        if groups is not None:
            candidates &= groups[rows, None] == groups
        i, j = candidates.nonzero(as_tuple=True)
        i = rows[i]
        above = iou(corners[..., i], corners[..., j], fused=boxes.is_cuda) > threshold
        which, pair = above.nonzero(as_tuple=True)
        src.append(set_start[which] + i[pair])
        dst.append(set_start[which] + j[pair])
    if not boxes.is_cuda:
        src, dst = src + dst, dst + src
    return torch.cat(src), torch.cat(dst)


def _resolve(rank: Tensor, src: Tensor, dst: Tensor) -> Tensor:
    """Repeat the rule until nothing changes.

    Args:
        rank: int32 [R, M], R rankings of the M boxes of one graph, 0 the best.
        src, dst: int64 [E]; the box ``src`` suppresses ``dst`` in the rankings in which it is the
            better one and is kept.

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
        updated = blockers == 0
        if torch.equal(updated, kept):
            return kept.view(rank.shape)
        kept = updated


def _best(kept: Tensor, order: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The first ``topk`` kept boxes of each row, ``kept`` bool [Q, N] being in ranking order."""
    place = kept.cumsum(dim=1) - 1
    # All others are written to one extra column, which is dropped.
    place = torch.where(kept & (place < topk), place, topk)
    keep = order.new_full((len(order), topk + 1), -1).scatter_(1, place, order)[:, :topk]
    return keep.contiguous(), kept.sum(dim=1).clamp_(max=topk)
