"""A reference matcher of referring expressions and boxes, in the manner of MAttNet."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vlnms_d2.modeling.text import BiGRU, TextFeatures, Vocabulary

from .language import ModularLanguage
from .layout import NUM_NEIGHBOURS, OFFSET_DIM, PLACE_DIM, Layout, lay_out
from .store import ImageRegions

MODULES = ("subject", "location", "relation")


@dataclass
class BoxBatch:
    """The boxes of B images, padded to N.

    Attributes:
        features: float [B, N, D].
        classes: int64 [B, N].
        boxes: float [B, N, 4], xyxy in pixels.
        mask: bool [B, N], False where there is padding.
        sizes: float [B, 2], (height, width) in pixels.
    """

    features: Tensor
    classes: Tensor
    boxes: Tensor
    mask: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, images: list[ImageRegions], index: list[Tensor] | None = None) -> BoxBatch:
        """The boxes of images; of each those at `index` (int64), where given."""
        index = [torch.arange(len(one)) for one in images] if index is None else index
        pairs = list(zip(images, index, strict=True))
        lengths = torch.tensor([len(own) for own in index])
        features, classes, boxes = (
            pad_sequence([getattr(one, name)[own] for one, own in pairs], batch_first=True)
            for name in ("features", "classes", "boxes")
        )
        mask = torch.arange(features.shape[1]) < lengths[:, None]
        sizes = torch.tensor([one.size for one in images], dtype=torch.float32)
        return cls(features.float(), classes, boxes, mask, sizes)


class RECMatcher(nn.Module):
    """Scores each box by what it is, where it is and what is around it.

    Source: MAttNet (Yu et al. 2018). Three modules each match a phrase that attention over the
    words composes with the boxes, by the cosine of two projections; their sum is weighted by the
    expression. Plainer than MAttNet: no attention over the cells of a box, no attribute loss, one
    linear layer for each phrase.

    Args:
        vocabulary: of the expressions.
        feature_dim: D, of the boxes' features.
        num_classes: of the detector.
        hidden_dim: of the projections.
        embed_dim, gru_dim: of the words and of the BiGRU, per direction.
        dropout: of features and words.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        feature_dim: int,
        num_classes: int,
        *,
        hidden_dim: int = 192,
        embed_dim: int = 96,
        gru_dim: int = 96,
        max_words: int = 20,
        dropout: float = 0.2,
    ):
        super().__init__()
        self.text = BiGRU(
            vocabulary=vocabulary, embed_dim=embed_dim, hidden_dim=gru_dim, max_words=max_words
        )
        word_dim = self.text.output_dim
        self.language = ModularLanguage(word_dim, len(MODULES))
        self.phrases = nn.ModuleList(nn.Linear(word_dim, hidden_dim) for _ in MODULES)
        # The features' own means and scales: those of the training boxes, see `fit_scale`.
        self.register_buffer("mean", torch.zeros(feature_dim))
        self.register_buffer("scale", torch.ones(feature_dim))
        self.class_embedding = nn.Embedding(num_classes, hidden_dim)
        self.appearance = nn.Linear(feature_dim, hidden_dim)
        self.subject = _mlp(hidden_dim, hidden_dim)
        place_dim = PLACE_DIM + NUM_NEIGHBOURS * OFFSET_DIM
        self.location = _mlp(place_dim, hidden_dim)
        self.relation = _mlp(hidden_dim + OFFSET_DIM, hidden_dim)
        self.dropout = nn.Dropout(dropout)
        self.log_temperature = nn.Parameter(torch.tensor(2.5))

    @torch.no_grad()
    def fit_scale(self, features: Tensor) -> None:
        """Standardise features as those of the training boxes, float [N, D]."""
        self.mean.copy_(features.mean(0))
        self.scale.copy_(features.std(0).clamp(min=1e-4))

    def forward(self, boxes: BoxBatch, queries: list[str], image: Tensor) -> Tensor:
        """Score every box of its image for each expression.

        Args:
            boxes: of B images.
            queries: Q expressions.
            image: int64 [Q], which of the images each is about.

        Returns:
            Float [Q, N], scaled for a softmax over the boxes; -inf where there is padding.
        """
        text = self.text(queries)
        text = TextFeatures(self.dropout(text.words), text.mask)
        phrases, weights = self.language(text)
        around = lay_out(boxes.boxes, boxes.classes, boxes.mask, boxes.sizes)
        looks = self._looks(boxes)
        asked = [F.normalize(layer(phrases[:, i]), dim=-1) for i, layer in enumerate(self.phrases)]
        place = _place_in_image(image, len(looks))
        scores = torch.stack(
            [
                _cosines(self._subject(looks), asked[0], image, place),
                _cosines(self._location(around), asked[1], image, place),
                self._best_relation(looks, around, asked[2], image, place),
            ],
            dim=1,
        )
        total = (weights[:, :, None] * scores).sum(1) * self.log_temperature.exp()
        return total.masked_fill(~boxes.mask[image], float("-inf"))

    def _looks(self, boxes: BoxBatch) -> Tensor:
        """What each box shows: float [B, N, hidden]."""
        features = (boxes.features - self.mean) / self.scale
        return self.appearance(self.dropout(features)) + self.class_embedding(boxes.classes)

    def _subject(self, looks: Tensor) -> Tensor:
        return F.normalize(self.subject(looks), dim=-1)

    def _location(self, around: Layout) -> Tensor:
        place = torch.cat([around.place, around.same.flatten(2)], dim=-1)
        return F.normalize(self.location(place), dim=-1)

    def _best_relation(
        self, looks: Tensor, around: Layout, asked: Tensor, image: Tensor, place: Tensor
    ) -> Tensor:
        """The cosine of the best neighbour, float [Q, N]; -1 where a box has none."""
        batch = torch.arange(len(looks), device=looks.device)[:, None, None]
        neighbours = torch.cat([looks[batch, around.others], around.offsets], dim=-1)
        found = F.normalize(self.relation(neighbours), dim=-1)
        cosines = _cosines(found.flatten(1, 2), asked, image, place)
        cosines = cosines.unflatten(1, (-1, NUM_NEIGHBOURS))
        return cosines.masked_fill(~around.is_other[image], -1.0).amax(dim=-1)


def _mlp(input_dim: int, hidden_dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(input_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, hidden_dim)
    )


def _place_in_image(image: Tensor, num_images: int) -> Tensor:
    """Which of its image's expressions each is, int64 [Q], for images int64 [Q]."""
    order = image.argsort(stable=True)
    counts = image.bincount(minlength=num_images)
    first = (counts.cumsum(0) - counts)[image[order]]
    place = torch.empty_like(image)
    place[order] = torch.arange(len(image), device=image.device) - first
    return place


def _cosines(boxes: Tensor, asked: Tensor, image: Tensor, place: Tensor) -> Tensor:
    """The products of boxes [B, N, H] with what is asked of their image [Q, H]: float [Q, N].

    One product of matrices for each image: to give each expression a copy of its image's boxes
    would take most of the time of training.
    """
    most = int(place.max()) + 1 if len(place) else 0
    padded = asked.new_zeros(len(boxes), most, asked.shape[-1]).index_put((image, place), asked)
    return (padded @ boxes.transpose(1, 2))[image, place]
