"""Of an annotation file in COCO's format what goes with detections: categories, images, boxes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .entries import is_finite, is_integer, read_json, require
from .json_stream import iter_json_list

_SOURCE = (
    "It needs 'categories' with 'id' and 'name', as COCO's annotations (instances_val2017.json) "
    "have them."
)


class ImageInfo(NamedTuple):
    """What a file says of an image.

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
        category_ids: by class; rising.
        category_names: by class.
        images: by id; empty where the file lists none.
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
        classes: their classes, without repeats.
    """

    boxes: np.ndarray
    classes: tuple[int, ...]


def read_annotations(path: str | Path) -> Annotations:
    """Read categories, and images if there are any.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, has no category or an id twice.
    """
    path = Path(path)
    content = read_json(path, _SOURCE)
    names = _category_names(content, path)
    images = {}
    for number, entry in enumerate(content.get("images", [])):
        image_id = require(entry, "id", int, f"{path}: image number {number}")
        size = entry.get("height"), entry.get("width")
        known = all(is_integer(value) and value > 0 for value in size)
        file_name = entry.get("file_name")
        images[image_id] = ImageInfo(
            file_name if isinstance(file_name, str) else None, size if known else None
        )
    return Annotations(path, list(names), list(names.values()), images)


def read_categories(path: str | Path) -> dict[int, str]:
    """The categories' names by their ids, which rise; nothing else of the file is looked at.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, has no category or an id twice.
    """
    path = Path(path)
    return _category_names(read_json(path, _SOURCE), path)


def class_of_detection(
    entry: dict[str, Any], class_of: Mapping[int, int], categories_file: Path, where: str
) -> int:
    """The class of an entry of a results file.

    Args:
        entry: with "category_id".
        class_of: from category id to class.
        categories_file: where the categories came from, and `where` the entry, for messages.

    Raises:
        ValueError: the category is not known.
    """
    category_id = require(entry, "category_id", int, where)
    if category_id not in class_of:
        raise ValueError(
            f"{where}: 'category_id' is {category_id}, which {categories_file} does not have; "
            "give the file of the detector's own categories"
        )
    return class_of[category_id]


def _category_names(content: dict[str, Any], path: Path) -> dict[int, str]:
    names: dict[int, str] = {}
    for number, entry in enumerate(require(content, "categories", list, str(path))):
        where = f"{path}: category number {number}"
        category_id = require(entry, "id", int, where)
        if category_id in names:
            raise ValueError(f"{where}: 'id' {category_id} is used twice, expected distinct ids")
        names[category_id] = require(entry, "name", str, where)
    if not names:
        raise ValueError(f"{path}: 'categories' is empty. {_SOURCE}")
    return dict(sorted(names.items()))


def read_mentioned(
    mentions_file: str | Path, annotations: Annotations, image_of: dict[Any, int]
) -> dict[Any, Mentioned]:
    """The objects that queries mention.

    Args:
        mentions_file: JSON list of {"caption_id", "annotation_ids"}.
        annotations: of a file that also has "annotations" with boxes.
        image_of: from query id to image id.

    Returns:
        By query id, of the queries in `image_of` that mention an object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is damaged, no caption is among the queries, or an annotation is not in
            the annotation file, is of another image or has no box.
    """
    mentions_file = Path(mentions_file)
    source = "It is a JSON list of {caption_id, annotation_ids}."
    objects = _read_objects(annotations)
    found = {}
    for number, entry in enumerate(iter_json_list(mentions_file, source)):
        where = f"{mentions_file}: entry number {number}"
        ids = require(entry, "annotation_ids", list, where)
        caption_id = entry.get("caption_id")
        if not isinstance(caption_id, (int, str)):
            raise ValueError(
                f"{where}: 'caption_id' is {caption_id!r}, expected the id of a query. {source}"
            )
        if caption_id not in image_of or not ids:
            continue
        if caption_id in found:
            raise ValueError(f"{where}: 'caption_id' {caption_id} is there twice, expected once")
        boxes, classes = [], set()
        for ann_id in ids:
            known = objects.get(ann_id) if is_integer(ann_id) else None
            if known is None or known[0] != image_of[caption_id]:
                raise ValueError(
                    f"{where}: 'annotation_ids' has {ann_id!r}, which is no annotation of image "
                    f"{image_of[caption_id]} in {annotations.path}. Use the annotations that the "
                    "mentions were made with."
                )
            boxes.append(known[2])
            classes.add(known[1])
        found[caption_id] = Mentioned(np.array(boxes, dtype=np.float32), tuple(sorted(classes)))
    if not found:
        raise ValueError(
            f"{mentions_file}: no 'caption_id' with annotations is among the queries. Use the "
            "queries that the mentions were made with."
        )
    return found


def _read_objects(annotations: Annotations) -> dict[int, tuple[int, int, list[float]]]:
    """By annotation id the image, the class and the box xyxy."""
    path = annotations.path
    class_of = annotations.class_of
    objects = {}
    entries = require(read_json(path, _SOURCE), "annotations", list, str(path))
    for number, entry in enumerate(entries):
        where = f"{path}: annotation number {number}"
        box = require(entry, "bbox", list, where)
        if len(box) != 4 or not all(map(is_finite, box)):
            raise ValueError(
                f"{where}: 'bbox' is {box!r}, expected [x, y, width, height] in pixels. Repair it."
            )
        category_id = require(entry, "category_id", int, where)
        if category_id not in class_of:
            raise ValueError(
                f"{where}: 'category_id' is {category_id}, which the file's 'categories' do not "
                "have. Repair the entry or fetch the file again."
            )
        x, y, width, height = box
        objects[require(entry, "id", int, where)] = (
            require(entry, "image_id", int, where),
            class_of[category_id],
            [x, y, x + width, y + height],
        )
    return objects
