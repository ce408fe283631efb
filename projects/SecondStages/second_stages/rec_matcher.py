"""A reference matcher of referring expressions and boxes, modeled on MAttNet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vlnms_d2.modeling.text import BiGRU, TextFeatures, Vocabulary

from .store import ImageRegions

MODULES = ("subject", "location", "relation")
NUM_NEIGHBOURS = 5
PLACE_DIM, OFFSET_DIM = 5, 5


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
        """The boxes of images; if `index` (int64) is given, only these boxes of each image."""
        index = [torch.arange(len(one)) for one in images] if index is None else index
        pairs = list(zip(images, index, strict=True))
        lengths = torch.tensor([len(one) for one in index])
        features, classes, boxes = (
            pad_sequence([getattr(image, name)[at] for image, at in pairs], batch_first=True)
            for name in ("features", "classes", "boxes")
        )
        mask = torch.arange(features.shape[1]) < lengths[:, None]
        sizes = torch.tensor([one.size for one in images], dtype=torch.float32)
        return cls(features.float(), classes, boxes, mask, sizes)


class Layout(NamedTuple):
    """The location of the boxes of B images, padded to N.

    Attributes:
        place: float [B, N, 5], corners relative to the image's size, and the share of its area.
        same: float [B, N, 5, 5], offsets to the nearest boxes of the same class; 0 if there
            are fewer.
        others: int64 [B, N, 5], the nearest boxes of other classes, for the relation module.
        offsets: float [B, N, 5, 5], the offsets to them.
        is_other: bool [B, N, 5], False if there are fewer.
    """

    place: Tensor
    same: Tensor
    others: Tensor
    offsets: Tensor
    is_other: Tensor


class ModularLanguage(nn.Module):
    """Attention over the words and a weight for each module.

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
        """Compose a phrase for each module.

        Args:
            text: of Q expressions; the phrases of one without words are zero.

        Returns:
            Phrases float [Q, M, D], and module weights float [Q, M] with sum 1.
        """
        mask = text.mask[:, :, None]
        logits = self.attention(text.words).masked_fill(~mask, torch.finfo(text.words.dtype).min)
        weights = logits.softmax(dim=1) * mask
        phrases = weights.transpose(1, 2) @ text.words
        whole = text.words.sum(1) / text.mask.sum(1, keepdim=True).clamp(min=1)
        return phrases, self.module_weights(whole).softmax(dim=-1)


class RECMatcher(nn.Module):
    """Scores each box by its appearance, its location and its neighbors.

    Source: MAttNet (Yu et al. 2018). Each of three modules composes a phrase by attention over the
    words and compares it with the boxes, by the cosine of two projections; the expression weights
    the sum of the three. Simpler than MAttNet: no attention over the cells of a box, no attribute
    loss, and one linear layer for each phrase.

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
        # Mean and scale of the features of the training boxes; see `fit_scale`.
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
        appearance = self._appearance(boxes)
        projected = [
            F.normalize(layer(phrases[:, i]), dim=-1) for i, layer in enumerate(self.phrases)
        ]
        place = _place_in_image(image, len(appearance))
        scores = torch.stack(
            [
                _cosines(self._subject(appearance), projected[0], image, place),
                _cosines(self._location(around), projected[1], image, place),
                self._best_relation(appearance, around, projected[2], image, place),
            ],
            dim=1,
        )
        total = (weights[:, :, None] * scores).sum(1) * self.log_temperature.exp()
        return total.masked_fill(~boxes.mask[image], float("-inf"))

    def _appearance(self, boxes: BoxBatch) -> Tensor:
        """The appearance of each box: float [B, N, hidden]."""
        features = (boxes.features - self.mean) / self.scale
        return self.appearance(self.dropout(features)) + self.class_embedding(boxes.classes)

    def _subject(self, appearance: Tensor) -> Tensor:
        return F.normalize(self.subject(appearance), dim=-1)

    def _location(self, around: Layout) -> Tensor:
        place = torch.cat([around.place, around.same.flatten(2)], dim=-1)
        return F.normalize(self.location(place), dim=-1)

    def _best_relation(
        self, appearance: Tensor, around: Layout, phrases: Tensor, image: Tensor, place: Tensor
    ) -> Tensor:
        """The cosine of the best neighbor, float [Q, N]; -1 if a box has none."""
        batch = torch.arange(len(appearance), device=appearance.device)[:, None, None]
        neighbours = torch.cat([appearance[batch, around.others], around.offsets], dim=-1)
        related = F.normalize(self.relation(neighbours), dim=-1)
        cosines = _cosines(related.flatten(1, 2), phrases, image, place)
        cosines = cosines.unflatten(1, (-1, NUM_NEIGHBOURS))
        return cosines.masked_fill(~around.is_other[image], -1.0).amax(dim=-1)


def _mlp(input_dim: int, hidden_dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(input_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, hidden_dim)
    )


def _place_in_image(image: Tensor, num_images: int) -> Tensor:
    """The position of each expression among those of its image, int64 [Q]; images int64 [Q]."""
    order = image.argsort(stable=True)
    counts = image.bincount(minlength=num_images)
    first = (counts.cumsum(0) - counts)[image[order]]
    place = torch.empty_like(image)
    place[order] = torch.arange(len(image), device=image.device) - first
    return place


def _cosines(boxes: Tensor, phrases: Tensor, image: Tensor, place: Tensor) -> Tensor:
    """The products of phrases [Q, H] with the boxes [B, N, H] of their image: float [Q, N].

    Computed by one matrix product for each image, as copying the boxes for each expression would
    take most of the training time.
    """
    most = int(place.max()) + 1 if len(place) else 0
    padded = phrases.new_zeros(len(boxes), most, phrases.shape[-1]).index_put(
        (image, place), phrases
    )
    return (padded @ boxes.transpose(1, 2))[image, place]


def lay_out(boxes: Tensor, classes: Tensor, mask: Tensor, sizes: Tensor) -> Layout:
    """Describe the location of boxes (MAttNet, Sec. 3.2).

    Args:
        boxes: float [B, N, 4], xyxy in pixels.
        classes: int64 [B, N].
        mask: bool [B, N], False where there is padding.
        sizes: float [B, 2], (height, width) of the images in pixels.
    """
    height, width = sizes[:, None, 0], sizes[:, None, 1]
    x1, y1, x2, y2 = boxes.unbind(-1)
    w, h = (x2 - x1).clamp(min=1), (y2 - y1).clamp(min=1)
    share = w * h / (width * height)
    place = torch.stack([x1 / width, y1 / height, x2 / width, y2 / height, share], dim=-1)

    offsets = _offsets(boxes, torch.stack([w, h], dim=-1))
    centres = (boxes[..., :2] + boxes[..., 2:]) / 2
    distance = torch.cdist(centres, centres)
    itself = torch.eye(boxes.shape[1], dtype=torch.bool, device=boxes.device)
    eligible = mask[:, :, None] & mask[:, None, :] & ~itself
    same_class = classes[:, :, None] == classes[:, None, :]
    nearest_same, is_same = _nearest(distance, eligible & same_class)
    others, is_other = _nearest(distance, eligible & ~same_class)
    return Layout(
        place,
        _take(offsets, nearest_same) * is_same[..., None],
        others,
        _take(offsets, others) * is_other[..., None],
        is_other,
    )


def _offsets(boxes: Tensor, extents: Tensor) -> Tensor:
    """Offsets [B, N, N, 5] from each box to each other one, relative to the size of the former: of
    the corners, and the ratio of the areas."""
    differences = boxes[:, None, :, :] - boxes[:, :, None, :]
    corners = differences / extents.repeat(1, 1, 2)[:, :, None, :]
    area = extents.prod(-1)
    ratio = area[:, None, :] / area[:, :, None]
    # Offsets from a tiny box would be huge.
    return torch.cat([corners, ratio[..., None]], dim=-1).clamp(-20, 20)


def _nearest(distance: Tensor, eligible: Tensor) -> tuple[Tensor, Tensor]:
    """The indices [B, N, 5] of the nearest eligible boxes, and whether each exists."""
    distance = distance.masked_fill(~eligible, float("inf"))
    count = min(NUM_NEIGHBOURS, distance.shape[-1])
    nearest = distance.sort(dim=-1, stable=True)
    index, real = nearest.indices[..., :count], nearest.values[..., :count].isfinite()
    missing = NUM_NEIGHBOURS - count
    return (
        torch.nn.functional.pad(index, (0, missing)),
        torch.nn.functional.pad(real, (0, missing), value=False),
    )


def _take(offsets: Tensor, index: Tensor) -> Tensor:
    return offsets.gather(2, index[..., None].expand(-1, -1, -1, offsets.shape[-1]))
