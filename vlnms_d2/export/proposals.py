"""The proposals of a model for all queries of an image, with what the formats need."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import Instances
from pycocotools import mask as mask_util

from ..engine.predictor import VLNMSPredictor
from ..modeling.feature_extraction import (
    ImageFeatures,
    box_features,
    check_model,
    extract_features,
    to_output_size,
)
from ..modeling.postprocessing import QueryResult
from .base import npz_bytes

_MASK_CHUNK = 32  # masks of the size of the image that are in memory together


@dataclass(frozen=True)
class ImageProposals:
    """The M proposals of the Q queries of an image: one query after the other, each in descending
    score order.

    Attributes:
        image_size: int64 [2], height and width in pixels.
        counts: int64 [Q], number of proposals of each query.
        corners: float32 [M, 4], xyxy in pixels of the image.
        classes, candidate_index: int64 [M].
        scores, cls_scores, relatedness: float32 [M], s, c and r.
        features: float32 [U, D], of each candidate that any query keeps; [0, 0] without features.
        feature_of: int64 [M], row in `features`.
        masks: uint8, the bytes of V masks in compressed RLE.
        mask_ends: int64 [V], where each mask ends in `masks`.
        mask_of: int64 [M], index of the mask; empty without masks.
    """

    image_size: np.ndarray
    counts: np.ndarray
    corners: np.ndarray
    classes: np.ndarray
    candidate_index: np.ndarray
    scores: np.ndarray
    cls_scores: np.ndarray
    relatedness: np.ndarray
    features: np.ndarray
    feature_of: np.ndarray
    masks: np.ndarray
    mask_ends: np.ndarray
    mask_of: np.ndarray

    def to_bytes(self) -> bytes:
        """As an `.npz` file."""
        return npz_bytes({field.name: getattr(self, field.name) for field in fields(self)})

    @staticmethod
    def from_bytes(content: bytes) -> ImageProposals:
        """Read what `to_bytes` returned."""
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return ImageProposals(**arrays)

    def queries(self) -> Iterator[slice]:
        """The proposals of each query."""
        ends = self.counts.cumsum()
        return (slice(end - n, end) for n, end in zip(self.counts, ends, strict=True))

    def mask(self, place: int) -> dict[str, object]:
        """The mask of a proposal in COCO's compressed RLE."""
        number = self.mask_of[place]
        start = self.mask_ends[number - 1] if number else 0
        counts = self.masks[start : self.mask_ends[number]].tobytes().decode()
        return {"size": self.image_size.tolist(), "counts": counts}


class ProposalModel:
    """Gives the proposals of `VLNMSPredictor`, one image at a time.

    Args:
        cfg: with `MODEL.WEIGHTS`.
        layer: of the box features, one of `LAYERS`; None for no features.
        with_masks: add masks, which the config must have.

    Raises:
        ValueError: the model has no VL-NMS head.
    """

    def __init__(self, cfg: CfgNode, layer: str | None = None, with_masks: bool = False):
        self.model = VLNMSPredictor(cfg).model
        check_model(self.model, "the config")
        self.head = self.model.roi_heads
        self.layer = layer
        self.with_masks = with_masks

    @torch.no_grad()
    def __call__(self, image_input: dict, queries: Sequence[str]) -> ImageProposals:
        """The proposals of an image.

        Args:
            image_input: from `GroundingMapper`.
            queries: Q texts; may be empty strings.
        """
        image = extract_features(self.model, image_input)
        [result] = self.head.score_queries([image.candidates], [image.image_size], [list(queries)])
        instances = result.distinct_instances(image.image_size)
        if self.with_masks:
            [instances] = self.head.add_masks_and_keypoints(image.maps, [instances])
        return self._gather(image, result, instances, len(queries))

    def _gather(
        self, image: ImageFeatures, result: QueryResult, distinct: Instances, num_queries: int
    ) -> ImageProposals:
        scaled, place, masks = self._to_output_size(distinct, image.output_size)
        row_of = torch.full((len(distinct),), -1, device=place.device)
        row_of[place] = torch.arange(len(place), device=place.device)
        rows = row_of[result.position]
        kept = rows >= 0  # Detectron2 drops boxes without area
        rows = rows[kept]
        candidate_index = result.candidate_index[kept]
        features, feature_of = self._features(image, candidate_index)
        arrays = {
            "counts": torch.bincount(result.query_index[kept], minlength=num_queries),
            "corners": scaled.pred_boxes.tensor[rows],
            "classes": scaled.pred_classes[rows],
            "candidate_index": candidate_index,
            "scores": result.scores[kept],
            "cls_scores": scaled.cls_scores[rows],
            "relatedness": result.relatedness[kept],
            "features": features,
            "feature_of": feature_of,
            "mask_of": rows if self.with_masks else rows[:0],
        }
        return ImageProposals(
            image_size=np.array(image.output_size, dtype=np.int64),
            masks=np.frombuffer(b"".join(masks), dtype=np.uint8),
            mask_ends=np.cumsum([len(mask) for mask in masks], dtype=np.int64),
            **{name: tensor.cpu().numpy() for name, tensor in arrays.items()},
        )

    def _to_output_size(
        self, distinct: Instances, output_size: tuple[int, int]
    ) -> tuple[Instances, torch.Tensor, list[bytes]]:
        """In pixels of the image: the instances that are left, their indices and their masks."""
        if not self.with_masks:
            return (*to_output_size(distinct, output_size), [])
        parts, places, masks = [], [], []
        for start in range(0, max(1, len(distinct)), _MASK_CHUNK):
            part, place = to_output_size(distinct[start : start + _MASK_CHUNK], output_size)
            for mask in part.pred_masks.cpu().numpy():  # bool [H, W]
                encoded = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
                masks.append(encoded["counts"])
            part.remove("pred_masks")
            parts.append(part)
            places.append(start + place)
        return Instances.cat(parts), torch.cat(places), masks

    def _features(
        self, image: ImageFeatures, candidate_index: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.layer is None:
            return torch.zeros(0, 0), candidate_index[:0]
        kept, feature_of = candidate_index.unique(return_inverse=True)
        return box_features(self.head, image, self.layer)[kept], feature_of
