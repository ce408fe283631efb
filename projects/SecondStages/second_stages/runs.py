"""Evaluating trained second stages on stored boxes of several sources."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Boxes, Instances

from vlnms_d2.evaluation.grounding import PhraseGroundingEvaluator, RECEvaluator
from vlnms_d2.evaluation.retrieval import RetrievalEvaluator
from vlnms_d2.file_io import write_json

from .cross_attention import StackedCrossAttention
from .proposals import real_threshold, seen_boxes
from .rec_matcher import RECMatcher
from .rec_training import Choice, choose
from .retrieval_training import compare_all
from .store import DETECTOR, GROUND_TRUTH, ImageRegions, load_regions, regions_file

CHOICES_VERSION = 1


@dataclass
class Split:
    """A data set with its boxes from one source.

    Attributes:
        name: of the data set.
        dataset_dicts: its images with expressions.
        images: the boxes, by image id.
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
        """With the boxes of a source from a folder of `tools/extract_second_stage.py`.

        Args:
            name, dataset_dicts: of the data set.
            cache: the folder.
            source: of the boxes.
            same_images: by name of a data set, that of another one of the same images, from which
                boxes are taken that do not depend on queries.

        Raises:
            ValueError: the file lacks images of the data set.
        """
        asks_nothing = source in (GROUND_TRUTH, DETECTOR)
        path = regions_file(cache, same_images.get(name, name) if asks_nothing else name, source)
        images = load_regions(path)
        missing = [one["image_id"] for one in dataset_dicts if one["image_id"] not in images]
        if missing:
            raise ValueError(
                f"{path} lacks {len(missing)} images of {name}, such as {missing[0]}; make it anew "
                "with tools/extract_second_stage.py --overwrite"
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
    """Let a matcher choose among the boxes of a source; write what it chose and how good that is.

    Each split gives `rec_<data set>.json` (`phrase_grounding_...` for phrases),
    `choices_<data set>.json` and `proposals_<data set>.json`, which says how many boxes an
    expression had.

    Args:
        matcher: trained.
        splits: the first is where the threshold of the real case is chosen (val); the others use it
            unchanged.
        source: of the boxes; annotated ones are all seen.
        out_dir: existing or new folder.
        mean_proposals: per expression at the real operating point.
        phrases: they are phrases, not referring expressions.
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
            "proposals": _mean_seen(split, threshold),
        }
        write_json(out_dir / f"proposals_{split.name}.json", facts)


def evaluate_retrieval(
    model: StackedCrossAttention, split: Split, out_dir: Path, num_boxes: int | None
) -> None:
    """Compare all pairs of a split and write `retrieval_<data set>.json`.

    Args:
        model: trained.
        split: images and captions with the boxes of one source.
        out_dir: existing or new folder.
        num_boxes: of an image, or of a pair; None for all.
    """
    evaluator = RetrievalEvaluator(split.name, split.dataset_dicts, output_dir=str(out_dir))
    for image_id, row in compare_all(model, split.dataset_dicts, split.images, num_boxes):
        evaluator.process([{"image_id": image_id}], [{"similarities": row}])
    evaluator.evaluate()


def run_evaluator(
    evaluator: DatasetEvaluator,
    dataset_dicts: Iterable[dict[str, Any]],
    instances: Mapping[int, Instances],
) -> None:
    """Give an evaluator one answer per expression of each image, and evaluate."""
    evaluator.reset()
    for one in dataset_dicts:
        queries = [e["query"] for e in one["expressions"]]
        image_input = {"image_id": one["image_id"], "query": queries}
        evaluator.process([image_input], [{"instances": instances[one["image_id"]]}])
    evaluator.evaluate()


def answers(
    choices: Mapping[int, Sequence[Choice]], images: Mapping[int, ImageRegions]
) -> dict[int, Instances]:
    """The chosen boxes as the model gives its proposals: per image one for each expression."""
    found = {}
    for image_id, own in choices.items():
        regions = images[image_id]
        index = torch.tensor([choice.box for choice in own], dtype=torch.int64)
        instances = Instances(regions.size)
        instances.pred_boxes = Boxes(regions.boxes[index])
        instances.pred_classes = regions.classes[index]
        instances.scores = torch.tensor([choice.score for choice in own])
        instances.query_index = torch.arange(len(own))
        found[image_id] = instances
    return found


def write_choices(
    path: Path,
    choices: Mapping[int, Sequence[Choice]],
    images: Mapping[int, ImageRegions],
) -> None:
    """Write the chosen boxes (xyxy in pixels of the image file) and their classes as JSON.

    Args:
        path: the file.
        choices: per image one for each expression.
        images: the boxes that were chosen from.
    """
    chosen = {}
    for image_id, own in choices.items():
        regions = images[image_id]
        chosen[str(image_id)] = [
            [*regions.boxes[choice.box].tolist(), int(regions.classes[choice.box])]
            for choice in own
        ]
    write_json(path, {"version": CHOICES_VERSION, "chosen": chosen})


def _mean_seen(split: Split, threshold: float | None) -> float:
    """How many boxes an expression of a split sees, on the mean."""
    counts = [
        len(index)
        for one in split.dataset_dicts
        for index in seen_boxes(split.images[one["image_id"]], len(one["expressions"]), threshold)
    ]
    return sum(counts) / len(counts)
