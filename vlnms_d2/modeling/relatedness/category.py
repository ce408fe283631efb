"""Relatedness without training, from the name of the candidate's category (SPEC section 6)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..text.encoder import TextFeatures
from .base import RELATEDNESS_REGISTRY, Relatedness, RelatednessOutput


@RELATEDNESS_REGISTRY.register()
class Category(Relatedness):
    """A logistic curve of how well any noun of the query fits the candidate's category.

    It sees of a candidate its class and nothing else: what tells the mentioned one from others of
    its class is the detector's confidence. Any Detectron2 detector so becomes query-aware before
    anything is trained.

    Args:
        visual_dim: C classes, of which `visual` is the one-hot code.
        text_dim: C, cosines with the names of the classes.
        slope, midpoint: r = sigmoid(slope * (best cosine - midpoint)).

    Raises:
        ValueError: the widths differ.
    """

    learns = False
    text_encoder = "CategoryMentions"
    visual_encoder = "class"

    def __init__(self, *, visual_dim: int, text_dim: int, slope: float, midpoint: float):
        super().__init__()
        if visual_dim != text_dim:
            raise ValueError(f"{visual_dim} classes, but {text_dim} category names")
        self.slope = slope
        self.midpoint = midpoint

    @classmethod
    def from_config(cls, cfg) -> dict:
        category = cfg.MODEL.VLNMS.CATEGORY
        return {"slope": category.SLOPE, "midpoint": category.MIDPOINT}

    def forward(
        self,
        visual: Tensor,
        locations: Tensor,
        text: TextFeatures,
        with_attention: bool = False,
    ) -> RelatednessOutput:
        """Score every box against every query.

        Args:
            visual: float [N, C], the one-hot class of each box.
            locations: not looked at.
            text: Q queries; words [Q, L, C], cosines.
            with_attention: give the attention, one for the noun that fits best and zero for the
                others: [Q, N, L].
        """
        classes = visual.argmax(dim=1)
        cosines = text.words.masked_fill(~text.mask[..., None], -1.0)  # [Q, L, C]
        best = F.pad(cosines, (0, 0, 0, 1), value=-1.0).amax(dim=1)  # [Q, C], also for L = 0
        logits = self.slope * (best[:, classes] - self.midpoint)
        attention = None
        if with_attention:
            num_words = cosines.shape[1]
            attention = logits.new_zeros(*logits.shape, num_words)
            if num_words:
                fits_best = cosines.argmax(dim=1)[:, classes]  # [Q, N]
                attention = F.one_hot(fits_best, num_words) * text.mask[:, None]
                attention = attention.to(logits.dtype)
        return RelatednessOutput(logits, attention)

    def bytes_per_query(self, num_boxes: int, num_words: int) -> int:
        return 4 * num_boxes * (4 + 3 * num_words)
