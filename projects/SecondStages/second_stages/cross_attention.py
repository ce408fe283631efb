"""Stacked cross-attention between boxes and words, SCAN i-t AVG: a reference for retrieval."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlnms_d2.modeling.text import BiGRU, TextFeatures, Vocabulary


class StackedCrossAttention(nn.Module):
    """How well a caption fits the boxes of an image.

    Source: SCAN (Lee et al. 2018), Sec. 3.1, image-text with average pooling: every box attends to
    the words, and the similarity is the mean over the boxes of the cosine of a box with the words
    that it attends to. Words are the mean of the two directions of a GRU.

    Args:
        vocabulary: of the captions.
        feature_dim: D, of the boxes' features.
        embed_dim: of the words.
        joint_dim: H, of boxes and words.
        max_words: captions are cut off behind them.
        smoothing: lambda_1, how sharply a box attends.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        feature_dim: int,
        *,
        embed_dim: int = 128,
        joint_dim: int = 256,
        max_words: int = 40,
        smoothing: float = 4.0,
    ):
        super().__init__()
        self.text = BiGRU(
            vocabulary=vocabulary, embed_dim=embed_dim, hidden_dim=joint_dim, max_words=max_words
        )
        self.smoothing = smoothing
        self.register_buffer("mean", torch.zeros(feature_dim))
        self.register_buffer("scale", torch.ones(feature_dim))
        self.project = nn.Linear(feature_dim, joint_dim)

    @torch.no_grad()
    def fit_scale(self, features: Tensor) -> None:
        """Standardise features as those of the training boxes, float [N, D]."""
        self.mean.copy_(features.mean(0))
        self.scale.copy_(features.std(0).clamp(min=1e-4))

    def encode_boxes(self, features: Tensor) -> Tensor:
        """Features float [..., D] in the joint space, of length 1: float [..., H]."""
        return F.normalize(self.project((features - self.mean) / self.scale), dim=-1)

    def encode_captions(self, captions: list[str]) -> TextFeatures:
        """Words of captions in the joint space, of length 1: [C, L, H]."""
        text = self.text(captions)
        forward, backward = text.words.chunk(2, dim=-1)
        return TextFeatures(F.normalize((forward + backward) / 2, dim=-1), text.mask)

    def forward(self, boxes: Tensor, mask: Tensor, text: TextFeatures) -> Tensor:
        """Compare every image with every caption.

        Args:
            boxes: float [I, N, H], encoded.
            mask: bool [I, N], False where there is padding.
            text: of C captions, encoded.

        Returns:
            Float [I, C].
        """
        # A word is normalised over the boxes: those that are padding must not count.
        cosines = torch.einsum("inh,clh->icnl", boxes * mask[..., None], text.words)
        return _mean_over_boxes(self._box_cosines(cosines, text), mask[:, None, :])

    def compare_pairs(self, boxes: Tensor, mask: Tensor, text: TextFeatures) -> Tensor:
        """Compare each caption with boxes of its own.

        Args:
            boxes: float [..., C, N, H], encoded: those that the caption has of an image.
            mask: bool [..., C, N], False where there is padding.
            text: of the C captions, encoded.

        Returns:
            Float [..., C].
        """
        cosines = torch.einsum("...cnh,clh->...cnl", boxes * mask[..., None], text.words)
        return _mean_over_boxes(self._box_cosines(cosines, text), mask)

    def _box_cosines(self, cosines: Tensor, text: TextFeatures) -> Tensor:
        """The cosine of each box with the words that it attends to: float [..., C, N].

        Args:
            cosines: float [..., C, N, L], of boxes and words.
            text: of the C captions.
        """
        words = text.mask[:, None, :]
        # Eq. 1: negative cosines are dropped, then each word is normalised over the boxes.
        positive = F.normalize(cosines.clamp(min=0) * words, dim=-2)
        weights = (self.smoothing * positive).masked_fill(~words, float("-inf")).softmax(dim=-1)
        # A caption without words attends to nothing.
        weights = weights.nan_to_num()
        # The attended words are a sum w = sum_j a_j e_j: its product with the box and its length
        # follow from the cosines and from the words' own products, without making w.
        product = (weights * cosines).sum(-1)
        words_gram = text.words @ text.words.transpose(1, 2)
        squared = torch.einsum("...cnl,clm,...cnm->...cn", weights, words_gram, weights)
        return product / squared.clamp(min=1e-12).sqrt()


def _mean_over_boxes(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum(-1) / mask.sum(-1).clamp(min=1)


def triplet_loss(similarities: Tensor, hardest: bool = True, margin: float = 0.2) -> Tensor:
    """The triplet loss of a batch (SCAN, Sec. 3.2).

    Args:
        similarities: float [B, B], of images and captions; the diagonal belongs together.
        hardest: of the hardest negatives in the batch; else the mean of all.
        margin: by which the diagonal should be better than all else.

    Returns:
        The sum over the batch, for both directions.
    """
    positive = similarities.diagonal()
    itself = torch.eye(len(similarities), dtype=torch.bool, device=similarities.device)
    by_image = (margin + similarities - positive[:, None]).clamp(min=0).masked_fill(itself, 0)
    by_caption = (margin + similarities - positive[None, :]).clamp(min=0).masked_fill(itself, 0)
    if hardest:
        return by_image.amax(1).sum() + by_caption.amax(0).sum()
    return (by_image.sum() + by_caption.sum()) / max(len(similarities) - 1, 1)
