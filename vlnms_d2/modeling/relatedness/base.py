"""What every relatedness module is: boxes and words in, one logit per pair out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from fvcore.common.registry import Registry
from torch import Tensor, nn

from ..text.encoder import TextFeatures, lookup

RELATEDNESS_REGISTRY = Registry("RELATEDNESS")
RELATEDNESS_REGISTRY.__doc__ = """
Registry for relatedness modules: subclasses of :class:`Relatedness`, built by
`cls(**cls.from_config(cfg), visual_dim=..., text_dim=...)`.
"""


@dataclass
class RelatednessOutput:
    """What a relatedness module says of N boxes and Q queries.

    Attributes:
        logits: float [Q, N]; relatedness r is their sigmoid.
        attention: float [Q, L] where the word attention is the same for every box, [Q, N, L]
            where it is not; rows sum to one over the words of a query. None where the module
            was not asked for it, or has none.
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
        """Parts for different queries as one.

        Each part is copied as it comes. To keep them for a `torch.cat` costs some hundred MiB:
        small as they are, in memory they lie between the temporary tensors of their parts, so that
        the allocator cannot use the place of those for the next part's.

        Args:
            parts: one after the other; at least one.
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

    Attributes:
        learns: whether there is anything to train.
        compares_boxes: whether a box's score depends on the other boxes of the image.
        refines: whether it gives a box refinement.
        text_encoder, visual_encoder: what it takes in place of those that the config names,
            MODEL.VLNMS.TEXT_ENCODER and MODEL.VLNMS.VISUAL_ENCODER; None where it takes those.
    """

    learns = True
    compares_boxes = False
    refines = False
    text_encoder: str | None = None
    visual_encoder: str | None = None

    @classmethod
    def from_config(cls, cfg) -> dict:
        """The constructor's arguments that the config gives, all but the two widths."""
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
            visual: float [N, visual_dim], features of the boxes of one image; where it refines
                boxes, [N, 2 * visual_dim] with the features for that behind those for relatedness
                if they are not the same.
            locations: float [N, 5], where they are; see `box_locations`.
            text: Q queries with words [Q, L, text_dim].
            with_attention: give the word attention also where that costs extra.
        """
        raise NotImplementedError

    def bytes_per_query(self, num_boxes: int, num_words: int) -> int:
        """About how many bytes of temporary tensors a query takes at inference."""
        raise NotImplementedError


def box_locations(boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Location features of boxes (SPEC section 4).

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
    """`x`, raised from half precision: what layers give under autocast."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def relatedness_class(cfg) -> type[Relatedness]:
    """The class that `MODEL.VLNMS.RELATEDNESS` names.

    Raises:
        ValueError: the name is not registered; the message lists those that are.
    """
    return lookup(RELATEDNESS_REGISTRY, cfg.MODEL.VLNMS.RELATEDNESS, "RELATEDNESS")


def text_encoder_name(cfg) -> str:
    """The text encoder that the relatedness module of the config takes."""
    return relatedness_class(cfg).text_encoder or cfg.MODEL.VLNMS.TEXT_ENCODER


def visual_encoder_name(cfg) -> str:
    """The visual encoder that the relatedness module of the config takes."""
    return relatedness_class(cfg).visual_encoder or cfg.MODEL.VLNMS.VISUAL_ENCODER


def build_relatedness(cfg, visual_dim: int, text_dim: int) -> Relatedness:
    """The relatedness module that `MODEL.VLNMS.RELATEDNESS` names.

    Raises:
        ValueError: the name is not registered; the message lists those that are.
    """
    cls = relatedness_class(cfg)
    return cls(**cls.from_config(cfg), visual_dim=visual_dim, text_dim=text_dim)
