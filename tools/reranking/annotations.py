"""Annotation files in COCO's format: categories, images and the boxes that queries mention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlnms_d2.data.entries import (
    CATEGORIES_SOURCE,
    category_names,
    check_new,
    is_finite,
    is_integer,
    iter_json_list,
    read_json,
    require,
)
from vlnms_d2.file_io import shown


class ImageInfo(NamedTuple):
    """An image of an annotation file.

    Attributes:
        file_name: or None.
        size: (height, width) in pixels, or None.
    """

    file_name: str | None
    size: tuple[int, int] | None


@dataclass(frozen=True)
class Annotations:
    """Categories and images of a file.

    Attributes:
        path: of the file.
        category_ids: by class, in ascending order.
        category_names: by class.
        images: by id; empty if the file lists none.
    """

    path: Path
    category_ids: list[int]
    category_names: list[str]
    images: dict[int, ImageInfo]

    @property
    def class_of(self) -> dict[int, int]:
        """From category id to class."""
        return {category_id: i for i, category_id in enumerate(self.category_ids)}


class Mentioned(NamedTuple):
    """The M annotated objects that a query mentions.

    Attributes:
        boxes: float32 [M, 4], xyxy in pixels.
        classes: their classes, without repetitions.
    """

    boxes: np.ndarray
    classes: tuple[int, ...]


def read_annotations(path: str | Path) -> Annotations:
    """Reads categories, and images if there are any.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, has no category or repeats an id.
    """
    path = Path(path)
    content = read_json(path, CATEGORIES_SOURCE)
    names = category_names(content, path)
    images = {}
    content.setdefault("images", [])
    for number, entry in enumerate(require(content, "images", list, str(path))):
        image_id = require(entry, "id", int, f"{path}: image number {number}")
        check_new(image_id, images, "'id'", f"{path}: image number {number}")
        size = entry.get("height"), entry.get("width")
        known = all(is_integer(value) and value > 0 for value in size)
        file_name = entry.get("file_name")
        images[image_id] = ImageInfo(
            file_name if isinstance(file_name, str) else None, size if known else None
        )
    return Annotations(path, list(names), list(names.values()), images)


def read_categories(path: str | Path) -> dict[int, str]:
    """Reads category id -> name, in ascending order of ids; nothing else in the file is checked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, has no category or repeats an id.
    """
    path = Path(path)
    return category_names(read_json(path, CATEGORIES_SOURCE), path)


def class_of_detection(
    entry: dict[str, Any], class_of: Mapping[int, int], categories_file: Path, where: str
) -> int:
    """The class of an entry of a results file.

    Args:
        entry: with "category_id".
        class_of: from category id to class.
        categories_file, where: source of the categories and position of the entry, for messages.

    Raises:
        ValueError: the category is unknown.
    """
    category_id = require(entry, "category_id", int, where)
    if category_id not in class_of:
        raise ValueError(
            f"{where}: 'category_id' is {category_id}, which {categories_file} does not have; "
            "give the file of the detector's own categories"
        )
    return class_of[category_id]


def read_mentioned(
    mentions_file: str | Path, annotations: Annotations, image_of: dict[Any, int]
) -> dict[Any, Mentioned]:
    """Reads which objects queries mention.

    Args:
        mentions_file: JSON list of {"caption_id", "annotation_ids"}.
        annotations: from a file that also has "annotations" with boxes.
        image_of: from query id to image id.

    Returns:
        By query id, for the queries in `image_of` that mention an object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is damaged, no caption is among the queries, or an annotation does not
            exist, belongs to another image or has no box.
    """
    mentions_file = Path(mentions_file)
    source = "It is a JSON list of {caption_id, annotation_ids}."
    objects = _read_objects(annotations)
    mentioned = {}
    for number, entry in enumerate(iter_json_list(mentions_file, source)):
        where = f"{mentions_file}: entry number {number}"
        ids = require(entry, "annotation_ids", list, where)
        caption_id = entry.get("caption_id")
        if not isinstance(caption_id, (int, str)):
            raise ValueError(
                f"{where}: 'caption_id' is {shown(caption_id)}, expected the id of a query. "
                f"{source}"
            )
        if caption_id not in image_of or not ids:
            continue
        check_new(caption_id, mentioned, "'caption_id'", where)
        boxes, classes = [], set()
        for ann_id in ids:
            known = objects.get(ann_id) if is_integer(ann_id) else None
            if known is None or known[0] != image_of[caption_id]:
                raise ValueError(
                    f"{where}: 'annotation_ids' has {shown(ann_id)}, which is no annotation of "
                    f"image {image_of[caption_id]} in {annotations.path}. Use the annotations that "
                    "the mentions were made with."
                )
            boxes.append(known[2])
            classes.add(known[1])
        mentioned[caption_id] = Mentioned(np.array(boxes, dtype=np.float32), tuple(sorted(classes)))
    if not mentioned:
        raise ValueError(
            f"{mentions_file}: no 'caption_id' with annotations is among the queries. Use the "
            "queries that the mentions were made with."
        )
    return mentioned


def _read_objects(annotations: Annotations) -> dict[int, tuple[int, int, list[float]]]:
    """Annotation id -> image id, class and box xyxy."""
    path = annotations.path
    class_of = annotations.class_of
    objects = {}
    entries = require(read_json(path, CATEGORIES_SOURCE), "annotations", list, str(path))
    for number, entry in enumerate(entries):
        where = f"{path}: annotation number {number}"
        box = require(entry, "bbox", list, where)
        if len(box) != 4 or not all(map(is_finite, box)):
            raise ValueError(
                f"{where}: 'bbox' is {shown(box)}, expected [x, y, width, height] in pixels. "
                "Repair it."
            )
        category_id = require(entry, "category_id", int, where)
        if category_id not in class_of:
            raise ValueError(
                f"{where}: 'category_id' is {category_id}, which the file's 'categories' do not "
                "have. Repair the entry or fetch the file again."
            )
        x, y, width, height = box
        ann_id = require(entry, "id", int, where)
        check_new(ann_id, objects, "'id'", where)
        objects[ann_id] = (
            require(entry, "image_id", int, where),
            class_of[category_id],
            [x, y, x + width, y + height],
        )
    return objects
