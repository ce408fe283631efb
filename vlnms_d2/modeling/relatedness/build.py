"""Relatedness modules: the interface and the registry."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from ...config import lookup
from ..text.build import TextFeatures

RELATEDNESS_REGISTRY = Registry("RELATEDNESS")
RELATEDNESS_REGISTRY.__doc__ = """
Registry for relatedness modules: subclasses of :class:`Relatedness`, built by
`cls(cfg, visual_dim, text_dim)`.
"""


@dataclass
class RelatednessOutput:
    """The output of a relatedness module for N boxes and Q queries.

    Attributes:
        logits: float [Q, N]; relatedness r is their sigmoid.
        attention: word attention, float [Q, L] if it is the same for every box, else [Q, N, L];
            rows sum to one over the words of a query. None if it was not requested, or if the
            module has none.
        deltas: float [Q, N, 4], box refinement t = (tx, ty, tw, th) in the parameterisation of
            the detector's box predictor; None if the module has none.
    """

    logits: Tensor
    attention: Tensor | None = None
    deltas: Tensor | None = None

    @staticmethod
    def cat(
        parts: Iterable[RelatednessOutput], num_queries: int, num_words: int
    ) -> RelatednessOutput:
        """Concatenate the outputs for different queries of the same boxes.

        Each part is copied as it arrives. Keeping all parts for `torch.cat` would fragment memory
        and cost some hundred MiB: they are small, but lie between temporary tensors.

        Args:
            parts: at least one, usually computed on demand.
            num_queries: the number of queries of all parts together.
            num_words: length of the longest query, to which attentions are padded.
        """
        whole: dict[str, Tensor] = {}
        start = 0
        for part in parts:
            end = start + len(part.logits)
            if end - start == num_queries:
                return part
            for name, value in vars(part).items():
                if value is not None:
                    if name not in whole:
                        last = num_words if name == "attention" else value.shape[-1]
                        whole[name] = value.new_zeros(num_queries, *value.shape[1:-1], last)
                    whole[name][start:end, ..., : value.shape[-1]] = value
            start = end
            del part, value  # before the next one is computed
        return RelatednessOutput(**whole)


class Relatedness(nn.Module):
    """Base class of the relatedness modules.

    A subclass is built like every Detectron2 component: a `@configurable` constructor with the
    widths `visual_dim` and `text_dim` among its arguments, and `from_config`.

    Attributes:
        learns: whether there is anything to train.
        compares_boxes: whether a box's score depends on the other boxes of the image.
        refines: whether its output has a box refinement, `deltas`.
        text_encoder, visual_encoder: names that override MODEL.VLNMS.TEXT_ENCODER and
            MODEL.VLNMS.VISUAL_ENCODER; None to use those of the config.
    """

    learns = True
    compares_boxes = False
    refines = False
    text_encoder: str | None = None
    visual_encoder: str | None = None

    @classmethod
    def from_config(cls, cfg, visual_dim: int, text_dim: int) -> dict:
        """The constructor's arguments.

        Args:
            cfg: the config.
            visual_dim: width of the box features.
            text_dim: width of the word features.
        """
        raise NotImplementedError

    def forward(
        self, visual: Tensor, locations: Tensor, text: TextFeatures, with_attention: bool = False
    ) -> RelatednessOutput:
        """Score every box against every query.

        Args:
            visual: float [N, visual_dim], features of the boxes of one image. For modules with
                box refinement possibly [N, 2 * visual_dim], the second half for the refinement.
            locations: float [N, 5]; see `box_locations`.
            text: Q queries with words [Q, L, text_dim].
            with_attention: return the word attention even if it takes extra computation.
        """
        raise NotImplementedError

    def describe(self, candidates, num_classes: int, image: Tensor | None = None) -> Tensor:
        """The features of candidates, for a `visual_encoder` of "class" or "cues".

        Args:
            candidates: N, with `boxes`, float [N, 4], xyxy in pixels, `scores`, float [N], class
                confidence c, and `classes`, int64 [N].
            num_classes: C.
            image: float [3, H, W], the network's normalised input, or None.

        Returns:
            float [N, D], by default the one-hot class, D = C.
        """
        return F.one_hot(candidates.classes, num_classes).to(candidates.scores.dtype)

    def encode_boxes(self, visual: Tensor, locations: Tensor) -> Any:
        """The part of `forward` that needs no query, which `forward` takes in place of `visual`;
        computed once per image, whatever the number of chunks of queries."""
        return visual

    def condense(self, text: TextFeatures) -> TextFeatures:
        """Text features that give the same scores at less cost per image. Worthwhile if many
        images have the same queries."""
        return text

    def bytes_per_query(self, num_boxes: int, num_words: int) -> int:
        """Upper bound on the temporary memory of one query at inference, in bytes.

        It determines how many queries of an image are scored in a chunk. The default allows for
        four float32 tensors [Q, N + L, 4096] at once; a module that needs less may override it.
        """
        return 4 * (num_boxes + num_words) * 4 * 4096


def box_locations(boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Location features of boxes (Sec. 3.2.2).

    Args:
        boxes: float [N, 4], xyxy in pixels.
        image_size: (height, width) in pixels.

    Returns:
        float [N, 5]: x1 / W, y1 / H, x2 / W, y2 / H, box area / image area.
    """
    height, width = image_size
    corners = boxes / boxes.new_tensor([width, height, width, height])
    area = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
    return torch.cat([corners, area[:, None]], dim=1)


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32 if it has half precision, which layers return under autocast."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def relatedness_class(cfg) -> type[Relatedness]:
    """The class that `MODEL.VLNMS.RELATEDNESS` names; see `lookup`."""
    return lookup(RELATEDNESS_REGISTRY, cfg.MODEL.VLNMS.RELATEDNESS, "RELATEDNESS")


def text_encoder_name(cfg) -> str:
    """The text encoder that the config's relatedness module uses."""
    return relatedness_class(cfg).text_encoder or cfg.MODEL.VLNMS.TEXT_ENCODER


def visual_encoder_name(cfg) -> str:
    """The visual encoder that the config's relatedness module uses."""
    return relatedness_class(cfg).visual_encoder or cfg.MODEL.VLNMS.VISUAL_ENCODER


def build_relatedness(cfg, visual_dim: int, text_dim: int) -> Relatedness:
    """The relatedness module that `MODEL.VLNMS.RELATEDNESS` names; see `lookup`."""
    return relatedness_class(cfg)(cfg, visual_dim, text_dim)
