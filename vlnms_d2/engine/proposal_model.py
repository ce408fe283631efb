"""A model with its weights that answers all queries of an image, with what the formats of second
stages need."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import Instances
from pycocotools import mask as mask_util

from ..export.records import npz_bytes
from ..modeling.feature_extraction import LAYERS, Seen, box_features, check_model, in_image, look_at
from ..modeling.postprocessing import QueryResult
from .predictor import VLNMSPredictor

_MASKS_AT_ONCE = 32  # of the image's size


@dataclass(frozen=True)
class FoundProposals:
    """The M proposals of an image's Q queries, one query's after the other, by falling score.

    Attributes:
        image_size: int64 [2], height and width in pixels.
        counts: int64 [Q], proposals of each query.
        corners: float32 [M, 4], xyxy in pixels of the image.
        classes, candidate_index: int64 [M].
        scores, cls_scores, relatedness: float32 [M], s, c and r.
        features: float32 [U, D], each candidate's that is kept by any query; [0, 0] without.
        feature_of: int64 [M], which of them.
        masks: uint8, the bytes of V masks in compressed RLE.
        mask_ends: int64 [V], where each of them ends.
        mask_of: int64 [M], which of them; empty without masks.
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
    def from_bytes(content: bytes) -> FoundProposals:
        """What `to_bytes` gave."""
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return FoundProposals(**arrays)

    def queries(self) -> Iterator[slice]:
        """Where the proposals of each query are."""
        ends = self.counts.cumsum()
        return (slice(end - n, end) for n, end in zip(self.counts, ends, strict=True))

    def mask(self, place: int) -> dict[str, object]:
        """The mask of a proposal, as COCO has it."""
        number = self.mask_of[place]
        start = self.mask_ends[number - 1] if number else 0
        counts = self.masks[start : self.mask_ends[number]].tobytes().decode()
        return {"size": self.image_size.tolist(), "counts": counts}


class ProposalModel:
    """Answers like `VLNMSPredictor`, one image at a time.

    Args:
        cfg: with `MODEL.WEIGHTS`.
        layer: of the boxes' features, one of `LAYERS`; None for none.
        with_masks: give masks as well; the config has them.

    Raises:
        ValueError: the model has no VL-NMS head, or the layer is none.
    """

    def __init__(self, cfg: CfgNode, layer: str | None = None, with_masks: bool = False):
        if layer is not None and layer not in LAYERS:
            raise ValueError(f"features are {layer!r}, expected one of {', '.join(LAYERS)}")
        self.model = VLNMSPredictor(cfg).model
        check_model(self.model, "the config")
        self.head = self.model.roi_heads
        self.layer = layer
        self.with_masks = with_masks

    @torch.no_grad()
    def __call__(self, image_input: dict, queries: Sequence[str]) -> FoundProposals:
        """Answer the queries of an image.

        Args:
            image_input: as `GroundingMapper` gives it.
            queries: Q of them; may be empty strings.
        """
        seen = look_at(self.model, image_input)
        [answer] = self.head.score_queries([seen.candidates], [seen.image_size], [list(queries)])
        instances = answer.distinct_instances(seen.image_size)
        if self.with_masks:
            [instances] = self.head.add_masks_and_keypoints(seen.maps, [instances])
        return self._gather(seen, answer, instances, len(queries))

    def _gather(
        self, seen: Seen, answer: QueryResult, distinct: Instances, num_queries: int
    ) -> FoundProposals:
        scaled, place, masks = self._in_image(distinct, seen.output_size)
        row_of = torch.full((len(distinct),), -1, device=place.device)
        row_of[place] = torch.arange(len(place), device=place.device)
        rows = row_of[answer.position]
        kept = rows >= 0  # Detectron2 drops boxes without area
        rows = rows[kept]
        candidate_index = answer.candidate_index[kept]
        features, feature_of = self._features(seen, candidate_index)
        counts = torch.bincount(answer.query_index[kept], minlength=num_queries)
        content = b"".join(masks)
        arrays = {
            "counts": counts,
            "corners": scaled.pred_boxes.tensor[rows],
            "classes": scaled.pred_classes[rows],
            "candidate_index": candidate_index,
            "scores": answer.scores[kept],
            "cls_scores": scaled.cls_scores[rows],
            "relatedness": answer.relatedness[kept],
            "features": features,
            "feature_of": feature_of,
            "mask_of": rows if self.with_masks else rows[:0],
        }
        return FoundProposals(
            image_size=np.array(seen.output_size, dtype=np.int64),
            masks=np.frombuffer(content, dtype=np.uint8),
            mask_ends=np.cumsum([len(mask) for mask in masks], dtype=np.int64),
            **{name: tensor.cpu().numpy() for name, tensor in arrays.items()},
        )

    def _in_image(
        self, distinct: Instances, output_size: tuple[int, int]
    ) -> tuple[Instances, torch.Tensor, list[bytes]]:
        """In pixels of the image, which of the instances those are, and their masks."""
        if not self.with_masks:
            return (*in_image(distinct, output_size), [])
        parts, places, masks = [], [], []
        for start in range(0, max(1, len(distinct)), _MASKS_AT_ONCE):
            part, place = in_image(distinct[start : start + _MASKS_AT_ONCE], output_size)
            masks += [_encode(mask) for mask in part.pred_masks.cpu().numpy()]
            part.remove("pred_masks")
            parts.append(part)
            places.append(start + place)
        return Instances.cat(parts), torch.cat(places), masks

    def _features(
        self, seen: Seen, candidate_index: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.layer is None:
            return torch.zeros(0, 0), candidate_index[:0]
        kept, feature_of = candidate_index.unique(return_inverse=True)
        return box_features(self.head, seen, self.layer)[kept], feature_of


def _encode(mask: np.ndarray) -> bytes:
    """A mask, bool [H, W], as the counts of COCO's compressed RLE."""
    return mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"]
