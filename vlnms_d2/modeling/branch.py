"""The relatedness branch: all that the plugin adds to a detector's weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .relatedness import Relatedness, RelatednessOutput
from .text import TextEncoder, TextFeatures


class RelatednessBranch(nn.Module):
    """Text encoder, visual encoder and relatedness module.

    Args:
        visual_encoder: the branch's own copy of the detector's head, or None where the feature
            of the detector itself is used ("shared").
        text_encoder: from strings to word features.
        relatedness: from box and word features to logits.
    """

    def __init__(
        self,
        visual_encoder: nn.Module | None,
        text_encoder: TextEncoder,
        relatedness: Relatedness,
    ):
        super().__init__()
        self.visual_encoder = visual_encoder
        self.text_encoder = text_encoder
        self.relatedness = relatedness

    def encode_queries(self, queries: list[list[str]]) -> list[TextFeatures]:
        """Encode the queries of several images, each distinct query once.

        Args:
            queries: per image its queries.

        Returns:
            Per image one TextFeatures.
        """
        texts = dict.fromkeys(text for own in queries for text in own)
        distinct = {text: i for i, text in enumerate(texts)}
        features = self.text_encoder(list(distinct))
        return [features[[distinct[text] for text in own]] for own in queries]

    def score(self, visual: Tensor, text: TextFeatures) -> tuple[Tensor, RelatednessOutput]:
        """Relatedness of every box to every query.

        An empty query mentions nothing, so nothing speaks against a box: r = 1, and the fused
        score leaves the detector's order as it is.

        Args:
            visual: float [N, D], box features of one image.
            text: its Q queries.

        Returns:
            r, float [Q, N], and the module's raw output.
        """
        output = self.relatedness(visual, text)
        empty = ~text.mask.any(dim=1, keepdim=True)
        return torch.where(empty, 1.0, output.logits.sigmoid()), output
