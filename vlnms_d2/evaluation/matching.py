"""Ranked proposals matched with annotated boxes, for evaluation at any score threshold.

The proposals that remain at a threshold are a prefix of the ranking: those with a score above it,
and always the best one (the "real" operating point of VL-NMS, Sec. 4.1). So it is enough to store
the scores and the rank at which each annotated box is first hit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.structures import Boxes, Instances, pairwise_iou

NEVER = np.iinfo(np.int32).max
"""First-hit rank of a box that no proposal hits."""


@dataclass(frozen=True)
class Match:
    """The ranked proposals of one expression against its annotated boxes."""

    # float32 [n], in descending order.
    scores: np.ndarray
    # float32 [n], the best IoU with the referent among the proposals so far; None without one.
    best_iou: np.ndarray | None
    # int32 [C], for each contextual box the rank of the first proposal that hits it, or `NEVER`.
    context_rank: np.ndarray


def match_proposals(
    instances: Instances,
    targets: Sequence[Sequence[Sequence[float] | None]],
    iou_threshold: float,
    num_proposals: int,
) -> list[Match]:
    """Match one set of proposals with the boxes of each of several expressions.

    Args:
        instances: on the CPU, with `pred_boxes` (xyxy in pixels) and `scores`.
        targets: per expression its boxes, xyxy in the same pixels: the referent, None for an
            expression without one, then the contextual boxes.
        iou_threshold: a proposal hits a box if their IoU is above this.
        num_proposals: at most this many proposals count, those of highest score.
    """
    scores = instances.scores.float()
    order = scores.argsort(descending=True, stable=True)[:num_proposals]
    boxes, scores = instances.pred_boxes[order], scores[order].numpy()
    sizes = [len(annotated) for annotated in targets]
    placeholder = (0.0, 0.0, 0.0, 0.0)  # for a missing referent; its IoU with any box is 0
    all_targets = torch.tensor(
        [placeholder if box is None else box for annotated in targets for box in annotated],
        dtype=torch.float32,
    )
    iou = pairwise_iou(boxes, Boxes(all_targets.view(-1, 4))).numpy()  # [n, T]
    ranks = np.arange(len(scores), dtype=np.int32)[:, None]
    first_hit = np.where(iou > iou_threshold, ranks, NEVER).min(axis=0, initial=NEVER)
    best_iou = np.maximum.accumulate(iou, axis=0)
    ends = np.cumsum(sizes)
    return [
        # Copies: a view would keep the arrays of all expressions alive.
        Match(
            scores,
            None if annotated[0] is None else best_iou[:, start].copy(),
            first_hit[start + 1 : end].astype(np.int32),
        )
        for annotated, start, end in zip(targets, ends - sizes, ends, strict=True)
    ]


class MatchTable:
    """The matches of E expressions as arrays, to evaluate all of them at an operating point.

    Args:
        matches: one per expression, at least one.
        iou_threshold: a referent is hit above this IoU.

    Attributes:
        num_proposals: int64 [E].
        num_with_referent, num_with_context: how many expressions have one, or contextual boxes.
    """

    def __init__(self, matches: Sequence[Match], iou_threshold: float):
        self.iou_threshold = iou_threshold
        self.num_proposals = np.array([len(m.scores) for m in matches])
        width = self.num_proposals.max()
        self._filled = np.arange(width) < self.num_proposals[:, None]
        self._scores = np.full((len(matches), width), -np.inf, np.float32)
        self._scores[self._filled] = np.concatenate([m.scores for m in matches])
        # Column k is the best IoU among the first k proposals, 0 for none. Rows of expressions
        # without a referent stay 0.
        self._has_referent = np.array([m.best_iou is not None for m in matches])
        self.num_with_referent = int(self._has_referent.sum())
        self._best_iou = np.zeros((len(matches), width + 1), np.float32)
        for row, match in zip(self._best_iou, matches, strict=True):
            if match.best_iou is not None:
                row[1 : len(match.best_iou) + 1] = match.best_iou
        self._context_rank = np.concatenate([m.context_rank for m in matches])
        self._num_context = np.array([len(m.context_rank) for m in matches])
        self.num_with_context = int((self._num_context > 0).sum())
        self._context_row = np.repeat(np.arange(len(matches)), self._num_context)

    def counts(self, threshold: float) -> np.ndarray:
        """int64 [E], how many proposals remain: those above the threshold, and always the best.

        Compared in float32, as the model compares its scores with `FINAL_SCORE_THRESH`.
        """
        above = (self._scores > np.float32(threshold)).sum(axis=1)
        return np.maximum(above, np.minimum(self.num_proposals, 1))

    def summary(self, counts: np.ndarray) -> dict[str, float | None]:
        """Evaluate the first `counts` (int64 [E]) proposals of each expression.

        Returns:
            * `referent`: of the expressions that have a referent, the percentage of those where
              it is hit; None if there are none;
            * `context`: per expression the share of its contextual boxes that are hit, averaged
              over expressions that have any, in percent; None if there are none;
            * `proposals`: mean number of proposals per expression;
            * `best_iou`: mean over the same expressions of the best IoU of a proposal with the
              referent; None if there are none.
        """
        best_iou = self._best_iou[np.arange(len(counts)), counts][self._has_referent]
        hits = self._context_rank < counts[self._context_row]
        has_context = self._num_context > 0
        num_hit = np.bincount(self._context_row, weights=hits, minlength=len(counts))
        shares = num_hit[has_context] / self._num_context[has_context]
        is_hit = best_iou > self.iou_threshold
        return {
            "referent": 100.0 * float(is_hit.mean()) if len(is_hit) else None,
            "context": 100.0 * float(shares.mean()) if len(shares) else None,
            "proposals": float(counts.mean()),
            "best_iou": float(best_iou.mean(dtype=np.float64)) if len(best_iou) else None,
        }

    def threshold_for(self, mean_proposals: float) -> float:
        """The threshold at which the mean number of proposals comes closest to `mean_proposals`.

        The number only changes at scores of proposals that are not the best of their expression,
        so these, and one threshold below all of them, are the only ones to try. Of two that are
        equally close the higher one, with fewer proposals, is chosen.
        """
        others = np.sort(self._scores[:, 1:][self._filled[:, 1:]])
        if not len(others):
            return 0.0
        distinct = np.unique(others)
        thresholds = np.concatenate([[np.nextafter(distinct[0], np.float32(-np.inf))], distinct])
        above = len(others) - np.searchsorted(others, thresholds, side="right")
        total = np.minimum(self.num_proposals, 1).sum() + above
        distance = np.abs(total - mean_proposals * len(self._scores))
        return float(thresholds[::-1][distance[::-1].argmin()])
