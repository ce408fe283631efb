"""What every relatedness module is: box features and words in, one logit per pair out."""

from __future__ import annotations

from dataclasses import dataclass

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
            where it is not; rows sum to one over the words of a query.
    """

    logits: Tensor
    attention: Tensor | None = None


class Relatedness(nn.Module):
    """Base class of the relatedness modules."""

    @classmethod
    def from_config(cls, cfg) -> dict:
        """The constructor's arguments that the config gives, all but the two widths."""
        raise NotImplementedError

    def forward(self, visual: Tensor, text: TextFeatures) -> RelatednessOutput:
        """Score every box against every query.

        Args:
            visual: float [N, visual_dim], features of the boxes of one image.
            text: Q queries with words [Q, L, text_dim].
        """
        raise NotImplementedError


def build_relatedness(cfg, visual_dim: int, text_dim: int) -> Relatedness:
    """The relatedness module that `MODEL.VLNMS.RELATEDNESS` names.

    Raises:
        ValueError: the name is not registered; the message lists those that are.
    """
    cls = lookup(RELATEDNESS_REGISTRY, cfg.MODEL.VLNMS.RELATEDNESS, "RELATEDNESS")
    return cls(**cls.from_config(cfg), visual_dim=visual_dim, text_dim=text_dim)
