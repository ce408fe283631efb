"""Pseudo ground truth: contextual objects where nobody annotated them (SPEC section 6).

An expression names other objects than its referent. Which of the image's boxes these are is
guessed from the names of the boxes' categories.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.structures import BoxMode
from pycocotools.mask import iou as box_iou

from ..file_io import write_json
from ..language.matching import CategoryMatcher
from .entries import is_finite, is_integer, read_json, require

VERSION = 1
SAME_IOU = 0.9
"""A box that overlaps the referent's by more is the referent, not context."""

_SOURCE = "tools/prepare_data.py makes such files."


def text_similarity(
    images: Sequence[dict[str, Any]], matcher: CategoryMatcher, gamma: float
) -> dict[int, list[int]]:
    """The annotated objects that each expression speaks of, besides its referent.

    An object is context where a noun of the expression and a word of the object's category name
    have a cosine above `gamma`, unless its box is the referent's.

    Args:
        images: dataset dicts in the standard format, with `annotations` and `expressions`.
            Objects of no known class (-1) are never context.
        matcher: with the names of the data set's categories.
        gamma: the least cosine, exclusive.

    Returns:
        sent_id -> ids of annotations, in their order.
    """
    return contexts_of(mentioned_objects(images, matcher, gamma))


def mentioned_objects(
    images: Sequence[dict[str, Any]], matcher: CategoryMatcher, gamma: float
) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Each image with the objects whose category its expressions name, bool [E, A], the referents
    among them. Args as of `text_similarity`."""
    for image, cosines in with_cosines(images, matcher):
        classes = np.array([a["category_id"] for a in image["annotations"]], dtype=np.int64)
        yield image, (cosines[:, classes] > gamma) & (classes >= 0)


def contexts_of(
    mentioned: Iterable[tuple[dict[str, Any], np.ndarray]],
) -> dict[int, list[int]]:
    """The mentioned objects that are not the referent, as `text_similarity` gives them."""
    contexts = {}
    for image, named in mentioned:
        referents = [e["ann_id"] for e in image["expressions"]]
        same = same_box(image["annotations"], referents)
        ids = np.array([a["id"] for a in image["annotations"]], dtype=np.int64)
        for expression, row in zip(image["expressions"], named & ~same, strict=True):
            contexts[expression["sent_id"]] = ids[row].tolist()
    return contexts


def referent_misses(mentioned: Iterable[tuple[dict[str, Any], np.ndarray]]) -> float:
    """Share of the expressions of which no noun fits the category of their own referent, of those
    whose referent has a known one; 0 without any."""
    misses = []
    for image, named in mentioned:
        column = {a["id"]: i for i, a in enumerate(image["annotations"]) if a["category_id"] >= 0}
        for expression, row in zip(image["expressions"], named, strict=True):
            if expression["ann_id"] in column:
                misses.append(not row[column[expression["ann_id"]]])
    return float(np.mean(misses)) if misses else 0.0


def weakly_supervised(
    images: Sequence[dict[str, Any]],
    detections: dict[int, tuple[np.ndarray, np.ndarray]],
    matcher: CategoryMatcher,
    gamma: float,
) -> dict[int, list[list[float]]]:
    """The detected boxes that each expression speaks of (WSPG): no annotation is looked at.

    Args:
        images: dataset dicts in the standard format, with `expressions`.
        detections: per image id the boxes of any detector, float [D, 4], [x, y, width, height] in
            pixels, and their classes, int64 [D].
        matcher: with the names of the detector's categories; compares the heads of noun chunks.
        gamma: the least cosine, exclusive.

    Returns:
        sent_id -> boxes [x, y, width, height] in pixels, in their order.
    """
    pseudo = {}
    nothing = (np.zeros((0, 4)), np.zeros(0, dtype=np.int64))
    for image, cosines in with_cosines(images, matcher):
        boxes, classes = detections.get(image["image_id"], nothing)
        for expression, row in zip(image["expressions"], cosines[:, classes] > gamma, strict=True):
            pseudo[expression["sent_id"]] = boxes[row].tolist()
    return pseudo


def with_cosines(
    images: Sequence[dict[str, Any]], matcher: CategoryMatcher
) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Each image with the cosines [E, C] of its expressions, all texts taken together."""
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
    boxes = np.array([_xywh(annotation) for annotation in annotations], dtype=np.float64)
    # The quickest of the libraries at hand for a few boxes: images are many.
    same = box_iou(boxes, boxes, [False] * len(boxes)) > SAME_IOU
    np.fill_diagonal(same, True)
    nobody = np.zeros((1, len(boxes)), dtype=bool)
    rows = [-1 if ann_id is None else row_of[ann_id] for ann_id in referents]
    return np.concatenate([same, nobody])[rows]


def _xywh(annotation: dict[str, Any]) -> list[float]:
    box, mode = annotation["bbox"], annotation["bbox_mode"]
    return box if mode == BoxMode.XYWH_ABS else BoxMode.convert(box, mode, BoxMode.XYWH_ABS)


def save_pseudo_gt(path: str | Path, dataset: str, settings: dict[str, Any], **found) -> None:
    """Write pseudo ground truth as JSON, whole or not at all.

    Args:
        path: the file.
        dataset: the data set that it is of.
        settings: how it was made.
        found: `contexts`, of `text_similarity`, or `boxes`, of `weakly_supervised`; and
            `statistics`.
    """
    write_json(path, {"version": VERSION, "dataset": dataset, "settings": settings} | found)


def add_pseudo_gt(images: list[dict[str, Any]], path: str | Path) -> list[dict[str, Any]]:
    """Give expressions what a file of pseudo ground truth says of them.

    Args:
        images: dataset dicts in the standard format; left unchanged.
        path: what `save_pseudo_gt` wrote.

    Returns:
        The images with "context_ann_ids" or, of a detector's boxes, "pseudo_boxes" in each
        expression.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or is of another data set.
    """
    path = Path(path)
    content = read_json(path, _SOURCE)
    if content.get("version") != VERSION:
        raise ValueError(
            f"{path}: 'version' is {content.get('version')!r}, expected {VERSION}. {_SOURCE}"
        )
    key = "boxes" if "boxes" in content else "contexts"
    known = require(content, key, dict, str(path))
    is_entry = _is_box if key == "boxes" else is_integer
    field = "pseudo_boxes" if key == "boxes" else "context_ann_ids"
    added = []
    for image in images:
        ann_ids = {annotation["id"] for annotation in image["annotations"]}
        expressions = []
        for expression in image["expressions"]:
            own = known.get(str(expression["sent_id"]))
            right = isinstance(own, list) and all(map(is_entry, own))
            if not right or (key == "contexts" and not ann_ids.issuperset(own)):
                raise ValueError(
                    f"{path}: '{key}' has {own!r} for sentence {expression['sent_id']} of image "
                    f"{image['image_id']}, expected a list of "
                    + ("boxes [x, y, width, height]" if key == "boxes" else "its annotation ids")
                    + ". Make the file again for this data set: tools/prepare_data.py --redo."
                )
            expressions.append(expression | {field: own})
        added.append(image | {"expressions": expressions})
    return added


def _is_box(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 4 and all(map(is_finite, entry))
