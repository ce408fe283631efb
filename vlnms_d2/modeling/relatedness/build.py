"""Relatedness modules: the interface and the registry."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
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
        attention: float [Q, L] where the word attention is the same for every box, [Q, N, L]
            where it is not; rows sum to one over the words of a query. None where it was not
            requested, or the module has none.
        deltas: float [Q, N, 4], box refinement t = (tx, ty, tw, th) in the parameterisation of
            the detector's box predictor; None where the module has none.
    """

    logits: Tensor
    attention: Tensor | None = None
    deltas: Tensor | None = None

    @staticmethod
    def cat(
        parts: Iterable[RelatednessOutput], num_queries: int, num_words: int
    ) -> RelatednessOutput:
        """Concatenate the outputs for different queries.

        Each part is copied as it arrives. Keeping them for `torch.cat` costs some hundred MiB:
        small as they are, they lie in memory between the temporary tensors of their parts, so the
        allocator cannot reuse that space for the next part.

        Args:
            parts: at least one.
            num_queries: of all parts.
            num_words: of the longest query; attentions are padded to it.
        """
        whole: RelatednessOutput | None = None
        start = 0
        for part in parts:
            end = start + len(part.logits)
            if end - start == num_queries:
                return part
            if whole is None:
                whole = part._zeros(num_queries, num_words)
            whole.logits[start:end] = part.logits
            if part.attention is not None:
                whole.attention[start:end, ..., : part.attention.shape[-1]] = part.attention
            if part.deltas is not None:
                whole.deltas[start:end] = part.deltas
            start = end
            del part  # before the next one is made
        return whole

    def _zeros(self, num_queries: int, num_words: int) -> RelatednessOutput:
        """Zeros for more queries of the same boxes."""
        attention = deltas = None
        if self.attention is not None:
            attention = self.attention.new_zeros(
                num_queries, *self.attention.shape[1:-1], num_words
            )
        if self.deltas is not None:
            deltas = self.deltas.new_zeros(num_queries, *self.deltas.shape[1:])
        logits = self.logits.new_zeros(num_queries, self.logits.shape[1])
        return RelatednessOutput(logits, attention, deltas)


class Relatedness(nn.Module):
    """Base class of the relatedness modules.

    A subclass is built like every Detectron2 component: a `@configurable` constructor with the
    widths `visual_dim` and `text_dim` among its arguments, and `from_config`.

    Attributes:
        learns: whether there is anything to train.
        compares_boxes: whether a box's score depends on the other boxes of the image.
        refines: whether it gives a box refinement.
        text_encoder, visual_encoder: what it uses in place of MODEL.VLNMS.TEXT_ENCODER and
            MODEL.VLNMS.VISUAL_ENCODER; None for those of the config.
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
        self,
        visual: Tensor,
        locations: Tensor,
        text: TextFeatures,
        with_attention: bool = False,
    ) -> RelatednessOutput:
        """Score every box against every query.

        Args:
            visual: float [N, visual_dim], features of the boxes of one image. With box
                refinement they may be [N, 2 * visual_dim]: the second half then is for that.
            locations: float [N, 5], where the boxes are; see `box_locations`.
            text: Q queries with words [Q, L, text_dim].
            with_attention: return the word attention also where that costs extra.
        """
        raise NotImplementedError

    def condense(self, text: TextFeatures) -> TextFeatures:
        """Text that is scored the same and costs less per image, for many images with the same
        queries."""
        return text

    def bytes_per_query(self, num_boxes: int, num_words: int) -> int:
        """Upper bound on the temporary memory of one query at inference, in bytes.

        The queries of an image are scored in chunks by it. This default suits a module whose
        widest tensor is [Q, N + L, D] with D up to 4,096; a leaner one may override it.
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
    """`x`, raised from half precision, which layers return under autocast."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def relatedness_class(cfg) -> type[Relatedness]:
    """The class that `MODEL.VLNMS.RELATEDNESS` names.

    Raises:
        ValueError: the name is not registered; the message lists those that are.
    """
    return lookup(RELATEDNESS_REGISTRY, cfg.MODEL.VLNMS.RELATEDNESS, "RELATEDNESS")


def text_encoder_name(cfg) -> str:
    """The text encoder that the config's relatedness module uses."""
    return relatedness_class(cfg).text_encoder or cfg.MODEL.VLNMS.TEXT_ENCODER


def visual_encoder_name(cfg) -> str:
    """The visual encoder that the config's relatedness module uses."""
    return relatedness_class(cfg).visual_encoder or cfg.MODEL.VLNMS.VISUAL_ENCODER


def build_relatedness(cfg, visual_dim: int, text_dim: int) -> Relatedness:
    """The relatedness module that `MODEL.VLNMS.RELATEDNESS` names.

    Raises:
        ValueError: the name is not registered; the message lists those that are.
    """
    return relatedness_class(cfg)(cfg, visual_dim, text_dim)
