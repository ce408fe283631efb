"""Many captions asked of many images, all pairs: what of a caption does not depend on the image is
done once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .candidates import Candidates
from .query_conditioned import QueryConditionedMixin
from .relatedness import Relatedness
from .relatedness.fc import FC
from .text import TextFeatures

_ENCODED_AT_ONCE = 512
_ANSWERED_AT_ONCE = {False: 8192, True: 256}  # by whether each caption has boxes of its own


class PairScorer:
    """Asks the same captions of one image after the other.

    Args:
        head: of the model.
        text: of the C captions; see `encode_captions`.
    """

    def __init__(self, head: QueryConditionedMixin, text: TextFeatures):
        self.head = head
        self.text = text

    @torch.no_grad()
    def __call__(
        self, candidates: Candidates, image_size: tuple[int, int], visual: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The proposals of an image for all captions.

        Args:
            candidates: of the image; nothing pooled is needed.
            image_size: (height, width) in pixels of the network's input.
            visual: float [N, D], the candidates' features for the relatedness module.

        Returns:
            caption and candidate, int64 [M] each, and fused score s, float [M]: one caption's
            after the other, by falling score.
        """
        step = _ANSWERED_AT_ONCE[self.head.vlnms.relatedness.refines]
        found = []
        for start in range(0, len(self.text), step):
            text = self.text[start : start + step]
            answer = self.head.answer_image(candidates, image_size, visual, text)
            found.append((start + answer.query_index, answer.candidate_index, answer.scores))
        return tuple(map(torch.cat, zip(*found, strict=True)))


@torch.no_grad()
def encode_captions(head: QueryConditionedMixin, captions: Sequence[str]) -> TextFeatures:
    """Encode captions for a `PairScorer`.

    Args:
        head: of the model.
        captions: C of them, at least one.
    """
    with head.own_precision():
        parts = [
            condense(
                head.vlnms.relatedness,
                head.vlnms.text_encoder(list(captions[i : i + _ENCODED_AT_ONCE])),
            )
            for i in range(0, len(captions), _ENCODED_AT_ONCE)
        ]
    return cat_text(parts)


def condense(relatedness: Relatedness, text: TextFeatures) -> TextFeatures:
    """Text that the module scores alike, with less to do for each image.

    The word attention of FC's linear form is the same for every box (SPEC section 3), so the
    attended word takes the place of a query's words: attention to a single word is 1.
    """
    if not isinstance(relatedness, FC) or relatedness.attention != "linear":
        return text
    attention = relatedness.word_attention(None, text)
    query = torch.einsum("ql,qld->qd", attention, text.words)
    return TextFeatures(query[:, None], text.mask.any(dim=1, keepdim=True))


def cat_text(parts: Sequence[TextFeatures]) -> TextFeatures:
    """Queries of several parts as one, padded to the longest."""
    longest = max(part.mask.shape[1] for part in parts)
    added = [longest - part.mask.shape[1] for part in parts]
    return TextFeatures(
        torch.cat([F.pad(p.words, (0, 0, 0, n)) for p, n in zip(parts, added, strict=True)]),
        torch.cat([F.pad(p.mask, (0, n)) for p, n in zip(parts, added, strict=True)]),
    )
