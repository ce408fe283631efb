"""The mixin that makes a Detectron2 ROI head query-conditioned."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers, fast_rcnn_inference
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image

from .assembly import QueryResult
from .branch import RelatednessBranch
from .candidates import Candidates, select_candidates
from .criterion import Criterion
from .detections import Detections
from .postprocessing import build_postprocessor
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

    A subclass names the part of the detector that the visual encoder copies
    (`visual_encoder_source`), says how it detects (`_detect`) and, where it has no box pooler,
    how boxes are pooled (`_pool_boxes`) and encoded (`_encode_pooled`).

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

    def _pool_boxes(self, features: Features, boxes: list[Boxes]) -> Tensor:
        """Pool boxes of all images: float [sum of N, C, height, width]."""
        return self.box_pooler([features[f] for f in self.box_in_features], boxes)

    def _encode_pooled(self, encoder: nn.Module, pooled: Tensor) -> Tensor:
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
        results = self._stock_results(detections, sizes, skip=asked)
        for i, answer in zip(asked, answers, strict=True):
            results[i] = answer.distinct_instances(sizes[i])
        # Masks and keypoints: once per distinct box, whatever the number of queries.
        results = self.forward_with_given_boxes(features, results)
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
        return candidates, self._stock_results(detections, sizes, skip=[])

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
        with self._own_precision():
            visual = self._encode(candidates)
            text = self.vlnms.encode_queries(queries)
        everything = zip(candidates, image_sizes, visual, text, strict=True)
        return [self._answer_image(*own) for own in everything]

    def _answer_image(
        self,
        found: Candidates,
        image_size: tuple[int, int],
        visual: Tensor,
        text: TextFeatures,
    ) -> QueryResult:
        locations = box_locations(found.boxes, image_size)
        with self._own_precision():
            relatedness, output = self.vlnms.score(visual, locations, text, self.output_attention)
        boxes = found.boxes
        if output.deltas is not None:
            boxes = self._refine(boxes, output.deltas, image_size)
        selection = self.postprocessor(boxes, found.scores, relatedness, found.classes)
        attention = output.attention if self.output_attention else None
        return QueryResult(found, boxes, relatedness, selection, attention)

    def _forward_training(self, images, features, proposals, targets, batch):
        self.check_trainable(batch)
        losses = {}
        if not self.freeze_detector:
            _, losses = super().forward(images, features, proposals, targets)
        if any(batch.queries):
            with torch.no_grad(), self._detector_in_eval_mode():
                detections = self._detect(features, proposals)
            asked = [i for i, queries in enumerate(batch.queries) if queries]
            candidates = [self._select(detections, i, proposals[i].image_size) for i in asked]
            pool = partial(self._pool, features, detections, asked=asked)
            sizes = [proposals[i].image_size for i in asked]
            losses.update(self.query_losses(candidates, sizes, batch, pool))
        return proposals, losses

    def check_trainable(self, batch: QueryBatch) -> None:
        """Refuse a training batch that has nothing to learn from, or queries without targets.

        Raises:
            ValueError: saying what is missing.
        """
        # An image with an empty list of queries has nothing to learn from either.
        if self.freeze_detector and not any(batch.queries):
            raise ValueError(
                "MODEL.VLNMS.FREEZE_DETECTOR is True and no image of the batch has a query: there "
                'is nothing to train. Give batched_inputs[i]["query"] and ["query_targets"] '
                "(vlnms_d2.data does), or set FREEZE_DETECTOR to False to train the detector."
            )
        for i, (queries, targets) in enumerate(zip(batch.queries, batch.targets, strict=True)):
            if queries and targets is None:
                raise ValueError(
                    f'batched_inputs[{i}] has queries but no "query_targets"; training needs one '
                    "Instances with gt_boxes per query"
                )

    def query_losses(
        self,
        candidates: list[Candidates],
        image_sizes: list[tuple[int, int]],
        batch: QueryBatch,
        pool: Callable[[list[Candidates]], None] | None = None,
    ) -> dict[str, Tensor]:
        """The losses of the images that have queries; see `Criterion.losses`.

        Args:
            candidates, image_sizes: of those images.
            batch: queries and targets of all images.
            pool: gives candidates what is pooled for them, in place, after those that take part
                have been drawn; None where they have it.
        """
        asked = [i for i, queries in enumerate(batch.queries) if queries]
        drawn = [
            self.criterion.draw(found, batch.targets[i], self.vlnms.relatedness.compares_boxes)
            for i, found in zip(asked, candidates, strict=True)
        ]
        candidates = [own.candidates for own in drawn]
        if pool is not None:
            pool(candidates)
        with self._own_precision():
            visual = self._encode(candidates)
            text = self.vlnms.encode_queries([batch.queries[i] for i in asked])
            outputs = [
                self.vlnms.relatedness(box_features, box_locations(found.boxes, size), own)
                for box_features, found, size, own in zip(
                    visual, candidates, image_sizes, text, strict=True
                )
            ]
        return self.criterion.losses(outputs, drawn, self._last_predictor.box2box_transform)

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
        pooled = self._pool_boxes(features, boxes).split([len(found) for found in candidates])
        for found, own in zip(candidates, pooled, strict=True):
            found.pooled = own

    def _encode(self, candidates: list[Candidates]) -> list[Tensor]:
        """Per image float [N, D], the visual features of its candidates; [N, 2 * D] where the box
        refinement has its own."""
        if self.vlnms.visual_encoder is None:
            return [found.pooled for found in candidates]
        if not candidates:
            return []
        pooled = torch.cat([found.pooled for found in candidates])
        encoded = self._encode_pooled(self.vlnms.visual_encoder, pooled)
        if self.vlnms.refinement_encoder is not None:
            refinement = self._encode_pooled(self.vlnms.refinement_encoder, pooled)
            encoded = torch.cat([encoded, refinement], dim=1)
        return list(encoded.split([len(found) for found in candidates]))

    def _own_copy(self) -> nn.Module:
        """A copy of the visual encoder's source that learns."""
        return copy.deepcopy(self.get_submodule(self.visual_encoder_source)).requires_grad_(True)

    def _own_precision(self) -> torch.autocast:
        device = next(self.parameters()).device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.precision == "bfloat16")

    def _refine(self, boxes: Tensor, deltas: Tensor, image_size: tuple[int, int]) -> Tensor:
        """The boxes [N, 4] of each query after its refinement [Q, N, 4]: float [Q, N, 4].

        A refinement of zeros leaves a box as it is, to the bit, and so does one that would move
        all of it out of the image: Detectron2 drops empty boxes, and the query may have no other.
        """
        box2box = self._last_predictor.box2box_transform
        # Detectron2's transform takes several deltas per box side by side: [N, Q * 4].
        refined = box2box.apply_deltas(deltas.transpose(0, 1).flatten(1), boxes)
        refined = refined.unflatten(1, (len(deltas), 4)).transpose(0, 1)
        refined = clip_boxes_to_image(refined, image_size)
        some_area = (refined[..., 2:] > refined[..., :2]).all(dim=-1)
        applies = some_area & deltas.any(dim=-1)
        return torch.where(applies[..., None], refined, boxes)

    def _stock_results(
        self, detections: Detections, image_sizes: list[tuple[int, int]], skip: list[int]
    ) -> list[Instances | None]:
        """The detector's own result per image, None for those in `skip`."""
        predictor = self._last_predictor
        results: list[Instances | None] = [None] * len(image_sizes)
        rest = [i for i in range(len(image_sizes)) if i not in skip]
        stock, _ = fast_rcnn_inference(
            [detections.boxes[i] for i in rest],
            [detections.scores[i] for i in rest],
            [image_sizes[i] for i in rest],
            predictor.test_score_thresh,
            predictor.test_nms_thresh,
            predictor.test_topk_per_image,
        )
        for i, result in zip(rest, stock, strict=True):
            results[i] = result
        return results

    @contextmanager
    def _detector_in_eval_mode(self) -> Iterator[None]:
        """The head itself in eval mode: CascadeROIHeads asks `self.training` between stages."""
        was_training, self.training = self.training, False
        try:
            yield
        finally:
            self.training = was_training

    def train(self, mode: bool = True):
        super().train(mode)
        if self.freeze_detector:
            for child in self.children():
                if child is not self.vlnms:
                    child.eval()
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        """Start the encoders from the detector's head unless the checkpoint has its own."""
        for name in ("visual_encoder", "refinement_encoder"):
            own = f"{prefix}vlnms.{name}."
            if getattr(self.vlnms, name) is None or any(k.startswith(own) for k in state_dict):
                continue
            source = f"{prefix}{self.visual_encoder_source}."
            for key in [k for k in state_dict if k.startswith(source)]:
                state_dict[own + key[len(source) :]] = state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
