"""Stacked cross-attention as a `sim` of `vlnms_d2.evaluation.score_pairs`: an example of a model
that compares images and captions by stored pairs."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vlnms_d2.modeling.text import BiGRU, TextFeatures, Vocabulary


class TextImageAttention(nn.Module):
    """The similarity of captions and the boxes of images::

        model = TextImageAttention(vocabulary, feature_dim=1024).eval()
        similarities = score_pairs("pairs", model, "scores", encode_boxes=model.encode_boxes)

    Source: SCAN (Lee et al. 2018), Sec. 3.1, text-image with average pooling: every word attends to
    the boxes, and the similarity is the mean over the words of the cosine of a word with the boxes
    that it attends to.

    Args:
        vocabulary: of the captions.
        feature_dim: dimension D of the box features.
        embed_dim: dimension of the word embeddings.
        joint_dim: dimension H of the joint space.
        max_words: captions are truncated to this length.
        smoothing: lambda_1, the inverse temperature of the attention.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        feature_dim: int,
        *,
        embed_dim: int = 300,
        joint_dim: int = 1024,
        max_words: int = 40,
        smoothing: float = 9.0,
    ):
        super().__init__()
        self.text = BiGRU(
            vocabulary=vocabulary, embed_dim=embed_dim, hidden_dim=joint_dim, max_words=max_words
        )
        self.smoothing = smoothing
        self.project = nn.Linear(feature_dim, joint_dim)
        self._encoded: dict[str, TextFeatures] = {}  # each caption comes once per block of images

    def train(self, mode: bool = True) -> TextImageAttention:
        self._encoded.clear()
        return super().train(mode)

    def encode_boxes(self, features: Tensor) -> Tensor:
        """Features float [M, D] in the joint space, of length 1: float [M, H]."""
        return F.normalize(self.project(features), dim=-1)

    def encode_captions(self, captions: list[str]) -> TextFeatures:
        """Words of captions in the joint space, of length 1: [C, L, H]."""
        text = self.text(captions)
        forward, backward = text.words.chunk(2, dim=-1)
        return TextFeatures(F.normalize((forward + backward) / 2, dim=-1), text.mask)

    def forward(self, boxes: Tensor, captions: list[str]) -> Tensor:
        """Compare B images with C captions.

        Args:
            boxes: float [B, K, H], encoded.
            captions: C texts.

        Returns:
            Float [B, C].
        """
        if self.training:
            text = self.encode_captions(captions)
        else:
            for caption in set(captions) - self._encoded.keys():
                self._encoded[caption] = self.encode_captions([caption])
            text = TextFeatures.cat([self._encoded[caption] for caption in captions])
        words, mask = text.words, text.mask[:, None]  # [C, L, H], [C, 1, L]
        cosines = boxes[:, None] @ words.transpose(1, 2)  # [B, C, K, L]
        # Eq. 6: negative cosines are dropped, then each box is normalised over the words.
        positive = F.normalize(cosines.clamp(min=0) * mask, dim=-1)
        weights = (self.smoothing * positive).softmax(dim=2)  # Eq. 7, over the boxes
        attended = weights.transpose(2, 3) @ boxes[:, None]  # [B, C, L, H]
        relevance = F.cosine_similarity(attended, words, dim=-1) * text.mask  # [B, C, L]
        return relevance.sum(dim=-1) / text.mask.sum(dim=-1).clamp(min=1)
