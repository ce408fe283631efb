"""Pseudo ground truth for contextual objects (paper, Sec. 3.3).

An expression mentions other objects than its referent, which data sets do not annotate. They are
estimated by comparing its nouns with the category names of the image's boxes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from detectron2.structures import BoxMode
from pycocotools.mask import iou as box_iou

from vlnms_d2.language.matching import CategoryMatcher

SAME_IOU = 0.9
"""A box whose IoU with the referent is above this is the referent, not context."""

ImageMask = tuple[dict[str, Any], np.ndarray]
"""An image, and an array with a row per expression."""


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


def referent_misses(mentioned: Iterable[ImageMask]) -> float:
    """Share of expressions without a noun that matches the category of their own referent, among
    those whose referent has a known category; 0 if there are none."""
    misses = []
    for image, is_mentioned in mentioned:
        column = {a["id"]: i for i, a in enumerate(image["annotations"]) if a["category_id"] >= 0}
        for expression, row in zip(image["expressions"], is_mentioned, strict=True):
            if expression["ann_id"] in column:
                misses.append(not row[column[expression["ann_id"]]])
    return float(np.mean(misses)) if misses else 0.0
