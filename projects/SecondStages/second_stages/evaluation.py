"""Evaluation of trained second stages on stored boxes of several sources."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from vlnms_d2.evaluation.grounding import PhraseGroundingEvaluator, RECEvaluator, RESEvaluator
from vlnms_d2.evaluation.retrieval import RetrievalEvaluator
from vlnms_d2.file_io import shown, write_json

from .rec_matcher import RECMatcher
from .rec_training import Choice, choose
from .retrieval import StackedCrossAttention, compare_all
from .store import (
    DETECTOR,
    GROUND_TRUTH,
    ImageRegions,
    load_regions,
    real_threshold,
    regions_file,
    visible_boxes,
)

CHOICES_VERSION = 1


@dataclass
class Split:
    """A data set with its boxes from one source.

    Attributes:
        name: of the data set.
        dataset_dicts: its images with expressions.
        images: the boxes by image id.
    """

    name: str
    dataset_dicts: Sequence[dict[str, Any]]
    images: Mapping[int, ImageRegions]

    @classmethod
    def load(
        cls,
        name: str,
        dataset_dicts: Sequence[dict],
        cache: Path,
        source: str,
        same_images: Mapping[str, str],
    ) -> Split:
        """Load the boxes of a source from a folder of `tools/extract_second_stage.py`.

        Args:
            name, dataset_dicts: of the data set.
            cache: the folder.
            source: of the boxes.
            same_images: for the name of a data set, another one with the same images, from which
                boxes that do not depend on queries are taken.

        Raises:
            ValueError: the file lacks images of the data set.
        """
        query_free = source in (GROUND_TRUTH, DETECTOR)
        path = regions_file(cache, same_images.get(name, name) if query_free else name, source)
        images = load_regions(path)
        missing = [one["image_id"] for one in dataset_dicts if one["image_id"] not in images]
        if missing:
            raise ValueError(
                f"{path} lacks {len(missing)} images of {name}, such as {missing[0]}; extract it "
                "again with tools/extract_second_stage.py --overwrite"
            )
        return cls(name, dataset_dicts, images)


def evaluate_grounding(
    matcher: RECMatcher,
    splits: Sequence[Split],
    source: str,
    out_dir: Path,
    *,
    mean_proposals: float,
    phrases: bool = False,
) -> None:
    """Let a matcher choose among the boxes of a source; write its choices and their accuracy.

    Each split gives `rec_<data set>.json` (`phrase_grounding_...` for phrases),
    `choices_<data set>.json` and `proposals_<data set>.json`, which has the mean number of visible
    boxes.

    Args:
        matcher: trained.
        splits: the threshold of the real case is chosen on the first (val) for all of them.
        source: of the boxes; there is no threshold for annotated ones.
        out_dir: existing or new folder.
        mean_proposals: per expression at the real operating point.
        phrases: whether the splits have phrases rather than referring expressions.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    threshold = None
    if source != GROUND_TRUTH:
        threshold = real_threshold(splits[0].images, splits[0].dataset_dicts, mean_proposals)
    for split in splits:
        choices = choose(matcher, split.dataset_dicts, split.images, threshold)
        kind = PhraseGroundingEvaluator if phrases else RECEvaluator
        evaluator = kind(split.name, split.dataset_dicts, output_dir=str(out_dir))
        run_evaluator(evaluator, split.dataset_dicts, answers(choices, split.images))
        write_choices(out_dir / f"choices_{split.name}.json", choices, split.images)
        facts = {
            "version": CHOICES_VERSION,
            "threshold": threshold,
            "chosen_here": split is splits[0] and threshold is not None,
            "proposals": _mean_visible(split, threshold),
        }
        write_json(out_dir / f"proposals_{split.name}.json", facts)


def evaluate_retrieval(
    model: StackedCrossAttention,
    split: Split,
    out_dir: Path,
    num_boxes: int | None,
    captions_per_image: int | None = None,
) -> None:
    """Compare all pairs of a split and write `retrieval_<data set>.json`.

    Args:
        model: trained.
        split: images and captions with the boxes of one source.
        out_dir: existing or new folder.
        num_boxes: number of boxes of an image or of a pair; None for all.
        captions_per_image: see `RetrievalEvaluator`.
    """
    evaluator = RetrievalEvaluator(
        split.name,
        split.dataset_dicts,
        output_dir=str(out_dir),
        captions_per_image=captions_per_image,
    )
    for image_id, row in compare_all(model, split.dataset_dicts, split.images, num_boxes):
        evaluator.process([{"image_id": image_id}], [{"similarities": row}])
    evaluator.evaluate()


def run_evaluator(
    evaluator: DatasetEvaluator,
    dataset_dicts: Iterable[dict[str, Any]],
    instances: Mapping[int, Instances],
) -> None:
    """Evaluate one answer for each expression of every image."""
    evaluator.reset()
    for one in dataset_dicts:
        queries = [e["query"] for e in one["expressions"]]
        image_input = {"image_id": one["image_id"], "query": queries}
        evaluator.process([image_input], [{"instances": instances[one["image_id"]]}])
    evaluator.evaluate()


def answers(
    choices: Mapping[int, Sequence[Choice]], images: Mapping[int, ImageRegions]
) -> dict[int, Instances]:
    """The chosen boxes as `Instances`, one for each expression of an image."""
    by_image = {}
    for image_id, chosen in choices.items():
        regions = images[image_id]
        index = torch.tensor([choice.box for choice in chosen], dtype=torch.int64)
        instances = Instances(regions.size)
        instances.pred_boxes = Boxes(regions.boxes[index])
        instances.pred_classes = regions.classes[index]
        instances.scores = torch.tensor([choice.score for choice in chosen])
        instances.query_index = torch.arange(len(chosen))
        by_image[image_id] = instances
    return by_image


def write_choices(
    path: Path,
    choices: Mapping[int, Sequence[Choice]],
    images: Mapping[int, ImageRegions],
) -> None:
    """Write the chosen boxes (xyxy in pixels of the image file) and their classes as JSON.

    Args:
        path: the file.
        choices: one for each expression of an image.
        images: all boxes of the images.
    """
    chosen = {}
    for image_id, image_choices in choices.items():
        regions = images[image_id]
        chosen[str(image_id)] = [
            [*regions.boxes[choice.box].tolist(), int(regions.classes[choice.box])]
            for choice in image_choices
        ]
    write_json(path, {"version": CHOICES_VERSION, "chosen": chosen})


def _mean_visible(split: Split, threshold: float | None) -> float:
    """The mean number of boxes visible for an expression of a split."""
    counts = [
        len(index)
        for one in split.dataset_dicts
        for index in visible_boxes(
            split.images[one["image_id"]], len(one["expressions"]), threshold
        )
    ]
    return sum(counts) / len(counts)


@torch.no_grad()
def masks_of_boxes(model: nn.Module, image_input: dict, boxes: Tensor, classes: Tensor) -> Tensor:
    """Masks of given boxes, by the mask head of a stock `GeneralizedRCNN`.

    Args:
        model: with masks, in eval mode.
        image_input: with "image", "height" and "width".
        boxes: float [N, 4], xyxy in pixels of the image file.
        classes: int64 [N].

    Returns:
        Bool [N, height, width]; an empty box has an empty mask.
    """
    height, width = image_input["height"], image_input["width"]
    network_height, network_width = image_input["image"].shape[-2:]
    scale = torch.tensor([network_width / width, network_height / height] * 2)
    given = Instances((network_height, network_width))
    given.pred_boxes = Boxes(boxes * scale)
    given.pred_classes = classes
    # The postprocessing drops empty boxes.
    given.index = torch.arange(len(boxes))
    [output] = model.inference([image_input], [given.to(model.device)])
    instances = output["instances"].to("cpu")
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    masks[instances.index] = instances.pred_masks
    return masks


def read_choices(path: Path) -> dict[int, list[list[float]]]:
    """The boxes and classes of a file of `write_choices`, by image id.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not such a file, or has another version.
    """
    advice = "make it with tools/train_second_stage.py rec"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {advice}")
    try:
        content = json.loads(path.read_text())
        version, chosen = content["version"], content["chosen"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is no file of choices ({shown(error)}); {advice}") from error
    if version != CHOICES_VERSION:
        raise ValueError(
            f"{path} has version {shown(version)}, expected {CHOICES_VERSION}; {advice}"
        )
    return {int(image_id): rows for image_id, rows in chosen.items()}


def evaluate_masks(
    model: nn.Module,
    mapper: Callable[[dict], dict],
    dataset_name: str,
    dataset_dicts: Sequence[dict[str, Any]],
    choices: Mapping[Path, Mapping[int, Sequence[Sequence[float]]]],
) -> None:
    """Write `res_<data set>.json` for each of several runs; the model runs once on each image.

    Args:
        model: see `masks_of_boxes`.
        mapper: from a dataset dict to a model input.
        dataset_name: names the results.
        dataset_dicts: images with annotated masks and expressions.
        choices: the choices of each run by its folder; see `read_choices`.
    """
    evaluators = {
        folder: RESEvaluator(dataset_name, dataset_dicts, output_dir=str(folder))
        for folder in choices
    }
    for one in dataset_dicts:
        image_input = mapper(one)
        rows = torch.tensor(
            [row for chosen in choices.values() for row in chosen[one["image_id"]]],
            dtype=torch.float32,
        ).view(-1, 5)
        distinct, place = rows.unique(dim=0, return_inverse=True)
        masks = masks_of_boxes(model, image_input, distinct[:, :4], distinct[:, 4].long())
        counts = [len(chosen[one["image_id"]]) for chosen in choices.values()]
        size = image_input["height"], image_input["width"]
        for evaluator, index in zip(evaluators.values(), place.split(counts), strict=True):
            instances = Instances(size, pred_masks=masks[index], scores=torch.ones(len(index)))
            instances.query_index = torch.arange(len(index))
            evaluator.process([image_input], [{"instances": instances}])
    for evaluator in evaluators.values():
        evaluator.evaluate()
