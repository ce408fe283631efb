"""The mixin that makes a Detectron2 ROI head query-conditioned."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from .assembly import MASKS, QueryResult
from .branch import RelatednessBranch
from .candidates import Candidates, select_candidates
from .criterion import Criterion
from .detections import Detections, stock_results
from .pooling import pool_boxes
from .postprocessing import build_postprocessor
from .queries import QueryBatch
from .query_training import TrainsBranch
from .refinement import refine_boxes
from .relatedness import (
    Relatedness,
    box_locations,
    build_relatedness,
    text_encoder_name,
    visual_encoder_name,
)
from .text import TextEncoder, TextFeatures, build_text_encoder

# The mask and keypoint heads see at most so many boxes of an image at once: what they pool of a
# box is 200 kB, and many queries keep many distinct boxes.
BOXES_AT_ONCE = 100

Features = dict[str, Tensor]


class QueryConditionedMixin(TrainsBranch):
    """Adds text, relatedness and fused-score NMS to a Detectron2 ROI head.

    A subclass names the part of the detector that the visual encoder copies
    (`visual_encoder_source`), says how it detects (`_detect`) and, where it has no box pooler,
    how boxes are pooled (`pool_boxes`) and encoded (`encode_pooled`).

    Args (besides those of the head it is mixed into):
        text_encoder: from strings to word features.
        relatedness: from box and word features to logits.
        postprocessor: fusion, NMS and final cut; see `VLNMSPostprocessor`.
        criterion: draws candidates in training and computes the losses.
        visual_encoder: "finetune" or "shared"; "class" gives the relatedness module the one-hot
            class of each candidate, for those that ask for it.
        score_thresh: delta of the candidates.
        max_candidates: most candidates an image.
        freeze_detector: train the branch only.
        precision: "float32" or "bfloat16", of the branch's layers.
        chunk_bytes: most temporary memory for scoring; see `RelatednessBranch`.
        output_attention: add the word attention to the output.
        masks: what `pred_masks` is where there are queries; see `MODEL.VLNMS.MASKS`.
    """

    @configurable
    def __init__(
        self,
        *,
        text_encoder: TextEncoder,
        relatedness: Relatedness,
        postprocessor,
        criterion: Criterion,
        visual_encoder: str = "finetune",
        score_thresh: float = 0.05,
        max_candidates: int = 1000,
        freeze_detector: bool = True,
        precision: str = "float32",
        chunk_bytes: int = 256 << 20,
        output_attention: bool = False,
        masks: str = "auto",
        **kwargs,
    ):
        super().__init__(**kwargs)
        if visual_encoder not in ("finetune", "shared", "class"):
            raise ValueError(
                f"MODEL.VLNMS.VISUAL_ENCODER is {visual_encoder!r}, expected 'finetune' or 'shared'"
            )
        if precision not in ("float32", "bfloat16"):
            raise ValueError(
                f"MODEL.VLNMS.PRECISION is {precision!r}, expected 'float32' or 'bfloat16'"
            )
        if masks not in MASKS:
            raise ValueError(
                f"MODEL.VLNMS.MASKS is {masks!r}, expected one of {', '.join(map(repr, MASKS))}"
            )
        self.visual_encoder = visual_encoder
        self.precision = precision
        self.freeze_detector = freeze_detector
        if freeze_detector:
            self.requires_grad_(False)
        self.vlnms = RelatednessBranch(
            self._own_copy() if visual_encoder == "finetune" else None,
            text_encoder,
            relatedness,
            self._own_copy() if visual_encoder == "finetune" and relatedness.refines else None,
            chunk_bytes,
        )
        self.postprocessor = postprocessor
        self.criterion = criterion
        self.score_thresh = score_thresh
        self.max_candidates = max_candidates
        self.output_attention = output_attention
        self.masks = masks

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]):
        ret = super().from_config(cfg, input_shape)
        vlnms = cfg.MODEL.VLNMS
        text_encoder = build_text_encoder(cfg, text_encoder_name(cfg))
        visual_encoder = visual_encoder_name(cfg)
        predictor = ret["box_predictors"][-1] if "box_predictors" in ret else ret["box_predictor"]
        visual_dim = predictor.cls_score.in_features
        if visual_encoder == "class":
            visual_dim = ret["num_classes"]
        ret.update(
            text_encoder=text_encoder,
            relatedness=build_relatedness(cfg, visual_dim, text_encoder.output_dim),
            postprocessor=build_postprocessor(cfg),
            criterion=Criterion(cfg),
            visual_encoder=visual_encoder,
            score_thresh=cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST,
            max_candidates=vlnms.MAX_CANDIDATES,
            freeze_detector=vlnms.FREEZE_DETECTOR,
            precision=vlnms.PRECISION,
            chunk_bytes=int(vlnms.CHUNK_MEMORY_MB * 2**20),
            output_attention=vlnms.OUTPUT_ATTENTION,
            masks=vlnms.MASKS,
        )
        return ret

    # --- what a subclass says ------------------------------------------------------------------

    @property
    def visual_encoder_source(self) -> str:
        """Name of the submodule that the visual encoder copies."""
        raise NotImplementedError

    @property
    def _last_predictor(self) -> FastRCNNOutputLayers:
        return self.box_predictor

    def _detect(self, features: Features, proposals: list[Instances]) -> Detections:
        """Run the detector's head on the proposals, no threshold and no NMS."""
        raise NotImplementedError

    def pool_boxes(self, features: Features, boxes: list[Boxes]) -> Tensor:
        """Pool boxes of all images: float [sum of N, C, height, width]."""
        maps = [features[f] for f in self.box_in_features]
        return pool_boxes(self.box_pooler, maps, boxes)

    def encode_pooled(self, encoder: nn.Module, pooled: Tensor) -> Tensor:
        """Run a copy of the visual encoder's source: float [N, D]."""
        return encoder(pooled).flatten(1)

    # --- forward -------------------------------------------------------------------------------

    def forward(self, images, features: Features, proposals: list[Instances], targets=None):
        """See `ROIHeads.forward`; queries arrive as `vlnms_d2.modeling.queries` describes."""
        batch = self.current_queries(len(proposals))
        if self.training:
            return self._forward_training(images, features, proposals, targets, batch)
        if batch.is_empty:
            return super().forward(images, features, proposals, targets)
        return self._forward_queries(features, proposals, batch), {}

    def _forward_queries(
        self, features: Features, proposals: list[Instances], batch: QueryBatch
    ) -> list[Instances]:
        """Inference on a batch of which at least one image has queries."""
        detections = self._detect(features, proposals)
        sizes = [p.image_size for p in proposals]
        asked = [i for i, queries in enumerate(batch.queries) if queries is not None]
        candidates = [self._select(detections, i, sizes[i]) for i in asked]
        self._pool(features, detections, candidates, asked)
        answers = self.answer(
            candidates, [sizes[i] for i in asked], [batch.queries[i] for i in asked]
        )
        others = [i for i in range(len(proposals)) if i not in asked]
        stock = stock_results(self._last_predictor, detections, sizes, others)
        results = dict(zip(others, stock, strict=True))
        for i, answer in zip(asked, answers, strict=True):
            results[i] = answer.distinct_instances(sizes[i])
        # Masks and keypoints: once per distinct box, whatever the number of queries.
        results = self.add_masks_and_keypoints(features, [results[i] for i in range(len(sizes))])
        for i, answer in zip(asked, answers, strict=True):
            results[i] = answer.per_query(results[i])
        return results

    @torch.no_grad()
    def detect(
        self, features: Features, proposals: list[Instances]
    ) -> tuple[list[Candidates], list[Instances]]:
        """All that does not depend on the queries: per image its candidates, pooled, and the
        stock detector's result, boxes only."""
        with self._detector_in_eval_mode():
            detections = self._detect(features, proposals)
        sizes = [p.image_size for p in proposals]
        everything = list(range(len(proposals)))
        candidates = [self._select(detections, i, sizes[i]) for i in everything]
        self._pool(features, detections, candidates, everything)
        return candidates, stock_results(self._last_predictor, detections, sizes, everything)

    def answer(
        self,
        candidates: list[Candidates],
        image_sizes: list[tuple[int, int]],
        queries: list[list[str]],
    ) -> list[QueryResult]:
        """All that depends on the queries: score, refine, fuse, NMS, cut.

        Args:
            candidates: per image, pooled.
            image_sizes: per image (height, width) in pixels of the network's input.
            queries: per image.
        """
        with self.own_precision():
            visual = self.encode_candidates(candidates)
            text = self.vlnms.encode_queries(queries)
        everything = zip(candidates, image_sizes, visual, text, strict=True)
        return [self.answer_image(*own) for own in everything]

    def answer_image(
        self,
        found: Candidates,
        image_size: tuple[int, int],
        visual: Tensor,
        text: TextFeatures,
    ) -> QueryResult:
        """`answer` for one image whose candidates and queries are encoded.

        Args:
            found: its N candidates.
            image_size: (height, width) in pixels of the network's input.
            visual: float [N, D], of `encode_candidates`.
            text: of its queries, by the branch's `encode_queries`.
        """
        locations = box_locations(found.boxes, image_size)
        with self.own_precision():
            relatedness, output = self.vlnms.score(visual, locations, text, self.output_attention)
        boxes = found.boxes
        if output.deltas is not None:
            box2box = self._last_predictor.box2box_transform
            boxes = refine_boxes(boxes, output.deltas, image_size, box2box)
        selection = self.postprocessor(boxes, found.scores, relatedness, found.classes)
        attention = output.attention if self.output_attention else None
        return QueryResult(found, boxes, relatedness, selection, attention, self.masks)

    # --- steps ---------------------------------------------------------------------------------

    def _select(self, detections: Detections, i: int, image_size: tuple[int, int]) -> Candidates:
        return select_candidates(
            detections.boxes[i],
            detections.scores[i],
            image_size,
            score_thresh=self.score_thresh,
            max_candidates=self.max_candidates,
        )

    def _pool(
        self,
        features: Features,
        detections: Detections,
        candidates: list[Candidates],
        asked: list[int],
    ) -> None:
        """Give the candidates of the asked images what the visual encoder takes, in place."""
        if self.visual_encoder == "class":
            for found in candidates:
                found.pooled = F.one_hot(found.classes, self.num_classes).to(found.scores.dtype)
            return
        if self.visual_encoder == "shared":
            for i, found in zip(asked, candidates, strict=True):
                found.pooled = detections.features[i][found.proposal_index]
            return
        boxes = [Boxes(next(iter(features.values())).new_zeros(0, 4)) for _ in detections.boxes]
        for i, found in zip(asked, candidates, strict=True):
            boxes[i] = Boxes(found.boxes)
        pooled = self.pool_boxes(features, boxes).split([len(found) for found in candidates])
        for found, own in zip(candidates, pooled, strict=True):
            found.pooled = own

    def encode_candidates(self, candidates: list[Candidates]) -> list[Tensor]:
        """Per image float [N, D], the visual features of its candidates; [N, 2 * D] where the box
        refinement has its own."""
        if self.vlnms.visual_encoder is None:
            return [found.pooled for found in candidates]
        if not candidates:
            return []
        pooled = candidates[0].pooled
        if len(candidates) > 1:
            pooled = torch.cat([found.pooled for found in candidates])
        encoded = self.encode_pooled(self.vlnms.visual_encoder, pooled)
        if self.vlnms.refinement_encoder is not None:
            refinement = self.encode_pooled(self.vlnms.refinement_encoder, pooled)
            encoded = torch.cat([encoded, refinement], dim=1)
        return list(encoded.split([len(found) for found in candidates]))

    def add_masks_and_keypoints(
        self, features: Features, results: list[Instances]
    ) -> list[Instances]:
        """`forward_with_given_boxes`, at most `BOXES_AT_ONCE` boxes of an image at a time."""
        if not (self.mask_on or getattr(self, "keypoint_on", False)):
            return results
        most = max(len(own) for own in results)
        starts = [i * BOXES_AT_ONCE for i in range(max(1, math.ceil(most / BOXES_AT_ONCE)))]
        parts = [
            self.forward_with_given_boxes(
                features, [own[start : start + BOXES_AT_ONCE] for own in results]
            )
            for start in starts
        ]
        return [Instances.cat(list(own)) for own in zip(*parts, strict=True)]

    def _own_copy(self) -> nn.Module:
        """A copy of the visual encoder's source that learns."""
        return copy.deepcopy(self.get_submodule(self.visual_encoder_source)).requires_grad_(True)

    def own_precision(self) -> torch.autocast:
        """A context in which the branch's layers compute as `MODEL.VLNMS.PRECISION` says."""
        device = next(self.parameters()).device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.precision == "bfloat16")
