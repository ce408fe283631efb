"""NMS of many queries on CUDA, in few and large operations.

The rule of ``nms``, "a box is kept if no better-ranked box that overlaps it is kept", is applied to
all queries at once. The host waits for the device twice, whatever the number of queries: for the
number of pairs, and to test whether anything still changes after ``_REPETITIONS`` applications.

Nothing here needs a GPU: on any other device, the IoU is computed as on the CPU.
"""

import torch
from torch import Tensor

from .nms_iou import iou, kernel_threshold, separate_classes

# The maximum number of elements of one temporary tensor; work is split into chunks to respect it.
_MAX_ELEMENTS = 1 << 22
# More than the usual length of the longest chain of boxes that suppress one another.
_REPETITIONS = 8


def nms_cuda(
    boxes: Tensor, scores: Tensor, classes: Tensor, iou_threshold: float, topk: int
) -> tuple[Tensor, Tensor]:
    """``multi_query_nms`` with checked arguments; neither N nor Q is 0."""
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
