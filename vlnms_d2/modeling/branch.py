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
        refinement_encoder: one more copy for the box refinement, or None where it uses the features
            that the relatedness does.
        chunk_bytes: the queries of an image are scored so many at a time that the memory that
            this takes for a while stays below it.
    """

    def __init__(
        self,
        visual_encoder: nn.Module | None,
        text_encoder: TextEncoder,
        relatedness: Relatedness,
        refinement_encoder: nn.Module | None = None,
        chunk_bytes: int = 256 << 20,
    ):
        super().__init__()
        self.visual_encoder = visual_encoder
        self.text_encoder = text_encoder
        self.relatedness = relatedness
        self.refinement_encoder = refinement_encoder
        self.chunk_bytes = chunk_bytes

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

    def score(
        self,
        visual: Tensor,
        locations: Tensor,
        text: TextFeatures,
        with_attention: bool = False,
    ) -> tuple[Tensor, RelatednessOutput]:
        """Relatedness of every box to every query, at inference.

        An empty query mentions nothing, so nothing speaks against a box: r = 1 and no box
        refinement, and the fused score leaves the detector's order as it is.

        Args:
            visual: float [N, D], box features of one image.
            locations: float [N, 5]; see `box_locations`.
            text: its Q queries.
            with_attention: see `Relatedness.forward`.

        Returns:
            r, float [Q, N], and the module's output.
        """
        cost = self.relatedness.bytes_per_query(len(visual), text.mask.shape[1])
        # Two fifths for tensors; the rest is for what the allocator keeps of freed memory.
        step = max(1, self.chunk_bytes * 2 // 5 // max(1, cost))
        chunks = [text[i : i + step] for i in range(0, max(1, len(text)), step)]
        output = RelatednessOutput.cat(
            (self.relatedness(visual, locations, chunk, with_attention) for chunk in chunks),
            len(text),
            text.mask.shape[1],
        )
        empty = ~text.mask.any(dim=1, keepdim=True)
        if output.deltas is not None:
            output.deltas = output.deltas.masked_fill(empty[..., None], 0.0)
        return torch.where(empty, 1.0, output.logits.sigmoid()), output
