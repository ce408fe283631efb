"""Detections of any detector, from a results file in COCO's format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .coco_annotations import class_of_detection, read_categories
from .entries import is_finite, load_json, require
from .sources import COCO_RESULTS


@dataclass(frozen=True)
class CategorisedDetections:
    """Detections of many images.

    Attributes:
        by_image: per image id the boxes, float64 [D, 4], [x, y, width, height] in pixels, and the
            classes, int64 [D], indices into `category_names`; by falling score.
        category_names: of the detector's classes.
    """

    by_image: dict[int, tuple[np.ndarray, np.ndarray]]
    category_names: list[str]


def read_detections(
    results_file: str | Path, categories_file: str | Path, min_score: float = 0.0
) -> CategorisedDetections:
    """Read a results file and the names of its categories.

    Args:
        results_file: COCO results.
        categories_file: a file in COCO's format with "categories", such as the annotations that
            the detector was trained with.
        min_score: detections below it are left out.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or a detection is of an unknown category.
    """
    results_file, categories_file = Path(results_file), Path(categories_file)
    names = read_categories(categories_file)
    class_of = {category_id: i for i, category_id in enumerate(names)}
    entries = load_json(results_file, COCO_RESULTS)
    if not isinstance(entries, list):
        raise ValueError(f"{results_file}: expected a list. {COCO_RESULTS}")
    found: dict[int, list[tuple[float, list[float], int]]] = {}
    for number, entry in enumerate(entries):
        where = f"{results_file}: detection number {number}"
        box = require(entry, "bbox", list, where)
        score = entry.get("score")
        if len(box) != 4 or not all(map(is_finite, box)) or not is_finite(score):
            raise ValueError(
                f"{where}: 'bbox' is {box!r} and 'score' {score!r}, expected four finite numbers "
                f"and one. {COCO_RESULTS}"
            )
        of_class = class_of_detection(entry, class_of, categories_file, where)
        image_id = require(entry, "image_id", int, where)
        if score >= min_score:
            found.setdefault(image_id, []).append((-score, box, of_class))
    by_image = {}
    for image_id, own in found.items():
        own.sort(key=lambda detection: detection[0])
        boxes = np.array([box for _, box, _ in own], dtype=np.float64)
        by_image[image_id] = (boxes, np.array([c for *_, c in own], dtype=np.int64))
    return CategorisedDetections(by_image, list(names.values()))
