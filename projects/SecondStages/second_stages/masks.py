"""Masks of the boxes that second stages chose, by the detector's mask head."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from vlnms_d2.evaluation.grounding import RESEvaluator

from .runs import CHOICES_VERSION


@torch.no_grad()
def masks_of_boxes(model: nn.Module, image_input: dict, boxes: Tensor, classes: Tensor) -> Tensor:
    """What the mask head of a stock `GeneralizedRCNN` says of given boxes.

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
    # The postprocessing leaves out empty boxes.
    given.place = torch.arange(len(boxes))
    [output] = model.inference([image_input], [given.to(model.device)])
    found = output["instances"].to("cpu")
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    masks[found.place] = found.pred_masks
    return masks


def read_choices(path: Path) -> dict[int, list[list[float]]]:
    """The boxes and classes that `write_choices` wrote, by image id.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no such file, or of another version.
    """
    advice = "make it with tools/train_second_stage.py rec"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {advice}")
    try:
        content = json.loads(path.read_text())
        version, chosen = content["version"], content["chosen"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is no file of choices ({error!r}); {advice}") from error
    if version != CHOICES_VERSION:
        raise ValueError(f"{path} has version {version!r}, expected {CHOICES_VERSION}; {advice}")
    return {int(image_id): own for image_id, own in chosen.items()}


def evaluate_masks(
    model: nn.Module,
    mapper: Callable[[dict], dict],
    dataset_name: str,
    dataset_dicts: Sequence[dict[str, Any]],
    choices: Mapping[Path, Mapping[int, Sequence[Sequence[float]]]],
) -> None:
    """Write `res_<data set>.json` for each of several runs; each image is looked at once.

    Args:
        model: see `masks_of_boxes`.
        mapper: from a dataset dict to a model input.
        dataset_name: names the results.
        dataset_dicts: images with annotated masks and expressions.
        choices: by the folder of a run what it chose; see `read_choices`.
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
        for evaluator, own in zip(evaluators.values(), place.split(counts), strict=True):
            instances = Instances(size, pred_masks=masks[own], scores=torch.ones(len(own)))
            instances.query_index = torch.arange(len(own))
            evaluator.process([image_input], [{"instances": instances}])
    for evaluator in evaluators.values():
        evaluator.evaluate()
