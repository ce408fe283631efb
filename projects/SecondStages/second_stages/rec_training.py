"""Training of the reference matcher on annotated boxes, and its choice among proposals."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vlnms_d2.modeling.text import Vocabulary

from .optimisation import Schedule, batches, optimise
from .rec_matcher import BoxBatch, RECMatcher
from .store import ImageRegions, visible_boxes

logger = logging.getLogger(__name__)

SCHEDULE = Schedule(epochs=12, images_per_batch=16, lr=2e-3, weight_decay=1e-4)


@dataclass
class Choice:
    """The choice of the matcher for an expression.

    Attributes:
        box: index among the boxes of the image and source.
        score: score of the matcher.
    """

    box: int
    score: float


def build_matcher(
    dataset_dicts: Sequence[dict], images: Mapping[int, ImageRegions], num_classes: int, seed: int
) -> RECMatcher:
    """Build a matcher with random weights and the vocabulary of the training expressions.

    Args:
        dataset_dicts: to train on.
        images: their annotated boxes with features.
        num_classes: of the detector.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    vocabulary = Vocabulary.build(e["query"] for one in dataset_dicts for e in one["expressions"])
    first = next(iter(images.values()))
    matcher = RECMatcher(vocabulary, first.features.shape[1], num_classes)
    matcher.fit_scale(torch.cat([one.features for one in images.values()]).float())
    return matcher


def train_matcher(
    matcher: RECMatcher,
    dataset_dicts: Sequence[dict],
    images: Mapping[int, ImageRegions],
    seed: int,
    schedule: Schedule = SCHEDULE,
) -> None:
    """Train a matcher, in place, to select the referent among the annotated boxes of its image.

    The loss is the cross-entropy of a softmax over the boxes of the image, whereas MAttNet uses a
    ranking loss against one other box and one other expression.

    Args:
        matcher: with random weights.
        dataset_dicts: with expressions that have referents.
        images: their annotated boxes with features.
        seed: of the order and the dropout.
        schedule: how long and how fast.
    """
    torch.manual_seed(seed)
    targets = [_targets(one, images[one["image_id"]]) for one in dataset_dicts]

    def loss(index: list[int], done: float) -> Tensor:
        chosen = [dataset_dicts[i] for i in index]
        boxes = BoxBatch.of([images[one["image_id"]] for one in chosen])
        queries = [e["query"] for one in chosen for e in one["expressions"]]
        target = torch.cat([targets[i] for i in index])
        scores = matcher(boxes, queries, _image_of_query(chosen))
        return F.cross_entropy(scores, target)

    optimise(matcher, loss, [range(len(dataset_dicts))], schedule, seed)


@torch.no_grad()
def choose(
    matcher: RECMatcher,
    dataset_dicts: Sequence[dict],
    images: Mapping[int, ImageRegions],
    threshold: float | None,
    images_per_batch: int = 8,
) -> dict[int, list[Choice]]:
    """Let a matcher choose a box for every expression.

    Args:
        matcher: trained.
        dataset_dicts: with expressions.
        images: the boxes to choose from.
        threshold: see `visible_boxes`.
        images_per_batch: number of images scored together.

    Returns:
        One choice per expression, by image id.
    """
    matcher.eval()
    choices = {}
    for index in batches(len(dataset_dicts), images_per_batch):
        chosen = [dataset_dicts[i] for i in index]
        # The neighbors of a box depend on the query, so that each query has its own set of boxes.
        regions, visible, queries = [], [], []
        for one in chosen:
            image = images[one["image_id"]]
            queries += [e["query"] for e in one["expressions"]]
            visible += visible_boxes(image, len(one["expressions"]), threshold)
            regions += [image] * len(one["expressions"])
        scores = matcher(BoxBatch.of(regions, visible), queries, torch.arange(len(queries)))
        best = scores.max(dim=1)
        batch_choices = iter(
            Choice(int(index_of_box[at]), float(score))
            for index_of_box, at, score in zip(visible, best.indices, best.values, strict=True)
        )
        for one in chosen:
            choices[one["image_id"]] = [next(batch_choices) for _ in one["expressions"]]
    return choices


def _targets(dataset_dict: dict, regions: ImageRegions) -> Tensor:
    """The index of the referent of each expression among the annotated boxes."""
    place = {ann_id: i for i, ann_id in enumerate(regions.ids.tolist())}
    try:
        return torch.tensor([place[e["ann_id"]] for e in dataset_dict["expressions"]])
    except KeyError as error:
        raise ValueError(
            f"{dataset_dict['file_name']}: an expression's referent is annotation {error}, which "
            "the stored boxes do not have; extract the annotated boxes of this data set again"
        ) from None


def _image_of_query(dataset_dicts: Sequence[dict]) -> Tensor:
    counts = torch.tensor([len(one["expressions"]) for one in dataset_dicts])
    return torch.arange(len(counts)).repeat_interleave(counts)
