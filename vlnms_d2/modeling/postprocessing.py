"""The VL-NMS postprocessor: score fusion, NMS on the fused score, final cut."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from detectron2.config import configurable
from detectron2.structures import Instances
from detectron2.utils.registry import Registry
from torch import Tensor

from ..layers import fuse_scores, multi_query_nms
from .text.encoder import lookup

POSTPROCESSOR_REGISTRY = Registry("POSTPROCESSOR")
POSTPROCESSOR_REGISTRY.__doc__ = """
Registry for postprocessors, built by `cls(cfg)` and called like :class:`VLNMSPostprocessor`.
"""


@dataclass
class Selection:
    """The proposals kept for Q queries, at most K each.

    Attributes:
        index: int64 [Q, K], which of the N candidates, by falling fused score; -1 is padding.
        num_kept: int64 [Q].
        scores: float [Q, N], the fused scores of all candidates.
    """

    index: Tensor
    num_kept: Tensor
    scores: Tensor

    def flatten(self) -> tuple[Tensor, Tensor]:
        """Without padding, query after query: (query_index, candidate_index), int64 [M] each."""
        kept = torch.arange(self.index.shape[1], device=self.index.device) < self.num_kept[:, None]
        query_index, position = kept.nonzero(as_tuple=True)
        return query_index, self.index[query_index, position]


@POSTPROCESSOR_REGISTRY.register()
class VLNMSPostprocessor:
    """Fuse class confidence and relatedness, run NMS on the product, cut (Sec. 3.2).

    Works on boxes and scores from anywhere::

        post = VLNMSPostprocessor(nms_thresh=0.5, topk=100)
        query_index, candidate_index = post(boxes, cls_scores, relatedness, classes).flatten()

    Args:
        nms_thresh: a box is suppressed by a better one of its class above this IoU.
        topk: proposals kept per query; negative for all.
        score_thresh: the real operating point: fused scores above this are kept, and the best.
        fusion: "product" (s = r * c) or "weighted_sum" (s = w * r + (1 - w) * c).
        fusion_weight: w.
        class_agnostic: a box is suppressed by a better one of any class.
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
            boxes: float [N, 4], or [Q, N, 4] where they differ by query; xyxy in pixels.
            cls_scores: float [N], class confidence c.
            relatedness: float [Q, N], r.
            classes: int64 [N].
        """
        scores = fuse_scores(cls_scores, relatedness, self.fusion, self.fusion_weight)
        groups = torch.zeros_like(classes) if self.class_agnostic else classes
        index, num_kept = multi_query_nms(boxes, scores, groups, self.nms_thresh, self.topk)
        # The scores fall along a row, so the cut keeps a prefix; padding (-1) never counts.
        above = (scores.gather(1, index.clamp(min=0)) > self.score_thresh) & (index >= 0)
        num_kept = torch.minimum(num_kept, above.sum(dim=1).clamp(min=1))
        beyond = torch.arange(index.shape[1], device=index.device) >= num_kept[:, None]
        return Selection(index.masked_fill(beyond, -1), num_kept, scores)


def build_postprocessor(cfg):
    """The postprocessor that `MODEL.VLNMS.POSTPROCESSOR` names.

    Raises:
        ValueError: the name is not registered; the message lists those that are.
    """
    return lookup(POSTPROCESSOR_REGISTRY, cfg.MODEL.VLNMS.POSTPROCESSOR, "POSTPROCESSOR")(cfg)


def split_by_query(instances: Instances, num_queries: int) -> list[Instances]:
    """The instances of one image, query by query.

    Args:
        instances: an output of the model, with the field `query_index`.
        num_queries: how many queries the image had; one without proposals gets an empty list.

    Returns:
        `num_queries` Instances, each in the order of the input (by falling score).

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
