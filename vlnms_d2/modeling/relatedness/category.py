"""Relatedness without training, from the name of the candidate's category.

`CategoryMentions` encodes a query by the similarity of its nouns to the category names; `Category`
scores the candidates by it. The comparison is that of the paper's pseudo ground truth (Sec. 3.3).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.data import MetadataCatalog
from torch import Tensor

from ...language.matching import category_matcher
from ..text.build import TEXT_ENCODER_REGISTRY, TextEncoder, TextFeatures, pad_features
from .build import RELATEDNESS_REGISTRY, Relatedness, RelatednessOutput


@RELATEDNESS_REGISTRY.register()
class Category(Relatedness):
    """A logistic curve of how well any noun of the query fits the candidate's category.

    It uses a candidate's class and nothing else: among candidates of one class the detector's
    confidence decides. This makes any Detectron2 detector query-aware before anything is trained.

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
        self,
        visual: Tensor,
        locations: Tensor,
        text: TextFeatures,
        with_attention: bool = False,
    ) -> RelatednessOutput:
        """Score every box against every query.

        Args:
            visual: float [N, C], the one-hot class of each box.
            locations: unused.
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


@TEXT_ENCODER_REGISTRY.register()
class CategoryMentions(TextEncoder):
    """The mentions of a query; the features of each are its cosines with the category names.

    Nothing here is trained or saved with the weights.

    Args:
        category_names: of the detector's C classes, in their order.
        pipeline, word_vectors: see `category_matcher`.
    """

    @configurable
    def __init__(
        self,
        *,
        category_names: Sequence[str],
        pipeline: str = "",
        word_vectors: str = "",
    ):
        super().__init__()
        self.output_dim = len(category_names)
        self.matcher = category_matcher(category_names, pipeline, word_vectors)
        # Moves with the model, and so tells the device of the features.
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
        """The mentions of `query` that name some category."""
        [(mentions, _)] = self.matcher.compare([query])
        return mentions

    def forward(self, queries: list[str]) -> TextFeatures:
        """Encode queries.

        Args:
            queries: Q strings.

        Returns:
            TextFeatures with words [Q, L, C], cosines from -1 to 1. A query that names no category
            is one without words.
        """
        cosines = [torch.from_numpy(query) for query in self.matcher.cosines(queries)]
        return pad_features(cosines, self.output_dim, self.anchor.device)


def category_names(cfg) -> list[str]:
    """The names of the detector's classes: `MODEL.VLNMS.CATEGORY.NAMES`, or those of its data set.

    Raises:
        ValueError: they are not known, or are not as many as the detector has classes.
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
