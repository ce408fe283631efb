"""Query-conditioned ROI heads: Detectron2's own, plus the relatedness branch.

`VLNMSHead`, `VLNMSRes5Head` and `VLNMSCascadeHead` stand for `StandardROIHeads`,
`Res5ROIHeads` and `CascadeROIHeads`. Without a query they are those heads, to the bit.
"""

from __future__ import annotations

from detectron2.modeling.roi_heads import (
    ROI_HEADS_REGISTRY,
    CascadeROIHeads,
    Res5ROIHeads,
    StandardROIHeads,
)
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from .detections import Detections, predict
from .pooling import pool_boxes
from .query_conditioned import Features, QueryConditionedMixin


@ROI_HEADS_REGISTRY.register()
class VLNMSHead(QueryConditionedMixin, StandardROIHeads):
    """`StandardROIHeads` (FPN, C5) with a query."""

    @property
    def visual_encoder_source(self) -> str:
        return "box_head"

    def _detect(self, features: Features, proposals: list[Instances]) -> Detections:
        box_features = self.box_pooler(
            [features[f] for f in self.box_in_features], [p.proposal_boxes for p in proposals]
        )
        box_features = self.box_head(box_features)
        return predict(self.box_predictor, box_features, proposals)


@ROI_HEADS_REGISTRY.register()
class VLNMSRes5Head(QueryConditionedMixin, Res5ROIHeads):
    """`Res5ROIHeads` (C4) with a query."""

    @property
    def visual_encoder_source(self) -> str:
        return "res5"

    def _detect(self, features: Features, proposals: list[Instances]) -> Detections:
        box_features = self._shared_roi_transform(
            [features[f] for f in self.in_features], [p.proposal_boxes for p in proposals]
        )
        return predict(self.box_predictor, box_features.mean(dim=[2, 3]), proposals)

    def pool_boxes(self, features: Features, boxes: list[Boxes]) -> Tensor:
        return pool_boxes(self.pooler, [features[f] for f in self.in_features], boxes)

    def encode_pooled(self, encoder: nn.Module, pooled: Tensor) -> Tensor:
        return encoder(pooled).mean(dim=[2, 3])


@ROI_HEADS_REGISTRY.register()
class VLNMSCascadeHead(QueryConditionedMixin, CascadeROIHeads):
    """`CascadeROIHeads` with a query: scores are the average of the stages, boxes the last's."""

    @property
    def visual_encoder_source(self) -> str:
        return f"box_head.{self.num_cascade_stages - 1}"

    @property
    def _last_predictor(self) -> FastRCNNOutputLayers:
        return self.box_predictor[-1]

    def _detect(self, features: Features, proposals: list[Instances]) -> Detections:
        pyramid = [features[f] for f in self.box_in_features]
        image_sizes = [p.image_size for p in proposals]
        stages: list[Detections] = []
        for head, predictor in zip(self.box_head, self.box_predictor, strict=True):
            if stages:
                proposals = self._create_proposals_from_boxes(stages[-1].boxes, image_sizes)
            pooled = self.box_pooler(pyramid, [p.proposal_boxes for p in proposals])
            stages.append(predict(predictor, head(pooled), proposals))
        # The stock head's own arithmetic, so that scores agree with it to the bit.
        scores = [
            sum(list(per_image)) * (1.0 / self.num_cascade_stages)
            for per_image in zip(*(stage.scores for stage in stages), strict=True)
        ]
        return Detections(stages[-1].boxes, scores, stages[-1].features)
