"""Data sets with their pseudo ground truth for contextual objects (paper, Sec. 3.3), which
tools/prepare_data.py makes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..file_io import shown, write_json
from .builtin import datasets_root, registered_images
from .datasets.refer import merge_by_image
from .entries import is_box, is_integer, read_json, require

VERSION = 1
_SOURCE = "tools/prepare_data.py makes such files."


def save_pseudo_gt(path: str | Path, dataset: str, settings: dict[str, Any], **content) -> None:
    """Writes the pseudo ground truth of a data set as JSON, atomically: `contexts`
    (sent_id -> ids of annotations) or `boxes` (sent_id -> [x, y, width, height]), and
    `statistics`."""
    write_json(path, {"version": VERSION, "dataset": dataset, "settings": settings} | content)


def add_pseudo_gt(images: list[dict[str, Any]], path: str | Path) -> list[dict[str, Any]]:
    """Adds the pseudo ground truth of a file (see `save_pseudo_gt`) to expressions.

    Returns:
        Copies of the images, dataset dicts in the standard format, with "context_ann_ids" or, for
        boxes of a detector, "pseudo_boxes" in each expression.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or belongs to another data set.
    """
    path = Path(path)
    content = read_json(path, _SOURCE)
    if content.get("version") != VERSION:
        raise ValueError(
            f"{path}: 'version' is {shown(content.get('version'))}, expected {VERSION}. {_SOURCE}"
        )
    if "boxes" in content:
        key, field, is_entry = "boxes", "pseudo_boxes", is_box
        expected = "boxes [x, y, width, height]"
    else:
        key, field, is_entry = "contexts", "context_ann_ids", is_integer
        expected = "its annotation ids"
    known = require(content, key, dict, str(path))
    added = []
    for image in images:
        ann_ids = {annotation["id"] for annotation in image["annotations"]}
        expressions = []
        for expression in image["expressions"]:
            objects = known.get(str(expression["sent_id"]))
            valid = isinstance(objects, list) and all(map(is_entry, objects))
            if not valid or (key == "contexts" and not ann_ids.issuperset(objects)):
                raise ValueError(
                    f"{path}: '{key}' has {shown(objects)} for sentence {expression['sent_id']} of "
                    f"image {image['image_id']}, expected a list of {expected}. Make the file "
                    "again for this data set: tools/prepare_data.py --redo."
                )
            expressions.append(expression | {field: objects})
        added.append(image | {"expressions": expressions})
    return added


def prepared_folder(folder: str | Path = "") -> Path:
    """Where tools/prepare_data.py writes; by default a folder in `$DETECTRON2_DATASETS`."""
    return Path(folder) if folder else datasets_root() / "vlnms_d2"


def pseudo_gt_file(folder: Path, dataset_name: str) -> Path:
    """The file in `prepared_folder` with the pseudo ground truth of a data set."""
    return folder / dataset_name / "pseudo_gt.json"


def load_expressions(
    dataset_names: Iterable[str], pseudo_gt_dir: str | Path = "", required: bool = False
) -> list[dict]:
    """Loads registered data sets with their pseudo ground truth, from a folder of
    `prepared_folder`. An image of several data sets appears once, with all its expressions.

    Args:
        required: data sets without annotated contextual objects must have pseudo ground truth.

    Raises:
        FileNotFoundError: pseudo ground truth is required and missing.
        ValueError: a file of it is damaged or belongs to another data set.
    """
    loaded = []
    folder = prepared_folder(pseudo_gt_dir)
    for name in dataset_names:
        images = registered_images(name)
        path = pseudo_gt_file(folder, name)
        if path.is_file():
            images = add_pseudo_gt(images, path)
        elif required and not has_contexts(images):
            raise FileNotFoundError(
                f"{path}: no such file, and {name} has no contextual objects of its own. Make it "
                f"with `python tools/prepare_data.py --datasets {name} --out {folder}` "
                "(MODEL.VLNMS.PSEUDO_GT.DIR), or set MODEL.VLNMS.PSEUDO_GT.CONTEXT to False to "
                "train on referents alone."
            )
        loaded.append(images)
    return merge_by_image(*loaded)


def has_contexts(images: list[dict]) -> bool:
    """Whether the contextual objects of all expressions are annotated."""
    return all(e["context_ann_ids"] is not None for image in images for e in image["expressions"])
