"""Labels, sampling and losses of the relatedness branch (SPEC section 7). Plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_iou

# Lower, exclusive borders of the levels 1 to 5 of the ranking loss. An IoU of 0.6 may come out
# of float32 arithmetic a few units in the last place too high, and still belongs below its border;
# the first border is exact, so that "level above 0" is "rho > 0.5", the positives.
_LEVEL_BORDERS = (0.5, 0.6 + 1e-6, 0.7 + 1e-6, 0.8 + 1e-6, 0.9 + 1e-6)


@dataclass
class CandidateLabels:
    """What the N candidates of one image are to its Q queries.

    Attributes:
        labels: float [Q, N], r*: 1 where the IoU with a reliable foreground box is above the
            threshold, `unreliable_label` where only that with an unreliable one is (pseudo ground
            truth of WSPG), else 0.
        weights: float [Q, N], the weight in the binary cross-entropy: `unreliable_label` where
            the label comes from an unreliable box only, else 1.
        iou: float [Q, N], rho: the best IoU with any foreground box, 0 where there is none.
        matched_boxes: float [Q, N, 4], xyxy in pixels, what regression aims at: of the reliable
            foreground boxes of the candidate's class the one of highest IoU, zeros without any.
        regress: bool [Q, N], the positives of such a box: those that regression learns from.
    """

    labels: Tensor
    weights: Tensor
    iou: Tensor
    matched_boxes: Tensor
    regress: Tensor

    def __getitem__(self, index: Tensor) -> CandidateLabels:
        """The candidates at `index`, bool [N] or int64 [M], for every query."""
        return CandidateLabels(
            labels=self.labels[:, index],
            weights=self.weights[:, index],
            iou=self.iou[:, index],
            matched_boxes=self.matched_boxes[:, index],
            regress=self.regress[:, index],
        )


@torch.no_grad()
def label_candidates(
    boxes: Tensor,
    foreground: list[Tensor],
    reliable: list[Tensor],
    classes: Tensor,
    foreground_classes: list[Tensor],
    *,
    iou_threshold: float = 0.5,
    unreliable_label: float = 0.5,
) -> CandidateLabels:
    """Compare the candidates of one image with the foreground boxes of its queries (paper, 3.4).

    A label does not ask for the class, as in the paper. Regression does, which the paper leaves
    open: the many candidates that say "dog" of a cat and have a loose box would teach it most, but
    those that are kept say "cat".

    Args:
        boxes: float [N, 4], xyxy in pixels.
        foreground: per query float [F, 4], xyxy in pixels; F may be 0.
        reliable: per query bool [F]: False for pseudo ground truth of WSPG.
        classes: int64 [N].
        foreground_classes: per query int64 [F], negative where it is not known; such a box is of
            any class.
        iou_threshold: a candidate is positive above it; the paper's is 0.5.
        unreliable_label: label and weight of a positive of unreliable boxes only.

    Returns:
        CandidateLabels, without gradient.

    Raises:
        ValueError: `foreground`, `reliable` and `foreground_classes` differ in length, of the
            lists or of a query's.
    """
    counts = [len(gt_boxes) for gt_boxes in foreground]
    for name, others in (("reliable", reliable), ("foreground_classes", foreground_classes)):
        if counts != [len(other) for other in others]:
            raise ValueError(
                f"foreground has {counts} boxes per query, {name} has "
                f"{[len(other) for other in others]} entries"
            )
    # One more box than there are, empty and unreliable: what queries of few boxes are padded with.
    total = sum(counts)
    gt_boxes = torch.cat([*foreground, boxes.new_zeros(1, 4)])
    is_reliable = torch.cat([*reliable, boxes.new_zeros(1, dtype=torch.bool)])
    gt_classes = torch.cat([*foreground_classes, classes.new_full((1,), -1)])
    numbers = [*torch.arange(total).split(counts), torch.tensor([total])]
    table = pad_sequence(numbers, batch_first=True, padding_value=total)[:-1]
    table = table.to(boxes.device)  # [Q, max F, at least 1], rows of gt_boxes

    # Two empty boxes have the IoU 0 / 0.
    iou = box_iou(gt_boxes, boxes).nan_to_num(nan=0.0)[table]  # [Q, max F, N]
    best_iou = iou.amax(dim=1)
    reliable_iou = iou.masked_fill(~is_reliable[table][:, :, None], -1.0)  # [Q, max F, N]
    of_class = (gt_classes[:, None] == classes) | (gt_classes[:, None] < 0)
    matched_iou, match = reliable_iou.masked_fill(~of_class[table], -1.0).max(dim=1)
    matched_boxes = gt_boxes[table.gather(1, match)]  # [Q, N, 4]
    matched_boxes = matched_boxes.masked_fill((matched_iou < 0)[:, :, None], 0.0)

    positive = reliable_iou.amax(dim=1) > iou_threshold
    unreliable = (best_iou > iou_threshold) & ~positive
    return CandidateLabels(
        labels=positive.to(iou.dtype).masked_fill(unreliable, unreliable_label),
        weights=torch.ones_like(best_iou).masked_fill(unreliable, unreliable_label),
        iou=best_iou,
        matched_boxes=matched_boxes,
        regress=matched_iou > iou_threshold,
    )


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


def relatedness_bce(logits: Tensor, target: CandidateLabels, drawn: Tensor) -> Tensor:
    """Weighted binary cross-entropy over the drawn pairs (paper, Eq. 4): the mean over each
    query's candidates, averaged over the queries that have any.

    The mean divides by the number drawn, not by the sum of weights: an unreliable positive
    counts for less, also where all are.

    Args:
        logits: float [Q, N], before the sigmoid.
        target: of the same Q and N.
        drawn: bool [Q, N].

    Returns:
        float scalar; 0 with a gradient of 0 where nothing is drawn.
    """
    loss = F.binary_cross_entropy_with_logits(
        logits, target.labels, weight=target.weights, reduction="none"
    ).masked_fill(~drawn, 0.0)
    counts = drawn.sum(dim=1)
    return (loss.sum(dim=1) / counts.clamp(min=1)).sum() / (counts > 0).sum().clamp(min=1)


def ranking_loss(
    logits: Tensor, iou: Tensor, drawn: Tensor, *, margin: float = 0.1, top_h: int = 100
) -> Tensor:
    """Hinge loss that ranks candidates by IoU (paper, Eq. 5), with sampling after splitting.

    A candidate's level is ceil(max(0, rho - 0.5) / 0.1): 0 for rho <= 0.5, 1 for (0.5, 0.6], up
    to 5; a rho above 0.6, 0.7, 0.8 or 0.9 by no more than 1e-6 counts as on that border.
    Positives are the drawn candidates of rho > 0.5. The negatives of a positive are, of the
    drawn candidates of its query on a lower level, the `top_h` of highest predicted r, or all
    where there are fewer. Which of several of equal r are chosen is open, and makes no
    difference to the loss.

    Args:
        logits: float [Q, N], before the sigmoid.
        iou: float [Q, N], rho.
        drawn: bool [Q, N].
        margin: alpha.
        top_h: h, negatives per positive; at least 1.

    Returns:
        float scalar, the mean of max(0, r_neg - r_pos + margin) over all pairs of the call;
        0 with a gradient of 0 where there is no pair.
    """
    # Half precision, as autocast leaves it, has too few numbers near 1 to rank by.
    r = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()
    level = torch.stack([iou > border for border in _LEVEL_BORDERS]).sum(dim=0)

    # All positives of one query and level have the same negatives.
    positive_levels = torch.arange(1, len(_LEVEL_BORDERS) + 1, device=r.device)
    is_lower = drawn[:, None] & (level[:, None] < positive_levels[:, None])  # [Q, 5, N]
    # Below every r, so that what is no negative comes last and can be told from one.
    candidates = r[:, None].masked_fill(~is_lower, -1.0)
    negatives = candidates.topk(min(top_h, r.shape[1]), dim=2).values  # [Q, 5, h]

    query, candidate = (drawn & (level > 0)).nonzero(as_tuple=True)  # P positives
    negatives = negatives[query, level[query, candidate] - 1]  # [P, h]
    is_pair = negatives >= 0
    hinge = (negatives - r[query, candidate, None] + margin).clamp(min=0) * is_pair
    return hinge.sum() / is_pair.sum().clamp(min=1)


def box_regression_loss(predicted: Tensor, target: Tensor, beta: float = 1.0) -> Tensor:
    """Smooth L1 (paper, Eq. 6 and 7): the sum over coordinates and boxes, divided by the number
    of boxes.

    Args:
        predicted: float [M, 4], offsets t of the positives with reliable boxes (`regress`).
        target: float [M, 4], offsets of their matched boxes; gets no gradient.
        beta: the difference from which on it is linear; the paper's is 1. 0: L1.

    Returns:
        float scalar; 0 with a gradient of 0 for M = 0.
    """
    loss = F.smooth_l1_loss(predicted, target.detach(), reduction="sum", beta=beta)
    return loss / max(len(predicted), 1)
