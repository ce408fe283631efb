"""Query-conditioned ROI heads: Detectron2's heads plus the relatedness branch.

`VLNMSHead`, `VLNMSRes5Head` and `VLNMSCascadeHead` replace `StandardROIHeads`, `Res5ROIHeads` and
`CascadeROIHeads`. Without a query their output is bit-identical. With one, the stock head predicts
boxes and class scores for the proposals, predictions above delta become candidates, the branch
scores every candidate against every query, and the postprocessor runs NMS on the fused score.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import (
    ROI_HEADS_REGISTRY,
    CascadeROIHeads,
    Res5ROIHeads,
    StandardROIHeads,
)
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image

from ..config import check_choice, check_config
from .branch import RelatednessBranch, refine_boxes
from .candidates import (
    Candidates,
    Predictions,
    WaitFreePooler,
    apply_box_predictor,
    pool_boxes,
    select_candidates,
    stock_results,
)
from .losses import Criterion
from .masks import forward_in_chunks
from .postprocessing import MASKS, QueryResult, build_postprocessor
from .queries import QueryBatch, TakesQueries
from .relatedness import (
    Relatedness,
    box_locations,
    build_relatedness,
    text_encoder_name,
    visual_encoder_name,
)
from .text import TextEncoder, TextFeatures, build_text_encoder

Features = dict[str, Tensor]


class QueryConditionedMixin(TakesQueries):
    """Adds text, relatedness and fused-score NMS to a Detectron2 ROI head.

    Args (besides those of the stock head):
        text_encoder: maps strings to word features.
        relatedness: maps box and word features to logits.
        postprocessor: fusion, NMS and final cut; see `VLNMSPostprocessor`.
        criterion: samples candidates in training and computes the losses.
        visual_encoder: "finetune" or "shared", see `MODEL.VLNMS.VISUAL_ENCODER`; or "class" or
            "cues", for relatedness modules with features of their own (`Relatedness.describe`).
        score_thresh: delta, the minimum class confidence of a candidate.
        max_candidates: the maximum number of candidates per image.
        freeze_detector: train only the branch.
        precision, chunk_bytes: see `RelatednessBranch`.
        output_attention: add the word attention to the output.
        masks: type of `pred_masks` where there are queries; see `MODEL.VLNMS.MASKS`.
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
        check_choice("VISUAL_ENCODER", visual_encoder, ("finetune", "shared", "class", "cues"))
        check_choice("MASKS", masks, MASKS)
        self.visual_encoder = visual_encoder
        self.freeze_detector = freeze_detector
        if freeze_detector:
            self.requires_grad_(False)
        finetune = visual_encoder == "finetune"
        self.vlnms = RelatednessBranch(
            self._trainable_copy() if finetune else None,
            text_encoder,
            relatedness,
            self._trainable_copy() if finetune and relatedness.refines else None,
            chunk_bytes=chunk_bytes,
            precision=precision,
        )
        self.postprocessor = postprocessor
        self.criterion = criterion
        self.score_thresh = score_thresh
        self.max_candidates = max_candidates
        self.output_attention, self.masks = output_attention, masks

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]):
        check_config(cfg)
        try:
            ret = super().from_config(cfg, input_shape)
        except (AssertionError, KeyError) as error:
            raise ValueError(
                f"MODEL.ROI_HEADS.NAME {cls.__name__} does not fit ({error!r}): use "
                "VLNMSRes5Head for C4, VLNMSCascadeHead for Cascade R-CNN, VLNMSHead for the others"
            ) from error
        vlnms = cfg.MODEL.VLNMS
        text_encoder = build_text_encoder(cfg, text_encoder_name(cfg))
        visual_encoder = visual_encoder_name(cfg)
        predictor = ret["box_predictors"][-1] if "box_predictors" in ret else ret["box_predictor"]
        by_class = visual_encoder in ("class", "cues")
        visual_dim = ret["num_classes"] if by_class else predictor.cls_score.in_features
        WaitFreePooler.replace(ret.get("mask_pooler", ret.get("pooler")))  # that of the mask head
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

    @property
    def visual_encoder_source(self) -> str:
        """Name of the stock submodule that the visual encoder is a copy of."""
        raise NotImplementedError

    @property
    def last_predictor(self) -> FastRCNNOutputLayers:
        """The box predictor whose boxes and box parameterisation are used."""
        return self.box_predictor

    def predict(self, features: Features, proposals: list[Instances]) -> Predictions:
        """Run the stock head on the proposals, without threshold and NMS."""
        raise NotImplementedError

    def pool_boxes(self, features: Features, boxes: list[Boxes]) -> Tensor:
        """Pool the boxes of all images: float [sum of N, C, height, width]."""
        maps = [features[f] for f in self.box_in_features]
        return pool_boxes(self.box_pooler, maps, boxes)

    def encode_pooled(self, encoder: nn.Module, pooled: Tensor) -> Tensor:
        """Apply an encoder, a copy of `visual_encoder_source`, to pooled boxes: float [N, D]."""
        return encoder(pooled).flatten(1)

    # --- inference ----------------------------------------------------------------------------

    def forward(self, images, features: Features, proposals: list[Instances], targets=None):
        """See `ROIHeads.forward`; `vlnms_d2.modeling.queries` explains where queries come from."""
        batch = self.current_queries(len(proposals))
        if self.training:
            return self._forward_training(images, features, proposals, targets, batch)
        if batch.is_empty:
            return super().forward(images, features, proposals, targets)

        # Images with queries go through the branch, the others get the stock result.
        predictions = self.predict(features, proposals)
        sizes = [p.image_size for p in proposals]
        queried = [i for i, queries in enumerate(batch.queries) if queries is not None]
        unqueried = [i for i in range(len(proposals)) if i not in queried]
        stock_instances = stock_results(self.last_predictor, predictions, sizes, unqueried)
        instances = dict(zip(unqueried, stock_instances, strict=True))  # image index -> Instances
        candidates = self._select(predictions, sizes, queried)
        self._pool(features, predictions, queried, candidates, images)
        query_results = self.score_queries(
            candidates, [sizes[i] for i in queried], [batch.queries[i] for i in queried]
        )
        for i, result in zip(queried, query_results, strict=True):
            instances[i] = result.distinct_instances(sizes[i])
        # Before the boxes are repeated for each query that keeps them: one mask per distinct box.
        results = self.add_masks_and_keypoints(features, [instances[i] for i in range(len(sizes))])
        for i, result in zip(queried, query_results, strict=True):
            results[i] = result.per_query(results[i])
        return results, {}

    def _select(
        self, predictions: Predictions, image_sizes: list[tuple[int, int]], indices: list[int]
    ) -> list[Candidates]:
        """The candidates of the images at `indices`, not yet pooled."""
        select = partial(
            select_candidates,
            score_thresh=self.score_thresh,
            max_candidates=self.max_candidates,
            min_candidates=self.criterion.min_candidates if self.training else 1,
        )
        return [
            select(predictions.boxes[i], predictions.scores[i], image_sizes[i]) for i in indices
        ]

    def _pool(
        self,
        features: Features,
        predictions: Predictions,
        indices: list[int],
        candidates: list[Candidates],
        images: ImageList | None = None,
    ) -> None:
        """Set `pooled` of the candidates of the images at `indices`, in place."""
        if self.visual_encoder in ("class", "cues"):
            for i, c in zip(indices, candidates, strict=True):
                image = images[i] if images is not None else None
                c.pooled = self.vlnms.relatedness.describe(c, self.num_classes, image)
            return
        if self.visual_encoder == "shared":
            for i, c in zip(indices, candidates, strict=True):
                c.pooled = predictions.features[i][c.proposal_index]  # [N, D]
            return
        boxes = [Boxes(b[:0, :4]) for b in predictions.boxes]  # poolers expect every image's
        for i, c in zip(indices, candidates, strict=True):
            boxes[i] = Boxes(c.boxes)
        pooled = self.pool_boxes(features, boxes).split([len(c) for c in candidates])
        for c, pooled_boxes in zip(candidates, pooled, strict=True):
            c.pooled = pooled_boxes  # [N, C, height, width]

    def score_queries(
        self,
        candidates: list[Candidates],
        image_sizes: list[tuple[int, int]],
        queries: list[list[str]],
    ) -> list[QueryResult]:
        """Everything that depends on the queries: encode, score, refine, fuse, NMS, final cut.

        Per image: pooled candidates, (height, width) of the network's input in pixels, queries.
        """
        with self.vlnms.autocast():
            visual = self.encode_candidates(candidates)
            text = self.vlnms.encode_queries(queries)
        images = zip(candidates, image_sizes, visual, text, strict=True)
        return [self.score_image(*image) for image in images]

    def score_image(
        self,
        candidates: Candidates,
        image_size: tuple[int, int],
        visual: Tensor,
        text: TextFeatures,
    ) -> QueryResult:
        """`score_queries` for one image whose candidates and queries are already encoded.

        Args:
            candidates: the N candidates; `pooled` is not used.
            image_size: (height, width) of the network's input in pixels.
            visual: float [N, D], from `encode_candidates`.
            text: the Q encoded queries.
        """
        locations = box_locations(candidates.boxes, image_size)  # [N, 5]
        with self.vlnms.autocast():
            relatedness, output = self.vlnms.score(visual, locations, text, self.output_attention)
        boxes = candidates.boxes  # [N, 4]
        if output.deltas is not None:
            box2box = self.last_predictor.box2box_transform
            boxes = refine_boxes(boxes, output.deltas, image_size, box2box)  # [Q, N, 4]
        selection = self.postprocessor(boxes, candidates.scores, relatedness, candidates.classes)
        attention = output.attention if self.output_attention else None
        return QueryResult(candidates, boxes, relatedness, selection, attention, self.masks)

    def encode_candidates(self, candidates: list[Candidates]) -> list[Tensor]:
        """The visual features of each image's candidates: float [N, D], or [N, 2 * D] if the box
        refinement has separate features; see `RelatednessBranch.encode_boxes`."""
        return self.vlnms.encode_boxes([c.pooled for c in candidates], self.encode_pooled)

    def add_masks_and_keypoints(
        self, features: Features, results: list[Instances]
    ) -> list[Instances]:
        """`forward_with_given_boxes` in chunks of boxes, which bounds memory."""
        if not (self.mask_on or getattr(self, "keypoint_on", False)):
            return results
        return forward_in_chunks(partial(self.forward_with_given_boxes, features), results)

    @torch.no_grad()
    def detect(
        self, features: Features, proposals: list[Instances], images: ImageList | None = None
    ) -> tuple[list[Candidates], list[Instances]]:
        """Everything that does not depend on the queries: per image its pooled candidates, and
        the stock result without masks and keypoints."""
        predictions = self.predict(features, proposals)
        sizes = [p.image_size for p in proposals]
        indices = list(range(len(proposals)))
        candidates = self._select(predictions, sizes, indices)
        self._pool(features, predictions, indices, candidates, images)
        return candidates, stock_results(self.last_predictor, predictions, sizes, indices)

    # --- training -----------------------------------------------------------------------------

    def _forward_training(self, images, features, proposals, targets, batch: QueryBatch):
        batch.check_for_training(self.freeze_detector)
        losses = {}
        if not self.freeze_detector:
            _, losses = super().forward(images, features, proposals, targets)
        if any(batch.queries):
            with torch.no_grad():
                predictions = self.predict(features, proposals)
            queried = [i for i, queries in enumerate(batch.queries) if queries]
            sizes = [p.image_size for p in proposals]
            candidates = self._select(predictions, sizes, queried)
            # Pooling waits for the sampling, since only sampled candidates need it.
            pool = partial(self._pool, features, predictions, queried, images=images)
            losses.update(self.query_losses(candidates, [sizes[i] for i in queried], batch, pool))
        return proposals, self.criterion.completed(losses, self.vlnms)

    def query_losses(
        self,
        candidates: list[Candidates],
        image_sizes: list[tuple[int, int]],
        batch: QueryBatch,
        pool: Callable[[list[Candidates]], None] | None = None,
    ) -> dict[str, Tensor]:
        """The losses of the images that have queries; see `Criterion.losses`.

        Args:
            candidates, image_sizes: of these images.
            batch: queries and targets of all images.
            pool: pools the sampled candidates in place; None if all are pooled already.
        """
        queried = [i for i, queries in enumerate(batch.queries) if queries]
        samples = [
            self.criterion.sample(c, batch.targets[i], self.vlnms.relatedness.compares_boxes)
            for i, c in zip(queried, candidates, strict=True)
        ]
        candidates = [sample.candidates for sample in samples]
        if pool is not None:
            pool(candidates)
        with self.vlnms.autocast():
            visual = self.encode_candidates(candidates)
            text = self.vlnms.encode_queries([batch.queries[i] for i in queried])
            outputs = [
                self.vlnms.relatedness(box_features, box_locations(c.boxes, size), queries)
                for box_features, c, size, queries in zip(
                    visual, candidates, image_sizes, text, strict=True
                )
            ]
        return self.criterion.losses(outputs, samples, self.last_predictor.box2box_transform)

    def train(self, mode: bool = True):
        """See `nn.Module.train`; a frozen detector stays in eval mode."""
        super().train(mode)
        if self.freeze_detector:
            for child in self.children():
                if child is not self.vlnms:
                    child.eval()
        return self

    # --- weights ------------------------------------------------------------------------------

    def _trainable_copy(self) -> nn.Module:
        """A copy of `visual_encoder_source` whose parameters require gradients."""
        return copy.deepcopy(self.get_submodule(self.visual_encoder_source)).requires_grad_(True)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        """Initialise the copies from the detector's head unless the checkpoint has their own."""
        for name in ("visual_encoder", "refinement_encoder"):
            target = f"{prefix}vlnms.{name}."
            if getattr(self.vlnms, name) is None or any(k.startswith(target) for k in state_dict):
                continue
            source = f"{prefix}{self.visual_encoder_source}."
            for key in [k for k in state_dict if k.startswith(source)]:
                state_dict[target + key[len(source) :]] = state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


@ROI_HEADS_REGISTRY.register()
class VLNMSHead(QueryConditionedMixin, StandardROIHeads):
    """`StandardROIHeads` (FPN, C5) with a query."""

    @property
    def visual_encoder_source(self) -> str:
        return "box_head"

    def predict(self, features: Features, proposals: list[Instances]) -> Predictions:
        pooled = self.box_pooler(
            [features[f] for f in self.box_in_features], [p.proposal_boxes for p in proposals]
        )
        return apply_box_predictor(self.box_predictor, self.box_head(pooled), proposals)


@ROI_HEADS_REGISTRY.register()
class VLNMSRes5Head(QueryConditionedMixin, Res5ROIHeads):
    """`Res5ROIHeads` (C4) with a query."""

    @property
    def visual_encoder_source(self) -> str:
        return "res5"

    def predict(self, features: Features, proposals: list[Instances]) -> Predictions:
        box_features = self._shared_roi_transform(
            [features[f] for f in self.in_features], [p.proposal_boxes for p in proposals]
        )
        return apply_box_predictor(self.box_predictor, box_features.mean(dim=[2, 3]), proposals)

    def pool_boxes(self, features: Features, boxes: list[Boxes]) -> Tensor:
        return pool_boxes(self.pooler, [features[f] for f in self.in_features], boxes)

    def encode_pooled(self, encoder: nn.Module, pooled: Tensor) -> Tensor:
        return encoder(pooled).mean(dim=[2, 3])


@ROI_HEADS_REGISTRY.register()
class VLNMSCascadeHead(QueryConditionedMixin, CascadeROIHeads):
    """`CascadeROIHeads` with a query: mean scores of all stages, boxes of the last stage."""

    @property
    def visual_encoder_source(self) -> str:
        return f"box_head.{self.num_cascade_stages - 1}"

    @property
    def last_predictor(self) -> FastRCNNOutputLayers:
        return self.box_predictor[-1]

    def predict(self, features: Features, proposals: list[Instances]) -> Predictions:
        pyramid = [features[f] for f in self.box_in_features]
        image_sizes = [p.image_size for p in proposals]
        stages: list[Predictions] = []
        for head, predictor in zip(self.box_head, self.box_predictor, strict=True):
            if stages:  # not `_create_proposals_from_boxes`: it drops empty boxes in training
                proposals = [
                    Instances(size, proposal_boxes=Boxes(clip_boxes_to_image(boxes, size)))
                    for boxes, size in zip(stages[-1].boxes, image_sizes, strict=True)
                ]
            pooled = self.box_pooler(pyramid, [p.proposal_boxes for p in proposals])
            stages.append(apply_box_predictor(predictor, head(pooled), proposals))
        # Written as in the stock head, so that scores are bit-identical to its scores.
        scores = [
            sum(list(per_image)) * (1.0 / self.num_cascade_stages)
            for per_image in zip(*(stage.scores for stage in stages), strict=True)  # [R, K + 1]
        ]
        return Predictions(stages[-1].boxes, scores, stages[-1].features)
