"""The VL-NMS postprocessor: score fusion, NMS on the fused score, final cut; then Instances."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from detectron2.config import configurable
from detectron2.structures import Boxes, Instances
from detectron2.utils.registry import Registry
from torch import Tensor

from ..config import lookup
from ..layers import fuse_scores, multi_query_nms
from .candidates import Candidates
from .masks import SharedRoiMasks
from .relatedness.build import at_least_float32

POSTPROCESSOR_REGISTRY = Registry("POSTPROCESSOR")
POSTPROCESSOR_REGISTRY.__doc__ = """
Registry for postprocessors, built by `cls(cfg)` and called like :class:`VLNMSPostprocessor`.
"""

MASKS = ("auto", "pasted", "shared")


@dataclass
class Selection:
    """The proposals kept for Q queries, at most K each.

    Attributes:
        index: int64 [Q, K], indices into the N candidates in descending order of the fused score,
            padded with -1.
        num_kept: int64 [Q].
        scores: float [Q, N], the fused scores of all candidates.
    """

    index: Tensor
    num_kept: Tensor
    scores: Tensor

    def flatten(self) -> tuple[Tensor, Tensor]:
        """The M kept proposals without padding, query after query: (query_index,
        candidate_index), int64 [M] each."""
        kept = torch.arange(self.index.shape[1], device=self.index.device) < self.num_kept[:, None]
        query_index, position = kept.nonzero(as_tuple=True)
        return query_index, self.index[query_index, position]


@POSTPROCESSOR_REGISTRY.register()
class VLNMSPostprocessor:
    """Fuse class confidence and relatedness, run NMS on the fused score, cut (Sec. 3.2).

    Works on boxes and scores from any source::

        post = VLNMSPostprocessor(nms_thresh=0.5, topk=100)
        query_index, candidate_index = post(boxes, cls_scores, relatedness, classes).flatten()

    Args:
        nms_thresh: a box is suppressed by a higher-scored box of its class if their IoU is above
            this.
        topk: maximum number of proposals kept per query; negative for all.
        score_thresh: proposals with a fused score above this are kept, and always the best one
            (the paper's "real" operating point, Sec. 4.1).
        fusion, fusion_weight: mode and weight of `vlnms_d2.layers.fuse_scores`.
        class_agnostic: run NMS across classes instead of within each class.
    """

    @configurable
    def __init__(
        self,
        *,
        nms_thresh: float = 0.5,
        topk: int = 100,
        score_thresh: float = 0.0,
        fusion: str = "product",
        fusion_weight: float = 0.5,
        class_agnostic: bool = False,
    ):
        self.nms_thresh = nms_thresh
        self.topk = topk
        self.score_thresh = score_thresh
        self.fusion = fusion
        self.fusion_weight = fusion_weight
        self.class_agnostic = class_agnostic
        if topk == 0 or math.isnan(score_thresh):
            raise ValueError(
                f"topk (TEST.DETECTIONS_PER_IMAGE) is {topk} and score_thresh {score_thresh}; "
                "expected a positive topk, or a negative one for all, and a number"
            )
        # Fail here rather than at the first image.
        fuse_scores(torch.zeros(0), torch.zeros(0), fusion, fusion_weight)

    @classmethod
    def from_config(cls, cfg):
        return {
            "nms_thresh": cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST,
            "topk": cfg.TEST.DETECTIONS_PER_IMAGE,
            "score_thresh": cfg.MODEL.VLNMS.FINAL_SCORE_THRESH,
            "fusion": cfg.MODEL.VLNMS.FUSION,
            "fusion_weight": cfg.MODEL.VLNMS.FUSION_WEIGHT,
            "class_agnostic": cfg.MODEL.VLNMS.CLASS_AGNOSTIC_NMS,
        }

    def __call__(
        self, boxes: Tensor, cls_scores: Tensor, relatedness: Tensor, classes: Tensor
    ) -> Selection:
        """Select the proposals of each query.

        Args:
            boxes: float [N, 4], or [Q, N, 4] if each query has its own boxes; xyxy in pixels.
            cls_scores: float [N], class confidence c.
            relatedness: float [Q, N], r.
            classes: int64 [N].
        """
        scores = fuse_scores(cls_scores, relatedness, self.fusion, self.fusion_weight)  # [Q, N]
        groups = torch.zeros_like(classes) if self.class_agnostic else classes
        index, num_kept = multi_query_nms(boxes, scores, groups, self.nms_thresh, self.topk)
        # Scores descend along a row, so the cut keeps a prefix; padding (-1) never counts.
        above = (scores.gather(1, index.clamp(min=0)) > self.score_thresh) & (index >= 0)
        num_kept = torch.minimum(num_kept, above.sum(dim=1).clamp(min=1))
        beyond = torch.arange(index.shape[1], device=index.device) >= num_kept[:, None]
        return Selection(index.masked_fill(beyond, -1), num_kept, scores)


def build_postprocessor(cfg):
    """The postprocessor that `MODEL.VLNMS.POSTPROCESSOR` names; see `lookup`."""
    return lookup(POSTPROCESSOR_REGISTRY, cfg.MODEL.VLNMS.POSTPROCESSOR, "POSTPROCESSOR")(cfg)


class QueryResult:
    """The proposals kept for the Q queries of one image.

    The queries share boxes, so the mask and keypoint heads run once per distinct kept box:
    `distinct_instances` gives the input of these heads, `per_query` distributes their output.

    Args:
        candidates: the N candidates of the image.
        boxes: float [N, 4], their boxes, or [Q, N, 4] if each query has its own boxes.
        relatedness: float [Q, N], r.
        selection: the output of the postprocessor.
        attention: word attention to add to the output, [Q, L] or [Q, N, L]; None to add none.
        masks: one of `MASKS`, the type of `pred_masks`; see `MODEL.VLNMS.MASKS`.

    Attributes:
        query_index, candidate_index: int64 [M], query and candidate of each kept proposal.
        distinct: int64 [D], the candidate of each distinct kept box.
        boxes: float [D, 4], the distinct kept boxes.
        position: int64 [M], the distinct box of each kept proposal; `slice(None)` if each query
            has its own boxes, since then every kept box is distinct (D = M).
        scores, relatedness: float [M], s and r.
        shares_masks: whether `pred_masks` will be a `SharedMasks`.
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
            self.boxes = boxes[self.distinct]  # [D, 4]
        else:
            self.distinct, self.position = self.candidate_index, slice(None)
            self.boxes = boxes[self.query_index, self.candidate_index]  # [M, 4]
        self.scores = selection.scores[self.query_index, self.candidate_index]
        self.relatedness = relatedness[self.query_index, self.candidate_index]
        self.attention = attention
        single_query = len(selection.num_kept) == 1
        self.shares_masks = masks == "shared" or (masks == "auto" and not single_query)

    def distinct_instances(self, image_size: tuple[int, int]) -> Instances:
        """Each distinct kept box once, for the mask and keypoint heads."""
        instances = Instances(image_size)
        instances.pred_boxes = Boxes(self.boxes)
        instances.cls_scores = self.candidates.scores[self.distinct]
        instances.pred_classes = self.candidates.classes[self.distinct]
        return instances

    def per_query(self, distinct: Instances) -> Instances:
        """The proposals of all queries, query after query, in descending order of s."""
        if distinct.has("pred_masks") and self.shares_masks:
            # [D, 1, M, M] -> [D, M, M]; the indexing below then repeats indices instead of masks.
            each = torch.arange(len(distinct), device=self.scores.device)
            distinct.pred_masks = SharedRoiMasks(distinct.pred_masks[:, 0], each)
        instances = distinct[self.position]  # [D] -> [M]
        instances.scores = self.scores
        instances.relatedness = self.relatedness
        instances.query_index = self.query_index
        if self.attention is not None:
            per_box = self.attention.dim() == 3
            index = (self.query_index, self.candidate_index) if per_box else self.query_index
            instances.word_attention = at_least_float32(self.attention[index])  # [M, L]
        return instances


def split_by_query(instances: Instances, num_queries: int) -> list[Instances]:
    """The instances of one image, query by query.

    Args:
        instances: an output of the model, with the field `query_index`.
        num_queries: how many queries the image had; a query without instances gets empty ones.

    Returns:
        `num_queries` Instances, each in the order of the input (descending score).

    Raises:
        ValueError: the instances have no `query_index`, or one that is out of range.
    """
    if not instances.has("query_index"):
        raise ValueError(
            "these instances come from a forward without a query: they have no query_index"
        )
    query_index = instances.query_index
    if len(query_index):
        first, last = int(query_index.min()), int(query_index.max())
        if first < 0 or last >= num_queries:
            raise ValueError(
                f"query_index goes from {first} to {last}, which does not fit {num_queries} queries"
            )
        if bool((query_index[1:] < query_index[:-1]).any()):  # reordered since the forward
            instances = instances[query_index.argsort(stable=True)]
    counts = torch.bincount(query_index.cpu(), minlength=num_queries).tolist()
    ends = torch.tensor(counts).cumsum(0).tolist()
    return [instances[end - count : end] for count, end in zip(counts, ends, strict=True)]
