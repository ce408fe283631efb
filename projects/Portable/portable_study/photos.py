"""Photos with annotated boxes and a detector's candidates, and how they are split."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reranking.annotations import class_of_detection, read_annotations
from reranking.detections import iter_detections
from reranking.queries import read_queries
from vlnms_d2.data.entries import CATEGORIES_SOURCE, is_box, read_json, require
from vlnms_d2.file_io import shown

SPLITS = ("train", "choose", "report")
_SHARES = (50, 20, 30)  # in percent
MAX_CANDIDATES = 1000


@dataclass
class Photo:
    """A photo, its annotated boxes (crowds are left out) and the candidates of a detector.

    Attributes:
        image_id: of COCO.
        path: of the JPEG.
        size: (height, width) in pixels.
        names: of the detector's classes.
        ids: int64 [G], of the annotations.
        boxes: float32 [G, 4], xyxy in pixels.
        classes: int64 [G].
        candidates, scores, candidate_classes: float32 [N, 4], float32 [N], int64 [N].
        captions: of the photo.
    """

    image_id: int
    path: Path
    size: tuple[int, int]
    names: list[str]
    ids: np.ndarray
    boxes: np.ndarray
    classes: np.ndarray
    candidates: np.ndarray
    scores: np.ndarray
    candidate_classes: np.ndarray
    captions: list[str]

    @property
    def split(self) -> str:
        """The split of the photo: it depends on its id alone."""
        return split_of(self.image_id)

    def pixels(self) -> np.ndarray:
        """The photo, BGR uint8 [H, W, 3].

        Raises:
            FileNotFoundError: it is missing.
        """
        import cv2

        pixels = cv2.imread(str(self.path))
        if pixels is None:
            raise FileNotFoundError(f"{self.path}: no such photo. Check the folder of the photos.")
        return pixels


def split_of(image_id: int) -> str:
    """ "train", "choose" or "report"."""
    number = int(hashlib.sha1(str(image_id).encode()).hexdigest(), 16) % 100
    return SPLITS[int(np.searchsorted(np.cumsum(_SHARES), number, side="right"))]


def read_photos(folders: Sequence[Path], detections: str) -> dict[int, Photo]:
    """The photos of folders with instances.json, captions.json, photos/ and COCO results.

    Args:
        folders: of the data.
        detections: name of the results file in each folder.
    """
    return {photo.image_id: photo for folder in folders for photo in _read(folder, detections)}


def _read(folder: Path, detections: str) -> list[Photo]:
    known = read_annotations(folder / "instances.json")
    annotations, results, captions = defaultdict(list), defaultdict(list), defaultdict(list)
    content = read_json(known.path, CATEGORIES_SOURCE)
    for number, annotation in enumerate(require(content, "annotations", list, str(known.path))):
        where = f"{known.path}: annotation number {number}"
        image_id = require(annotation, "image_id", int, where)
        if not is_box(require(annotation, "bbox", list, where)):
            raise ValueError(
                f"{where}: 'bbox' is {shown(annotation['bbox'])}, expected four numbers"
            )
        of_class = class_of_detection(annotation, known.class_of, known.path, where)
        if not annotation.get("iscrowd"):
            ann_id = require(annotation, "id", int, where)
            annotations[image_id].append((annotation["bbox"], ann_id, of_class))
    found = iter_detections(folder / detections, known.class_of, known.path)
    for image_id, box, score, of_class in found:
        results[image_id].append((box, score, of_class))
    for query in read_queries(folder / "captions.json"):
        captions[query.image_id].append(query.text)
    photos = []
    for image_id, image in known.images.items():
        if image.size is None or image.file_name is None:
            raise ValueError(f"{known.path}: image {image_id} lacks a file name or its size")
        objects = annotations[image_id]
        boxes, ids, classes = zip(*objects, strict=True) if objects else ((), (), ())
        best = sorted(results[image_id], key=lambda result: -result[1])[:MAX_CANDIDATES]
        candidates, scores, of_candidates = zip(*best, strict=True) if best else ((), (), ())
        photos.append(
            Photo(
                image_id,
                folder / "photos" / image.file_name,
                image.size,
                known.category_names,
                np.array(ids, dtype=np.int64),
                _corners(boxes),
                np.array(classes, dtype=np.int64),
                _corners(candidates),
                np.array(scores, dtype=np.float32),
                np.array(of_candidates, dtype=np.int64),
                captions[image_id],
            )
        )
    return photos


def _corners(bboxes: Sequence[Sequence[float]]) -> np.ndarray:
    boxes = np.array(bboxes, dtype=np.float32).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
