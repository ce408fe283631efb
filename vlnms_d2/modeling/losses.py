"""Labels, sampling and losses of the relatedness branch (Sec. 3.4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Instances
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_iou

from ..config import check_choice
from .branch import RelatednessBranch
from .candidates import Candidates
from .relatedness import RelatednessOutput

# Exclusive lower bounds of the levels 1 to 5 of the ranking loss. The tolerance keeps an IoU of
# exactly 0.6, which float32 may round up, on the lower level. The first bound has none, so that
# "level > 0" means "rho > 0.5", the positives.
_LEVEL_BORDERS = (0.5, 0.6 + 1e-6, 0.7 + 1e-6, 0.8 + 1e-6, 0.9 + 1e-6)


@dataclass
class CandidateLabels:
    """Training labels of the N candidates of one image for its Q queries.

    Attributes:
        labels: float [Q, N], r*: 1 if the IoU with a reliable foreground box is above the
            threshold; else `unreliable_label` if the IoU with an unreliable one is; else 0.
        weights: float [Q, N], weight in the binary cross-entropy: `unreliable_label` if the label
            comes from an unreliable box, else 1.
        iou: float [Q, N], rho: the best IoU with any foreground box, 0 if there is none.
        matched_boxes: float [Q, N, 4], xyxy in pixels, the regression target: the reliable
            foreground box of the candidate's class with the highest IoU, zeros if there is none.
        regress: bool [Q, N], whether the IoU with the matched box is above the threshold, so that
            the pair is part of the regression loss.
    """

    labels: Tensor
    weights: Tensor
    iou: Tensor
    matched_boxes: Tensor
    regress: Tensor

    def __getitem__(self, index: Tensor) -> CandidateLabels:
        """The candidates at `index`, bool [N] or int64 [M], for every query."""
        return CandidateLabels(**{name: field[:, index] for name, field in vars(self).items()})


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
    """Match the candidates of one image with the foreground boxes of its queries (Sec. 3.4).

    Labels ignore the class, as in the paper. Regression, where the paper does not say, matches
    only boxes of the same class. Otherwise most of its examples would be loose boxes of a wrong
    class, such as "dog" on a cat, while the boxes that are finally kept have the right one.

    Args:
        boxes: float [N, 4], xyxy in pixels.
        foreground: per query float [F, 4], xyxy in pixels; F may be 0.
        reliable: per query bool [F]: False for unreliable pseudo ground truth (WSPG, Sec. 4.1.5).
        classes: int64 [N].
        foreground_classes: per query int64 [F], negative if not known; such a box matches any
            class.
        iou_threshold: a candidate is positive if its IoU is above this; 0.5 in the paper.
        unreliable_label: label and weight of a candidate that is positive for unreliable boxes
            only.

    Returns:
        CandidateLabels, without gradient.

    Raises:
        ValueError: `foreground`, `reliable` and `foreground_classes` differ in the number of
            queries, or in the number of boxes of a query.
    """
    counts = [len(gt_boxes) for gt_boxes in foreground]
    for name, others in (("reliable", reliable), ("foreground_classes", foreground_classes)):
        if counts != [len(other) for other in others]:
            raise ValueError(
                f"foreground has {counts} boxes per query, {name} has "
                f"{[len(other) for other in others]} entries"
            )
    # The last box, empty and unreliable, pads the queries that have fewer boxes than others.
    total = sum(counts)
    gt_boxes = torch.cat([*foreground, boxes.new_zeros(1, 4)])  # [total + 1, 4]
    is_reliable = torch.cat([*reliable, boxes.new_zeros(1, dtype=torch.bool)])
    gt_classes = torch.cat([*foreground_classes, classes.new_full((1,), -1)])
    # Indices into gt_boxes, [Q, F'], F' = max(F of any query, 1): the extra row, which is removed
    # again, guarantees a column.
    indices = [*torch.arange(total).split(counts), torch.tensor([total])]
    query_boxes = pad_sequence(indices, batch_first=True, padding_value=total)[:-1]
    query_boxes = query_boxes.to(boxes.device)

    # Two empty boxes have the IoU 0 / 0.
    iou = box_iou(gt_boxes, boxes).nan_to_num(nan=0.0)[query_boxes]  # [Q, F', N]
    best_iou = iou.amax(dim=1)  # [Q, N]
    reliable_iou = iou.masked_fill(~is_reliable[query_boxes][:, :, None], -1.0)  # [Q, F', N]
    same_class = (gt_classes[:, None] == classes) | (gt_classes[:, None] < 0)  # [total + 1, N]
    # [Q, N] each
    matched_iou, match = reliable_iou.masked_fill(~same_class[query_boxes], -1.0).max(dim=1)
    matched_boxes = gt_boxes[query_boxes.gather(1, match)]  # [Q, N, 4]
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
    """Randomly sample candidates for the loss of each query, with a limited share of positives.

    Args:
        labels: float [Q, N].
        batch_size: candidates sampled per query, if there are that many; negative for all.
        positive_fraction: the maximum number of positives, as a fraction of `batch_size`.

    Returns:
        bool [Q, N].
    """
    if batch_size < 0:
        return torch.ones_like(labels, dtype=torch.bool)
    positive = labels > 0
    # Drawn on the CPU, so that the same seed gives the same sample on every device.
    random = torch.rand(labels.shape).to(labels.device)
    num_positive = positive.sum(dim=1).clamp(max=int(batch_size * positive_fraction))
    sampled_positive = _rank_within(random, positive) < num_positive[:, None]
    sampled_negative = _rank_within(random, ~positive) < (batch_size - num_positive)[:, None]
    return (positive & sampled_positive) | (~positive & sampled_negative)


@torch.no_grad()
def sample_levels(iou: Tensor, batch_size: int, positive_fraction: float) -> Tensor:
    """As `sample_candidates`, for the ranking loss: from rho, float [Q, N]. The maximum number of
    positives is divided equally among the levels 1 to 5; the rest of `batch_size` is of level 0.
    """
    level, random = _levels(iou), torch.rand(iou.shape).to(iou.device)
    num_levels = len(_LEVEL_BORDERS)
    limits = [int(batch_size * positive_fraction) // num_levels] * num_levels
    sampled = torch.zeros_like(iou, dtype=torch.bool)
    for number, limit in enumerate([batch_size - sum(limits), *limits]):
        members = level == number
        sampled |= members & (_rank_within(random, members) < limit)
    return sampled


def _levels(iou: Tensor) -> Tensor:
    """The level of each rho, 0 to 5; see `ranking_loss`."""
    return torch.stack([iou > border for border in _LEVEL_BORDERS]).sum(dim=0)


def _rank_within(random: Tensor, members: Tensor) -> Tensor:
    """Rank of each number in [0, 1) among the `members` of its row, from 0; others rank last."""
    others_last = random.masked_fill(~members, 2.0)
    return others_last.argsort(dim=1).argsort(dim=1)  # [Q, N]


def relatedness_bce(logits: Tensor, target: CandidateLabels, sampled: Tensor) -> Tensor:
    """Weighted binary cross-entropy (Eq. 4): the mean over each query's sampled candidates,
    averaged over the queries that have any.

    The mean divides by the number of samples, not by the sum of their weights. So unreliable
    positives count less even if a query has no others.

    Args:
        logits: float [Q, N], before the sigmoid.
        target: labels for the same Q and N.
        sampled: bool [Q, N].

    Returns:
        float scalar; 0 with a gradient of 0 where nothing is sampled.
    """
    loss = F.binary_cross_entropy_with_logits(
        logits, target.labels, weight=target.weights, reduction="none"
    ).masked_fill(~sampled, 0.0)
    counts = sampled.sum(dim=1)
    return (loss.sum(dim=1) / counts.clamp(min=1)).sum() / (counts > 0).sum().clamp(min=1)


def ranking_loss(
    logits: Tensor, iou: Tensor, sampled: Tensor, *, margin: float = 0.1, top_h: int = 100
) -> Tensor:
    """Hinge loss that ranks candidates by IoU (Eq. 5), with the paper's "sampling after splitting".

    Candidates are first split into levels ceil(max(0, rho - 0.5) / 0.1): 0 for rho <= 0.5, 1 for
    (0.5, 0.6], up to 5. (A rho at most 1e-6 above 0.6, 0.7, 0.8 or 0.9 counts as equal to it.)
    Positives are the sampled candidates above level 0. The negatives of a positive are the `top_h`
    candidates with the highest predicted r among the sampled ones of its query on lower levels, or
    all of these if there are fewer. Ties in r may be broken either way: the loss is the same.

    Args:
        logits: float [Q, N], before the sigmoid.
        iou: float [Q, N], rho.
        sampled: bool [Q, N].
        margin: alpha.
        top_h: h, negatives per positive; at least 1.

    Returns:
        float scalar, the mean of max(0, r_neg - r_pos + margin) over all pairs of the call;
        0 with a gradient of 0 where there is no pair.
    """
    # Half precision, which autocast returns, is too coarse near 1 to rank by.
    r = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()
    level = _levels(iou)  # [Q, N]

    # All positives of one query and level have the same negatives: choose them once per level.
    positive_levels = torch.arange(1, len(_LEVEL_BORDERS) + 1, device=r.device)
    is_lower = sampled[:, None] & (level[:, None] < positive_levels[:, None])  # [Q, 5, N]
    # -1 is below every r, so that entries that are not negatives come last and can be recognised.
    lower_r = r[:, None].masked_fill(~is_lower, -1.0)  # [Q, 5, N]
    negatives = lower_r.topk(min(top_h, r.shape[1]), dim=2).values  # [Q, 5, h]

    query, candidate = (sampled & (level > 0)).nonzero(as_tuple=True)  # P positives
    negatives = negatives[query, level[query, candidate] - 1]  # [P, h]
    is_pair = negatives >= 0
    hinge = (negatives - r[query, candidate, None] + margin).clamp(min=0) * is_pair
    return hinge.sum() / is_pair.sum().clamp(min=1)


def box_regression_loss(predicted: Tensor, target: Tensor, beta: float = 1.0) -> Tensor:
    """Smooth L1 (Eq. 6 and 7): the sum over coordinates and boxes, divided by the number
    of boxes.

    Args:
        predicted: float [M, 4], offsets t of the pairs that `CandidateLabels.regress` marks.
        target: float [M, 4], offsets of their matched boxes; gets no gradient.
        beta: the difference above which the loss is linear; 1 in the paper; 0 gives L1.

    Returns:
        float scalar; 0 with a gradient of 0 for M = 0.
    """
    loss = F.smooth_l1_loss(predicted, target.detach(), reduction="sum", beta=beta)
    return loss / max(len(predicted), 1)


@dataclass
class SampledCandidates:
    """The training samples of one image's Q queries in one step.

    Attributes:
        candidates: the M candidates that are used.
        labels: their labels for the queries.
        sampled: bool [Q, M], the pairs in the relatedness loss.
    """

    candidates: Candidates
    labels: CandidateLabels
    sampled: Tensor


class Criterion:
    """The training objective (Sec. 3.4): labels and samples candidates, computes the losses.

    Args:
        loss: "bce" or "ranking".
        rank_margin, rank_top_h: of the ranking loss.
        reg_weight: lambda, weight of the box refinement's loss.
        reg_beta: beta of its smooth L1 loss.
        batch_size_per_query, positive_fraction: see `sample_candidates`, and for the ranking loss
            `sample_levels`.
        iou_threshold, unreliable_label: see `label_candidates`.
        max_candidates: at most this many candidates of an image are used; negative for all.
        min_candidates: see `select_candidates`; in training.

    Raises:
        ValueError: an unknown `loss`, or `max_candidates` or `batch_size_per_query` is 0.
    """

    @configurable
    def __init__(
        self,
        *,
        loss: str = "bce",
        rank_margin: float = 0.1,
        rank_top_h: int = 100,
        reg_weight: float = 1.0,
        reg_beta: float = 0.1,
        batch_size_per_query: int = 32,
        positive_fraction: float = 0.5,
        iou_threshold: float = 0.5,
        unreliable_label: float = 0.5,
        max_candidates: int = -1,
        min_candidates: int = 1,
    ):
        check_choice("LOSS", loss, ("bce", "ranking"))
        if 0 in (max_candidates, batch_size_per_query):
            key = "BATCH_SIZE_PER_QUERY" if max_candidates else "TRAIN_CANDIDATES"
            raise ValueError(
                f"MODEL.VLNMS.{key} is 0, expected a positive number, or a negative one for all "
                "candidates"
            )
        self.loss = loss
        self.rank_margin = rank_margin
        self.rank_top_h = rank_top_h
        self.reg_weight = reg_weight
        self.reg_beta = reg_beta
        self.batch_size_per_query = batch_size_per_query
        self.positive_fraction = positive_fraction
        self.iou_threshold = iou_threshold
        self.unreliable_label = unreliable_label
        self.max_candidates = max_candidates
        self.min_candidates = min_candidates

    @classmethod
    def from_config(cls, cfg):
        vlnms = cfg.MODEL.VLNMS
        return {
            "loss": vlnms.LOSS,
            "rank_margin": vlnms.RANK_MARGIN,
            "rank_top_h": vlnms.RANK_TOP_H,
            "reg_weight": vlnms.REG_WEIGHT,
            "reg_beta": vlnms.REG_BETA,
            "batch_size_per_query": vlnms.BATCH_SIZE_PER_QUERY,
            "positive_fraction": vlnms.POSITIVE_FRACTION,
            "iou_threshold": vlnms.IOU_THRESHOLD,
            "unreliable_label": vlnms.PSEUDO_GT.UNRELIABLE_LABEL,
            "max_candidates": vlnms.TRAIN_CANDIDATES,
            "min_candidates": vlnms.TRAIN_MIN_CANDIDATES,
        }

    def sample(
        self, candidates: Candidates, targets: list[Instances], keep_others: bool
    ) -> SampledCandidates:
        """Label the candidates of an image and sample those of this step.

        Args:
            candidates: the N candidates of the image.
            targets: one `Instances` per query; see `QueryBatch.targets`.
            keep_others: also keep the candidates that are not sampled for any query, as modules
                that compare boxes with each other need them.
        """
        if 0 <= self.max_candidates < len(candidates):
            # Uniformly, so that their distribution is that of inference.
            subset = torch.randperm(len(candidates))[: self.max_candidates].sort().values
            candidates = candidates[subset.to(candidates.scores.device)]
        device = candidates.boxes.device
        labels = label_candidates(
            candidates.boxes,
            [target.gt_boxes.tensor.to(device) for target in targets],
            [_field(target, "gt_reliable", True).to(device) for target in targets],
            candidates.classes,
            [_field(target, "gt_classes", -1).to(device) for target in targets],
            iou_threshold=self.iou_threshold,
            unreliable_label=self.unreliable_label,
        )
        limits = self.batch_size_per_query, self.positive_fraction
        if self.loss == "ranking" and self.batch_size_per_query >= 0:
            sampled = sample_levels(labels.iou, *limits)
        else:
            sampled = sample_candidates(labels.labels, *limits)
        if keep_others:
            return SampledCandidates(candidates, labels, sampled)
        used = sampled.any(dim=0)
        return SampledCandidates(candidates[used], labels[used], sampled[:, used])

    def losses(
        self,
        outputs: list[RelatednessOutput],
        samples: list[SampledCandidates],
        box2box: Box2BoxTransform,
    ) -> dict[str, Tensor]:
        """The losses of a batch.

        Args:
            outputs: outputs of the relatedness module, one per image that has queries.
            samples: outputs of `sample` for these images.
            box2box: the parameterisation of the box refinement.

        Returns:
            "loss_relatedness", the mean over images, and, if the module refines boxes,
            "loss_refinement": lambda times the mean over all pairs that `CandidateLabels.regress`
            marks, whether they are sampled for the relatedness loss or not.
        """
        relatedness = [self._relatedness(o, s) for o, s in zip(outputs, samples, strict=True)]
        losses = {"loss_relatedness": torch.stack(relatedness).mean()}
        if outputs[0].deltas is not None:
            refinement = self._refinement(outputs, samples, box2box)
            losses["loss_refinement"] = self.reg_weight * refinement
        return losses

    @staticmethod
    def completed(losses: dict[str, Tensor], branch: RelatednessBranch) -> dict[str, Tensor]:
        """In distributed training, also losses and gradients of 0 where a batch has no query or
        only empty ones: all processes need the same losses, and gradients of all parameters."""
        if not torch.distributed.is_initialized():
            return losses
        zero = sum(p.sum() * 0.0 for p in branch.parameters() if p.requires_grad)
        names = ["loss_relatedness"] + ["loss_refinement"] * branch.relatedness.refines
        return losses | {name: torch.as_tensor(losses.get(name, 0.0) + zero) for name in names}

    def _relatedness(self, output: RelatednessOutput, samples: SampledCandidates) -> Tensor:
        if self.loss == "bce":
            return relatedness_bce(output.logits, samples.labels, samples.sampled)
        return ranking_loss(
            output.logits,
            samples.labels.iou,
            samples.sampled,
            margin=self.rank_margin,
            top_h=self.rank_top_h,
        )

    def _refinement(
        self,
        outputs: list[RelatednessOutput],
        samples: list[SampledCandidates],
        box2box: Box2BoxTransform,
    ) -> Tensor:
        predicted, target = [], []
        for output, image_samples in zip(outputs, samples, strict=True):
            labels = image_samples.labels
            query, candidate = labels.regress.nonzero(as_tuple=True)
            boxes = image_samples.candidates.boxes[candidate]
            predicted.append(output.deltas[query, candidate])
            target.append(box2box.get_deltas(boxes, labels.matched_boxes[query, candidate]))
        return box_regression_loss(torch.cat(predicted), torch.cat(target), self.reg_beta)


def _field(target: Instances, name: str, default: bool | int) -> Tensor:
    """The field of the F boxes, [F]; filled with `default` if the target does not have it."""
    return target.get(name) if target.has(name) else torch.full((len(target),), default)
