"""What the relatedness branch is trained for: drawing candidates, and the total loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from detectron2.config import configurable
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Instances
from torch import Tensor

from .candidates import Candidates
from .losses import (
    CandidateLabels,
    box_regression_loss,
    label_candidates,
    ranking_loss,
    relatedness_bce,
    sample_candidates,
)
from .relatedness import RelatednessOutput


@dataclass
class DrawnCandidates:
    """What one image's Q queries learn from in one step.

    Attributes:
        candidates: the M candidates that take part.
        labels: what they are to the queries.
        drawn: bool [Q, M], the pairs that the loss is made of.
    """

    candidates: Candidates
    labels: CandidateLabels
    drawn: Tensor


class Criterion:
    """The training objective (paper, Sec. 3.4; SPEC section 7).

    Args:
        loss: "bce" or "ranking".
        rank_margin, rank_top_h: of the ranking loss.
        reg_weight: lambda, weight of the box refinement's loss.
        reg_beta: of its smooth L1.
        batch_size_per_query: candidates drawn per query; negative for all.
        positive_fraction: largest share of positives among them.
        iou_threshold: a candidate is positive above this IoU with a foreground box.
        unreliable_label: label and weight of positives of unreliable foreground.
        max_candidates: at most this many candidates of an image take part; negative for all.

    Raises:
        ValueError: an unknown `loss`, or no candidate may take part.
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
    ):
        if loss not in ("bce", "ranking"):
            raise ValueError(f"MODEL.VLNMS.LOSS is {loss!r}, expected 'bce' or 'ranking'")
        if max_candidates == 0:
            raise ValueError(
                "MODEL.VLNMS.TRAIN_CANDIDATES is 0, expected a positive number, or a negative one "
                "for all candidates"
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
        }

    def draw(
        self, candidates: Candidates, targets: list[Instances], keep_others: bool
    ) -> DrawnCandidates:
        """Label the candidates of an image and draw those that take part in this step.

        Args:
            candidates: N of them.
            targets: per query an `Instances` with `gt_boxes` and, where some of them cannot be
                relied on, `gt_reliable` (bool); where their classes are known, `gt_classes`
                (int64).
            keep_others: candidates that no query drew take part as well, as what the others are
                compared with.
        """
        if 0 <= self.max_candidates < len(candidates):
            # Uniformly, so that those that take part are like those seen at inference.
            lottery = torch.randperm(len(candidates))[: self.max_candidates].sort().values
            candidates = candidates[lottery.to(candidates.scores.device)]
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
        drawn = sample_candidates(labels.labels, self.batch_size_per_query, self.positive_fraction)
        if keep_others:
            return DrawnCandidates(candidates, labels, drawn)
        used = drawn.any(dim=0)
        return DrawnCandidates(candidates[used], labels[used], drawn[:, used])

    def losses(
        self,
        outputs: list[RelatednessOutput],
        drawn: list[DrawnCandidates],
        box2box: Box2BoxTransform,
    ) -> dict[str, Tensor]:
        """The losses of a batch.

        Args:
            outputs: of the relatedness module, per image that has queries.
            drawn: what `draw` gave for it.
            box2box: the parameterisation of the box refinement.

        Returns:
            "loss_relatedness", the mean over images, and "loss_refinement" where the module
            refines boxes: lambda times the mean over all positives that take part and have a
            reliable box of their class, drawn or not.
        """
        relatedness = [self._relatedness(o, d) for o, d in zip(outputs, drawn, strict=True)]
        losses = {"loss_relatedness": torch.stack(relatedness).mean()}
        if outputs[0].deltas is not None:
            refinement = self._refinement(outputs, drawn, box2box)
            losses["loss_refinement"] = self.reg_weight * refinement
        return losses

    def _relatedness(self, output: RelatednessOutput, drawn: DrawnCandidates) -> Tensor:
        if self.loss == "bce":
            return relatedness_bce(output.logits, drawn.labels, drawn.drawn)
        return ranking_loss(
            output.logits,
            drawn.labels.iou,
            drawn.drawn,
            margin=self.rank_margin,
            top_h=self.rank_top_h,
        )

    def _refinement(
        self,
        outputs: list[RelatednessOutput],
        drawn: list[DrawnCandidates],
        box2box: Box2BoxTransform,
    ) -> Tensor:
        predicted, wanted = [], []
        for output, own in zip(outputs, drawn, strict=True):
            query, candidate = own.labels.regress.nonzero(as_tuple=True)
            boxes = own.candidates.boxes[candidate]
            predicted.append(output.deltas[query, candidate])
            wanted.append(box2box.get_deltas(boxes, own.labels.matched_boxes[query, candidate]))
        return box_regression_loss(torch.cat(predicted), torch.cat(wanted), self.reg_beta)


def _field(target: Instances, name: str, default: bool | int) -> Tensor:
    """A field [F], of the default where the target has none."""
    return target.get(name) if target.has(name) else torch.full((len(target),), default)
