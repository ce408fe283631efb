"""Labels, sampling and losses of the relatedness branch (SPEC section 7). Plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou


@torch.no_grad()
def label_candidates(boxes: Tensor, foreground: list[Tensor], iou_threshold: float) -> Tensor:
    """r*: 1 for a candidate whose IoU with any foreground box of the query is above the threshold.

    Args:
        boxes: float [N, 4], xyxy.
        foreground: per query float [F, 4], xyxy; F may be 0.
        iou_threshold: the paper's is 0.5.

    Returns:
        float [Q, N].
    """
    labels = boxes.new_zeros(len(foreground), len(boxes))
    for row, gt_boxes in zip(labels, foreground, strict=True):
        if len(gt_boxes) and len(boxes):
            row[:] = (box_iou(gt_boxes, boxes) > iou_threshold).any(dim=0)
    return labels


@torch.no_grad()
def sample_candidates(labels: Tensor, batch_size: int, positive_fraction: float) -> Tensor:
    """Draw candidates for the loss, per query at random and at most a share of them positive.

    Args:
        labels: float [Q, N].
        batch_size: candidates drawn per query, fewer where there are fewer; negative for all.
        positive_fraction: largest share of positives among `batch_size`.

    Returns:
        bool [Q, N].
    """
    if batch_size < 0:
        return torch.ones_like(labels, dtype=torch.bool)
    positive = labels > 0
    # Drawn on the CPU, so that the same seed gives the same draw on every device.
    lottery = torch.rand(labels.shape).to(labels.device)
    num_positive = positive.sum(dim=1).clamp(max=int(batch_size * positive_fraction))
    drawn_positive = _rank_within(lottery, positive) < num_positive[:, None]
    drawn_negative = _rank_within(lottery, ~positive) < (batch_size - num_positive)[:, None]
    return (positive & drawn_positive) | (~positive & drawn_negative)


def _rank_within(lottery: Tensor, members: Tensor) -> Tensor:
    """Rank, from 0, of each member's number among the members of its row."""
    outside_last = lottery.masked_fill(~members, 2.0)
    return outside_last.argsort(dim=1).argsort(dim=1)


def relatedness_bce(logits: Tensor, labels: Tensor, drawn: Tensor) -> Tensor:
    """Binary cross-entropy over the drawn pairs (paper, Eq. 4): the mean over each query's
    candidates, averaged over queries.

    Args:
        logits, labels: float [Q, N].
        drawn: bool [Q, N].

    Returns:
        float scalar; 0 with a gradient of 0 where nothing is drawn.
    """
    loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="none") * drawn
    counts = drawn.sum(dim=1)
    return (loss.sum(dim=1) / counts.clamp(min=1)).sum() / (counts > 0).sum().clamp(min=1)
