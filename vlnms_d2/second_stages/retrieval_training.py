"""Training the reference retrieval model on annotated boxes, and comparing all pairs of a split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..modeling.text import TextFeatures, Vocabulary
from .cross_attention import StackedCrossAttention, triplet_loss
from .optimisation import Schedule, optimise
from .store import ImageRegions

SCHEDULE = Schedule(epochs=20, images_per_batch=32, lr=2e-3, weight_decay=1e-4)
EASY_SHARE = 0.3  # with the hardest negatives alone, nothing is learnt in the first epochs


def build_cross_attention(
    dataset_dicts: Sequence[dict], images: Mapping[int, ImageRegions], seed: int
) -> StackedCrossAttention:
    """A model with random weights and the vocabulary of its training captions.

    Args:
        dataset_dicts: to train on.
        images: their annotated boxes with features.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    vocabulary = Vocabulary.build(e["query"] for one in dataset_dicts for e in one["expressions"])
    first = next(iter(images.values()))
    model = StackedCrossAttention(vocabulary, first.features.shape[1])
    model.fit_scale(torch.cat([one.features for one in images.values()]).float())
    return model


def train_cross_attention(
    model: StackedCrossAttention,
    dataset_dicts: Sequence[dict],
    images: Mapping[int, ImageRegions],
    seed: int,
    schedule: Schedule = SCHEDULE,
) -> None:
    """Train the model, in place, to tell which caption of a batch belongs to which image.

    In each epoch every image comes once, with one of its captions. The loss is of all negatives at
    first (`EASY_SHARE`), then of the hardest ones.

    Args:
        model: with random weights.
        dataset_dicts: with captions.
        images: their annotated boxes with features.
        seed: of the order and of the captions drawn.
        schedule: how long and how fast.
    """
    draws = torch.Generator().manual_seed(seed)

    def loss(index: list[int], done: float) -> Tensor:
        captions, features = [], []
        for i in index:
            own = dataset_dicts[i]["expressions"]
            drawn = int(torch.randint(len(own), (), generator=draws))
            captions.append(own[drawn]["query"])
            features.append(images[dataset_dicts[i]["image_id"]].features)
        boxes, mask = _pad(features)
        similarities = model(model.encode_boxes(boxes), mask, model.encode_captions(captions))
        return triplet_loss(similarities, hardest=done >= EASY_SHARE)

    optimise(model, loss, len(dataset_dicts), schedule, seed)


@torch.no_grad()
def compare_all(
    model: StackedCrossAttention,
    dataset_dicts: Sequence[dict],
    images: Mapping[int, ImageRegions],
    num_boxes: int | None,
) -> Iterator[tuple[int, Tensor]]:
    """Compare every image with all captions of the data set.

    Args:
        model: trained.
        dataset_dicts: with captions.
        images: the boxes; of a VL-NMS those for each caption of the data set, in its order.
        num_boxes: only the first so many of each image, or of each pair; None for all.

    Yields:
        Image id and similarities, float [C].

    Raises:
        ValueError: the boxes are for another number of captions.
    """
    model.eval()
    captions = [e["query"] for one in dataset_dicts for e in one["expressions"]]
    text = model.encode_captions(captions)
    for one in dataset_dicts:
        regions = images[one["image_id"]]
        encoded = model.encode_boxes(regions.features.float())
        if regions.kept is None:
            boxes = encoded[None, :num_boxes]
            mask = torch.ones(boxes.shape[:2], dtype=torch.bool)
            yield one["image_id"], model(boxes, mask, text)[0]
        else:
            yield one["image_id"], _compare_chosen(model, encoded, regions, text, num_boxes)


def _compare_chosen(
    model: StackedCrossAttention,
    encoded: Tensor,
    regions: ImageRegions,
    text: TextFeatures,
    num_boxes: int | None,
) -> Tensor:
    if len(regions.kept) != len(text):
        raise ValueError(
            f"image {regions.image_id} has boxes for {len(regions.kept)} captions, expected "
            f"{len(text)}; extract them with --top N"
        )
    kept = regions.kept[:, :num_boxes].long()
    return model.compare_pairs(encoded[kept.clamp(min=0)], kept >= 0, text)


def _pad(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Features [I, N, D] and mask [I, N] of images with different numbers of boxes."""
    lengths = torch.tensor([len(own) for own in features])
    padded = pad_sequence([own.float() for own in features], batch_first=True)
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]
