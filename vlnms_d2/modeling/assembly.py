"""From what the postprocessor selected to Detectron2's `Instances`."""

from __future__ import annotations

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from .candidates import Candidates
from .postprocessing import Selection
from .shared_masks import SharedRoiMasks

MASKS = ("auto", "pasted", "shared")


class QueryResult:
    """The proposals selected for the Q queries of one image.

    Args:
        candidates: the N candidates of the image.
        boxes: float [N, 4], their boxes, or [Q, N, 4] where they differ by query.
        relatedness: float [Q, N], r.
        selection: what the postprocessor kept.
        attention: word attention to add to the output, [Q, L] or [Q, N, L], or None.
        masks: one of `MASKS`, what `pred_masks` becomes; see `MODEL.VLNMS.MASKS`.
    """

    def __init__(
        self,
        candidates: Candidates,
        boxes: Tensor,
        relatedness: Tensor,
        selection: Selection,
        attention: Tensor | None = None,
        masks: str = "auto",
    ):
        self.candidates = candidates
        self.query_index, self.candidate_index = selection.flatten()
        if boxes.dim() == 2:
            self.distinct, self.position = self.candidate_index.unique(return_inverse=True)
            self.boxes = boxes[self.distinct]
        else:  # no two of these boxes are known to be the same
            self.distinct, self.position = self.candidate_index, slice(None)
            self.boxes = boxes[self.query_index, self.candidate_index]
        self.scores = selection.scores[self.query_index, self.candidate_index]
        self.relatedness = relatedness[self.query_index, self.candidate_index]
        self.attention = attention
        one_query = len(selection.num_kept) == 1
        self.shares_masks = masks == "shared" or (masks == "auto" and not one_query)

    def distinct_instances(self, image_size: tuple[int, int]) -> Instances:
        """Every kept box once, for the mask and keypoint heads."""
        instances = Instances(image_size)
        instances.pred_boxes = Boxes(self.boxes)
        instances.cls_scores = self.candidates.scores[self.distinct]
        instances.pred_classes = self.candidates.classes[self.distinct]
        return instances

    def per_query(self, distinct: Instances) -> Instances:
        """The queries' proposals one after the other, each sorted by fused score."""
        if distinct.has("pred_masks") and self.shares_masks:
            each = torch.arange(len(distinct), device=self.scores.device)
            distinct.pred_masks = SharedRoiMasks(distinct.pred_masks[:, 0], each)
        instances = distinct[self.position]
        instances.scores = self.scores
        instances.relatedness = self.relatedness
        instances.query_index = self.query_index
        if self.attention is not None:
            instances.word_attention = (
                self.attention[self.query_index]
                if self.attention.dim() == 2
                else self.attention[self.query_index, self.candidate_index]
            )
        return instances
