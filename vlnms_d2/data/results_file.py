"""Detections of any detector, from a results file in COCO's format."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .entries import check_exists, is_finite, read_json, require

_SOURCE = (
    "It is a JSON list of {image_id, category_id, bbox [x, y, width, height], score}, as "
    "Detectron2's COCOEvaluator writes (coco_instances_results.json)."
)


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
    content = read_json(categories_file, "It needs 'categories' as COCO's annotations have them.")
    names = {}
    for number, entry in enumerate(require(content, "categories", list, str(categories_file))):
        where = f"{categories_file}: category number {number}"
        names[require(entry, "id", int, where)] = require(entry, "name", str, where)
    class_of = {category_id: i for i, category_id in enumerate(sorted(names))}

    check_exists(results_file, _SOURCE)
    try:
        entries = json.loads(results_file.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{results_file}: not valid JSON ({error}). The file may have been cut short: make it "
            f"again. {_SOURCE}"
        ) from error
    if not isinstance(entries, list):
        raise ValueError(f"{results_file}: expected a list. {_SOURCE}")
    found: dict[int, list[tuple[float, list[float], int]]] = {}
    for number, entry in enumerate(entries):
        where = f"{results_file}: detection number {number}"
        box = require(entry, "bbox", list, where)
        score = entry.get("score")
        if len(box) != 4 or not all(map(is_finite, box)) or not is_finite(score):
            raise ValueError(
                f"{where}: 'bbox' is {box!r} and 'score' {score!r}, expected four finite numbers "
                f"and one. {_SOURCE}"
            )
        category_id = require(entry, "category_id", int, where)
        if category_id not in class_of:
            raise ValueError(
                f"{where}: 'category_id' is {category_id}, which {categories_file} does not have; "
                "give the file of the detector's own categories"
            )
        image_id = require(entry, "image_id", int, where)
        if score >= min_score:
            found.setdefault(image_id, []).append((-score, box, class_of[category_id]))
    by_image = {}
    for image_id, own in found.items():
        own.sort(key=lambda detection: detection[0])
        boxes = np.array([box for _, box, _ in own], dtype=np.float64)
        by_image[image_id] = (boxes, np.array([c for *_, c in own], dtype=np.int64))
    return CategorisedDetections(by_image, [names[i] for i in sorted(names)])
