"""Training the reference retrieval model, and comparing all pairs of a split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlnms_d2.modeling.text import TextFeatures, Vocabulary

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
        images: their boxes with features.
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
    *,
    num_boxes: int | None = None,
) -> None:
    """Train the model, in place, to tell which caption of a batch belongs to which image.

    In each epoch every image comes once, with one of its captions. The loss is of all negatives at
    first (`EASY_SHARE`), then of the hardest ones. Where boxes depend on the caption, each pair of
    a batch has its own, and a batch has images that were asked the same captions.

    Args:
        model: with random weights.
        dataset_dicts: with captions.
        images: their boxes with features; of a VL-NMS those for the captions of a group of images.
        seed: of the order and of the captions drawn.
        schedule: how long and how fast.
        num_boxes: only the first so many of each image, or of each pair; None for all.

    Raises:
        ValueError: an image has no boxes for captions of its own.
    """
    draws = torch.Generator().manual_seed(seed)

    def loss(index: list[int], done: float) -> Tensor:
        own = [dataset_dicts[i]["expressions"] for i in index]
        drawn = [one[int(torch.randint(len(one), (), generator=draws))] for one in own]
        text = model.encode_captions([one["query"] for one in drawn])
        regions = [images[dataset_dicts[i]["image_id"]] for i in index]
        rows = _rows_of([one["sent_id"] for one in drawn], regions[0])
        similarities = _compare(model, regions, text, rows, num_boxes)
        return triplet_loss(similarities, hardest=done >= EASY_SHARE)

    optimise(model, loss, _asked_the_same(dataset_dicts, images), schedule, seed)


def _asked_the_same(
    dataset_dicts: Sequence[dict], images: Mapping[int, ImageRegions]
) -> list[list[int]]:
    """The numbers of the images in groups of those that were asked the same captions."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, one in enumerate(dataset_dicts):
        sent_ids = images[one["image_id"]].sent_ids
        asked = () if sent_ids is None else tuple(sent_ids.tolist())
        if sent_ids is not None and not {e["sent_id"] for e in one["expressions"]} <= set(asked):
            raise ValueError(
                f"image {one['image_id']} has no boxes for captions of its own; extract them with "
                "--top N --group N"
            )
        groups.setdefault(asked, []).append(i)
    return list(groups.values())


def _rows_of(sent_ids: Sequence[int], regions: ImageRegions) -> list[int]:
    """Which of the captions that an image was asked these are; none where it was asked none."""
    if regions.sent_ids is None:
        return []
    row = {sent_id: k for k, sent_id in enumerate(regions.sent_ids.tolist())}
    return [row[sent_id] for sent_id in sent_ids]


def _compare(
    model: StackedCrossAttention,
    regions: Sequence[ImageRegions],
    text: TextFeatures,
    rows: Sequence[int] | slice,
    num_boxes: int | None,
) -> Tensor:
    """Compare I images with C captions, each pair on the boxes that it has: float [I, C].

    Args:
        model: of boxes and words.
        regions: of the images; of a VL-NMS all asked the same captions.
        text: of the captions, encoded.
        rows: which of those that a VL-NMS was asked the captions are.
        num_boxes: only the first so many of each image, or of each pair; None for all.
    """
    if regions[0].kept is None:
        boxes, mask = _pad([one.features[:num_boxes] for one in regions])
        return model(model.encode_boxes(boxes), mask, text)
    boxes, _ = _pad([one.features for one in regions])
    # [I, C, K] from the transposed lists, as these are padded in their first dimension.
    kept = [one.kept[rows, :num_boxes].T for one in regions]
    kept = pad_sequence(kept, batch_first=True, padding_value=-1).transpose(1, 2)
    image = torch.arange(len(regions))[:, None, None]
    chosen = model.encode_boxes(boxes)[image, kept.clamp(min=0)]
    return model.compare_pairs(chosen, kept >= 0, text)


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
        if regions.kept is not None and len(regions.kept) != len(text):
            raise ValueError(
                f"image {regions.image_id} has boxes for {len(regions.kept)} captions, expected "
                f"{len(text)}; extract them with --top N"
            )
        yield one["image_id"], _compare(model, [regions], text, slice(None), num_boxes)[0]


def _pad(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Features [I, N, D] and mask [I, N] of images with different numbers of boxes."""
    lengths = torch.tensor([len(own) for own in features])
    padded = pad_sequence([own.float() for own in features], batch_first=True)
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]
