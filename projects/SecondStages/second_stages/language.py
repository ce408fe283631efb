"""Attention over the words of an expression, for modules that each read a part of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlnms_d2.modeling.text import TextFeatures


class ModularLanguage(nn.Module):
    """One attention over the words for each module, and how much each module counts.

    Source: MAttNet (Yu et al. 2018), Sec. 3.1. Here the attended words are the BiGRU's features,
    not the embeddings.

    Args:
        word_dim: of the word features, D.
        num_modules: M.
    """

    def __init__(self, word_dim: int, num_modules: int):
        super().__init__()
        self.attention = nn.Linear(word_dim, num_modules)
        self.module_weights = nn.Linear(word_dim, num_modules)

    def forward(self, text: TextFeatures) -> tuple[Tensor, Tensor]:
        """Read expressions.

        Args:
            text: of Q expressions; one without words reads as zeros.

        Returns:
            Phrases float [Q, M, D], and module weights float [Q, M] that add up to 1.
        """
        mask = text.mask[:, :, None]
        logits = self.attention(text.words).masked_fill(~mask, torch.finfo(text.words.dtype).min)
        weights = logits.softmax(dim=1) * mask
        phrases = weights.transpose(1, 2) @ text.words
        whole = text.words.sum(1) / text.mask.sum(1, keepdim=True).clamp(min=1)
        return phrases, self.module_weights(whole).softmax(dim=-1)
