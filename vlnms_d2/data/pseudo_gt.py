"""Pseudo ground truth for contextual objects (paper, Sec. 3.3).

An expression mentions other objects than its referent, which data sets do not annotate. They are
estimated by comparing its nouns with the category names of the image's boxes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode
from pycocotools.mask import iou as box_iou

from ..file_io import shown, write_json
from ..language.matching import CategoryMatcher
from .builtin import datasets_root
from .datasets.refer import merge_by_image
from .entries import is_box, is_integer, read_json, require

VERSION = 1
SAME_IOU = 0.9
"""A box whose IoU with the referent is above this is the referent, not context."""

ImageMask = tuple[dict[str, Any], np.ndarray]
"""An image, and an array with a row per expression."""
_SOURCE = "tools/prepare_data.py makes such files."


def text_similarity(
    images: Sequence[dict[str, Any]], matcher: CategoryMatcher, gamma: float
) -> dict[int, list[int]]:
    """The annotated objects that each expression mentions besides its referent.

    An object is context if a noun of the expression and a word of the object's category name have a
    cosine above `gamma`, unless its box is that of the referent.

    Args:
        images: dataset dicts in the standard format, with `annotations` and `expressions`.
            Objects of unknown class (-1) are never context.
        matcher: with the names of the data set's categories.
        gamma: threshold of the cosine, exclusive.

    Returns:
        sent_id -> ids of annotations, in their order.
    """
    return contexts_of(mentioned_objects(images, matcher, gamma))


def mentioned_objects(
    images: Sequence[dict[str, Any]], matcher: CategoryMatcher, gamma: float
) -> Iterator[ImageMask]:
    """Each image with a mask of the objects whose category its expressions mention, bool [E, A],
    referents included. Arguments as in `text_similarity`."""
    for image, cosines in with_cosines(images, matcher):
        classes = np.array([a["category_id"] for a in image["annotations"]], dtype=np.int64)
        yield image, (cosines[:, classes] > gamma) & (classes >= 0)


def contexts_of(mentioned: Iterable[ImageMask]) -> dict[int, list[int]]:
    """The mentioned objects that are not the referent; see `text_similarity`."""
    contexts = {}
    for image, is_mentioned in mentioned:
        referents = [e["ann_id"] for e in image["expressions"]]
        same = same_box(image["annotations"], referents)
        ids = np.array([a["id"] for a in image["annotations"]], dtype=np.int64)
        for expression, row in zip(image["expressions"], is_mentioned & ~same, strict=True):
            contexts[expression["sent_id"]] = ids[row].tolist()
    return contexts


def weakly_supervised(
    images: Sequence[dict[str, Any]],
    detections: dict[int, tuple[np.ndarray, np.ndarray]],
    matcher: CategoryMatcher,
    gamma: float,
) -> dict[int, list[list[float]]]:
    """The detected boxes that each expression mentions (WSPG), without using annotations.

    Args:
        images: dataset dicts in the standard format, with `expressions`.
        detections: by image id, boxes [D, 4], [x, y, width, height] in pixels, and classes [D].
        matcher: with the names of the detector's categories; compares the heads of noun chunks.
        gamma: threshold of the cosine, exclusive.

    Returns:
        sent_id -> boxes [x, y, width, height] in pixels, in their order.
    """
    pseudo = {}
    no_detections = (np.zeros((0, 4)), np.zeros(0, dtype=np.int64))
    for image, cosines in with_cosines(images, matcher):
        boxes, classes = detections.get(image["image_id"], no_detections)
        for expression, row in zip(image["expressions"], cosines[:, classes] > gamma, strict=True):
            pseudo[expression["sent_id"]] = boxes[row].tolist()
    return pseudo


def with_cosines(images: Sequence[dict[str, Any]], matcher: CategoryMatcher) -> Iterator[ImageMask]:
    """Each image with the cosines [E, C] of its expressions; all texts are matched in one call."""
    queries = [e["query"] for image in images for e in image["expressions"]]
    texts = {text: i for i, text in enumerate(dict.fromkeys(queries))}
    cosines = matcher.best_cosines(list(texts))
    for image in images:
        yield image, cosines[[texts[e["query"]] for e in image["expressions"]]]


def same_box(annotations: list[dict[str, Any]], referents: list[int | None]) -> np.ndarray:
    """bool [E, A]: whether the annotation's box is that of the expression's referent."""
    if not annotations:
        return np.zeros((len(referents), 0), dtype=bool)
    row_of = {annotation["id"]: i for i, annotation in enumerate(annotations)}
    boxes = np.array(
        [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYWH_ABS) for a in annotations],
        dtype=np.float64,
    )
    # pycocotools is the fastest for a few boxes at a time.
    same = box_iou(boxes, boxes, [False] * len(boxes)) > SAME_IOU
    np.fill_diagonal(same, True)
    no_referent = np.zeros((1, len(boxes)), dtype=bool)
    rows = [-1 if ann_id is None else row_of[ann_id] for ann_id in referents]
    return np.concatenate([same, no_referent])[rows]


def save_pseudo_gt(path: str | Path, dataset: str, settings: dict[str, Any], **content) -> None:
    """Writes the pseudo ground truth of a data set as JSON, atomically: `contexts` of
    `text_similarity` or `boxes` of `weakly_supervised`, and `statistics`."""
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
        images = DatasetCatalog.get(name)
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
