"""From what the postprocessor selected to Detectron2's `Instances`."""

from __future__ import annotations

from detectron2.structures import Boxes, Instances
from torch import Tensor

from .candidates import Candidates
from .postprocessing import Selection
from .relatedness import RelatednessOutput


class QueryResult:
    """The proposals selected for the Q queries of one image.

    Args:
        candidates: the N candidates of the image.
        relatedness: float [Q, N], r.
        selection: what the postprocessor kept.
        output: raw output of the relatedness module, for its word attention.
    """

    def __init__(
        self,
        candidates: Candidates,
        relatedness: Tensor,
        selection: Selection,
        output: RelatednessOutput,
    ):
        self.candidates = candidates
        self.query_index, self.candidate_index = selection.flatten()
        self.distinct, self.position = self.candidate_index.unique(return_inverse=True)
        self.scores = selection.scores[self.query_index, self.candidate_index]
        self.relatedness = relatedness[self.query_index, self.candidate_index]
        self.output = output

    def distinct_instances(self, image_size: tuple[int, int]) -> Instances:
        """Every kept box once, for the mask and keypoint heads."""
        instances = Instances(image_size)
        instances.pred_boxes = Boxes(self.candidates.boxes[self.distinct])
        instances.cls_scores = self.candidates.scores[self.distinct]
        instances.pred_classes = self.candidates.classes[self.distinct]
        return instances

    def per_query(self, distinct: Instances, with_attention: bool) -> Instances:
        """The queries' proposals one after the other, each sorted by fused score."""
        instances = distinct[self.position]
        instances.scores = self.scores
        instances.relatedness = self.relatedness
        instances.query_index = self.query_index
        if with_attention and self.output.attention is not None:
            attention = self.output.attention
            instances.word_attention = (
                attention[self.query_index]
                if attention.dim() == 2
                else attention[self.query_index, self.candidate_index]
            )
        return instances
