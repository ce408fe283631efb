"""Relatedness without training: how well the query names the category of a candidate.

It is not part of the paper. With it any Detectron2 detector becomes query-aware at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.data import MetadataCatalog
from torch import Tensor

from ...language.matching import RULES, category_matcher
from ..text.build import TEXT_ENCODER_REGISTRY, TextEncoder, TextFeatures, pad_features
from .build import RELATEDNESS_REGISTRY, Relatedness, RelatednessOutput


def category_logits(cosines: Tensor, slope: float, midpoint: float) -> Tensor:
    """Logits of relatedness, of the shape of the best cosines with the category names."""
    return slope * (cosines - midpoint)


def category_relatedness(
    cosines: np.ndarray | Tensor, slope: float = RULES.slope, midpoint: float = RULES.midpoint
) -> Tensor:
    """Relatedness r of every category to every text.

    Args:
        cosines: float [T, C], as `CategoryMatcher.best_cosines` gives them.
        slope, midpoint: r = sigmoid(slope * (cosine - midpoint)).

    Returns:
        float32 [T, C]. A text that names no category (all cosines -1) has r = 1 for all of them,
        which leaves the detector's order unchanged.
    """
    cosines = torch.as_tensor(cosines)
    relatedness = category_logits(cosines.double(), slope, midpoint).sigmoid()
    no_mention = (cosines <= -1).all(dim=1, keepdim=True)
    return torch.where(no_mention, 1.0, relatedness).float()


@RELATEDNESS_REGISTRY.register()
class Category(Relatedness):
    """Relatedness from the cosine of the best-matching noun with the candidate's category name.

    Nothing but the class of a candidate is used: among candidates of the same class, the detector's
    confidence decides.

    Args:
        visual_dim: C classes, of which `visual` is the one-hot code.
        text_dim: C, cosines with the names of the classes.
        slope, midpoint: see `category_relatedness`.

    Raises:
        ValueError: the widths differ.
    """

    learns = False
    text_encoder = "CategoryMentions"
    visual_encoder = "class"

    @configurable
    def __init__(self, *, visual_dim: int, text_dim: int, slope: float, midpoint: float):
        super().__init__()
        if visual_dim != text_dim:
            raise ValueError(f"{visual_dim} classes, but {text_dim} category names")
        self.slope = slope
        self.midpoint = midpoint

    @classmethod
    def from_config(cls, cfg, visual_dim: int, text_dim: int) -> dict:
        category = cfg.MODEL.VLNMS.CATEGORY
        return {
            "visual_dim": visual_dim,
            "text_dim": text_dim,
            "slope": category.SLOPE,
            "midpoint": category.MIDPOINT,
        }

    def forward(
        self, visual: Tensor, locations: Tensor, text: TextFeatures, with_attention: bool = False
    ) -> RelatednessOutput:
        """See `Relatedness.forward`; `visual` has the one-hot class of each box, words cosines,
        [Q, L, C]. The attention is one for the best-matching noun, zero for all others."""
        classes = visual.argmax(dim=1)
        cosines = text.words.masked_fill(~text.mask[..., None], -1.0)  # [Q, L, C]
        best = F.pad(cosines, (0, 0, 0, 1), value=-1.0).amax(dim=1)  # [Q, C], also for L = 0
        logits = category_logits(best[:, classes], self.slope, self.midpoint)  # [Q, N]
        attention = None
        if with_attention:
            num_words = cosines.shape[1]
            attention = logits.new_zeros(*logits.shape, num_words)
            if num_words:
                best_word = cosines.argmax(dim=1)[:, classes]  # [Q, N]
                attention = F.one_hot(best_word, num_words) * text.mask[:, None]
                attention = attention.to(logits.dtype)
        return RelatednessOutput(logits, attention)

    def bytes_per_query(self, num_boxes: int, num_words: int) -> int:
        return 4 * num_boxes * (4 + 3 * num_words)


@TEXT_ENCODER_REGISTRY.register()
class CategoryMentions(TextEncoder):
    """The mentions of a query; the features of each are its cosines with the category names.

    It has no weights and saves nothing to checkpoints.

    Args:
        category_names: of the detector's C classes, in their order.
        pipeline, word_vectors: see `category_matcher`.
    """

    @configurable
    def __init__(
        self, *, category_names: Sequence[str], pipeline: str = "", word_vectors: str = ""
    ):
        super().__init__()
        self.output_dim = len(category_names)
        self.matcher = category_matcher(category_names, pipeline, word_vectors)
        # Moves with the model and tells the device of the features.
        self.register_buffer("anchor", torch.empty(0), persistent=False)

    @classmethod
    def from_config(cls, cfg):
        pseudo_gt = cfg.MODEL.VLNMS.PSEUDO_GT
        return {
            "category_names": category_names(cfg),
            "pipeline": pseudo_gt.SPACY_PIPELINE,
            "word_vectors": pseudo_gt.WORD_VECTORS,
        }

    def tokenize(self, query: str) -> list[str]:
        """The mentions of `query` that match some category."""
        [(mentions, _)] = self.matcher.compare([query])
        return mentions

    def forward(self, queries: list[str]) -> TextFeatures:
        """Encode queries.

        Args:
            queries: Q strings.

        Returns:
            TextFeatures with words [Q, L, C], cosines from -1 to 1. A query that names no category
            has no words.
        """
        cosines = [torch.from_numpy(table) for table in self.matcher.cosines(queries)]
        return pad_features(cosines, self.output_dim, self.anchor.device)


def category_names(cfg) -> list[str]:
    """The names of the detector's classes: `MODEL.VLNMS.CATEGORY.NAMES`, or those of its data set.

    Raises:
        ValueError: the names are unknown, or there are not as many as the detector has classes.
    """
    num_classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    advice = (
        f"give MODEL.VLNMS.CATEGORY.NAMES the names of the {num_classes} classes "
        "(MODEL.ROI_HEADS.NUM_CLASSES) in the order of the detector's"
    )
    names, source = list(cfg.MODEL.VLNMS.CATEGORY.NAMES), "MODEL.VLNMS.CATEGORY.NAMES"
    if not names:
        for dataset in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
            names = MetadataCatalog.get(dataset).get("thing_classes")
            if names:
                source = f"the data set {dataset}"
                break
        else:
            raise ValueError(
                "the names of the detector's classes are not known: no data set of DATASETS.TEST "
                f"or DATASETS.TRAIN has thing_classes; {advice}"
            )
    if len(names) != num_classes:
        raise ValueError(f"{source} has {len(names)} category names; {advice}")
    return names
