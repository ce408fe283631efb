"""What a query says of the detector's categories, by word vectors and nothing trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import configurable
from detectron2.data import MetadataCatalog

from ...language.matching import category_matcher
from .encoder import TEXT_ENCODER_REGISTRY, TextEncoder, TextFeatures, pad_features


@TEXT_ENCODER_REGISTRY.register()
class CategoryMentions(TextEncoder):
    """The mentions of a query; the features of each are its cosines with the category names.

    Nothing here learns, and nothing of it is saved with the weights.

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
        # Moves with the model, to say on which device the features are wanted.
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
        cosines = [torch.from_numpy(own) for own in self.matcher.cosines(queries)]
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
