"""The mixin that makes a Detectron2 ROI head query-conditioned."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers, fast_rcnn_inference
from detectron2.structures import Boxes, Instances
from torch import Tensor

from .assembly import QueryResult
from .branch import RelatednessBranch
from .candidates import Candidates, select_candidates
from .detections import Detections
from .losses import label_candidates, relatedness_bce, sample_candidates
from .postprocessing import build_postprocessor
from .queries import QueryBatch, TakesQueries
from .relatedness import Relatedness, build_relatedness
from .text import TextEncoder, build_text_encoder

Features = dict[str, Tensor]


class QueryConditionedMixin(TakesQueries):
    """Adds text, relatedness and fused-score NMS to a Detectron2 ROI head.

    A subclass names the part of the detector that the visual encoder copies
    (`visual_encoder_source`), says how it detects (`_detect`) and, where it has no box pooler,
    how boxes are encoded (`_encode_boxes`).

    Args (besides those of the head it is mixed into):
        text_encoder: from strings to word features.
        relatedness: from box and word features to logits.
        postprocessor: fusion, NMS and final cut; see `VLNMSPostprocessor`.
        visual_encoder: "finetune" or "shared".
        score_thresh: delta of the candidates.
        max_candidates: most candidates an image.
        freeze_detector: train the branch only.
        batch_size_per_query: candidates drawn for the loss per query.
        query_positive_fraction: largest share of positives among them.
        foreground_iou: a candidate is positive above this IoU with a foreground box.
        output_attention: add the word attention to the output.
    """

    @configurable
    def __init__(
        self,
        *,
        text_encoder: TextEncoder,
        relatedness: Relatedness,
        postprocessor,
        visual_encoder: str = "finetune",
        score_thresh: float = 0.05,
        max_candidates: int = 1000,
        freeze_detector: bool = True,
        batch_size_per_query: int = 32,
        query_positive_fraction: float = 0.5,
        foreground_iou: float = 0.5,
        output_attention: bool = False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if visual_encoder not in ("finetune", "shared"):
            raise ValueError(
                f"MODEL.VLNMS.VISUAL_ENCODER is {visual_encoder!r}, expected 'finetune' or 'shared'"
            )
        self.freeze_detector = freeze_detector
        if freeze_detector:
            self.requires_grad_(False)
        own_copy = None
        if visual_encoder == "finetune":
            own_copy = copy.deepcopy(self.get_submodule(self.visual_encoder_source))
            own_copy.requires_grad_(True)
        self.vlnms = RelatednessBranch(own_copy, text_encoder, relatedness)
        self.postprocessor = postprocessor
        self.score_thresh = score_thresh
        self.max_candidates = max_candidates
        self.batch_size_per_query = batch_size_per_query
        self.query_positive_fraction = query_positive_fraction
        self.foreground_iou = foreground_iou
        self.output_attention = output_attention

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]):
        ret = super().from_config(cfg, input_shape)
        vlnms = cfg.MODEL.VLNMS
        if vlnms.LOSS != "bce":
            raise ValueError(f"MODEL.VLNMS.LOSS is {vlnms.LOSS!r}, expected 'bce'")
        text_encoder = build_text_encoder(cfg)
        predictor = ret["box_predictors"][-1] if "box_predictors" in ret else ret["box_predictor"]
        ret.update(
            text_encoder=text_encoder,
            relatedness=build_relatedness(
                cfg, predictor.cls_score.in_features, text_encoder.output_dim
            ),
            postprocessor=build_postprocessor(cfg),
            visual_encoder=vlnms.VISUAL_ENCODER,
            score_thresh=cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST,
            max_candidates=vlnms.MAX_CANDIDATES,
            freeze_detector=vlnms.FREEZE_DETECTOR,
            batch_size_per_query=vlnms.BATCH_SIZE_PER_QUERY,
            query_positive_fraction=vlnms.POSITIVE_FRACTION,
            foreground_iou=vlnms.IOU_THRESHOLD,
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

    def _encode_boxes(self, features: Features, boxes: list[Boxes]) -> Tensor:
        """Pool boxes of all images and run the visual encoder: float [sum of N, D]."""
        pooled = self.box_pooler([features[f] for f in self.box_in_features], boxes)
        return self.vlnms.visual_encoder(pooled).flatten(1)

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
        visual = self._visual_features(features, detections, candidates, asked)
        text = self.vlnms.encode_queries([batch.queries[i] for i in asked])

        results = self._stock_results(detections, sizes, skip=asked)
        query_results = []
        for i, found, box_features, queries in zip(asked, candidates, visual, text, strict=True):
            relatedness, output = self.vlnms.score(box_features, queries)
            selection = self.postprocessor(found.boxes, found.scores, relatedness, found.classes)
            query_result = QueryResult(found, relatedness, selection, output)
            query_results.append(query_result)
            results[i] = query_result.distinct_instances(sizes[i])
        # Masks and keypoints: once per distinct box, whatever the number of queries.
        results = self.forward_with_given_boxes(features, results)
        for i, query_result in zip(asked, query_results, strict=True):
            results[i] = query_result.per_query(results[i], self.output_attention)
        return results

    def _forward_training(self, images, features, proposals, targets, batch):
        # An image with an empty list of queries has nothing to learn from either.
        asks = any(batch.queries)
        if self.freeze_detector and not asks:
            raise ValueError(
                "MODEL.VLNMS.FREEZE_DETECTOR is True and no image of the batch has a query: there "
                'is nothing to train. Give batched_inputs[i]["query"] and ["query_targets"] '
                "(vlnms_d2.data does), or set FREEZE_DETECTOR to False to train the detector."
            )
        losses = {}
        if not self.freeze_detector:
            _, losses = super().forward(images, features, proposals, targets)
        if asks:
            losses["loss_relatedness"] = self._relatedness_loss(features, proposals, batch)
        return proposals, losses

    def _relatedness_loss(
        self, features: Features, proposals: list[Instances], batch: QueryBatch
    ) -> Tensor:
        """The mean loss over the images that have queries."""
        with torch.no_grad(), self._detector_in_eval_mode():
            detections = self._detect(features, proposals)
        asked, candidates, labels, drawn = [], [], [], []
        for i, (queries, targets) in enumerate(zip(batch.queries, batch.targets, strict=True)):
            if not queries:
                continue
            if targets is None:
                raise ValueError(
                    f'batched_inputs[{i}] has queries but no "query_targets"; training needs one '
                    "Instances with gt_boxes per query"
                )
            found = self._select(detections, i, proposals[i].image_size)
            foreground = [t.gt_boxes.tensor.to(found.boxes.device) for t in targets]
            label = label_candidates(found.boxes, foreground, self.foreground_iou)
            chosen = sample_candidates(
                label, self.batch_size_per_query, self.query_positive_fraction
            )
            # Only boxes drawn for some query are pooled.
            used = chosen.any(dim=0)
            asked.append(i)
            candidates.append(found[used])
            labels.append(label[:, used])
            drawn.append(chosen[:, used])
        visual = self._visual_features(features, detections, candidates, asked)
        text = self.vlnms.encode_queries([batch.queries[i] for i in asked])
        losses = [
            relatedness_bce(self.vlnms.relatedness(box_features, queries).logits, label, chosen)
            for box_features, queries, label, chosen in zip(
                visual, text, labels, drawn, strict=True
            )
        ]
        return torch.stack(losses).mean()

    # --- steps ---------------------------------------------------------------------------------

    def _select(self, detections: Detections, i: int, image_size: tuple[int, int]) -> Candidates:
        return select_candidates(
            detections.boxes[i],
            detections.scores[i],
            image_size,
            score_thresh=self.score_thresh,
            max_candidates=self.max_candidates,
        )

    def _visual_features(
        self,
        features: Features,
        detections: Detections,
        candidates: list[Candidates],
        asked: list[int],
    ) -> list[Tensor]:
        """Per asked image float [N, D], the visual features of its candidates."""
        if self.vlnms.visual_encoder is None:
            return [
                detections.features[i][c.proposal_index]
                for i, c in zip(asked, candidates, strict=True)
            ]
        boxes = [Boxes(next(iter(features.values())).new_zeros(0, 4)) for _ in detections.boxes]
        for i, found in zip(asked, candidates, strict=True):
            boxes[i] = Boxes(found.boxes)
        encoded = self._encode_boxes(features, boxes)
        return list(encoded.split([len(found) for found in candidates]))

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
        """Start the visual encoder from the detector's head unless the checkpoint has its own."""
        own = f"{prefix}vlnms.visual_encoder."
        if self.vlnms.visual_encoder is not None and not any(k.startswith(own) for k in state_dict):
            source = f"{prefix}{self.visual_encoder_source}."
            for key in [k for k in state_dict if k.startswith(source)]:
                state_dict[own + key[len(source) :]] = state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
