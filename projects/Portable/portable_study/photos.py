"""Photos with annotated boxes and a detector's candidates, and how they are split."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

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
    data = json.loads((folder / "instances.json").read_text(encoding="utf-8"))
    class_of = {c["id"]: i for i, c in enumerate(data["categories"])}
    annotations, results, captions = defaultdict(list), defaultdict(list), defaultdict(list)
    for annotation in data["annotations"]:
        if not annotation.get("iscrowd"):
            annotations[annotation["image_id"]].append(annotation)
    for result in json.loads((folder / detections).read_text(encoding="utf-8")):
        results[result["image_id"]].append(result)
    for caption in json.loads((folder / "captions.json").read_text(encoding="utf-8"))[
        "annotations"
    ]:
        captions[caption["image_id"]].append(caption["caption"])
    photos = []
    for image in data["images"]:
        known, found = annotations[image["id"]], results[image["id"]]
        found = sorted(found, key=lambda result: -result["score"])[:MAX_CANDIDATES]
        photos.append(
            Photo(
                image["id"],
                folder / "photos" / image["file_name"],
                (image["height"], image["width"]),
                [category["name"] for category in data["categories"]],
                np.array([a["id"] for a in known], dtype=np.int64),
                _corners(known),
                np.array([class_of[a["category_id"]] for a in known], dtype=np.int64),
                _corners(found),
                np.array([r["score"] for r in found], dtype=np.float32),
                np.array([class_of[r["category_id"]] for r in found], dtype=np.int64),
                captions[image["id"]],
            )
        )
    return photos


def _corners(records: list[dict]) -> np.ndarray:
    boxes = np.array([r["bbox"] for r in records], dtype=np.float32).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
