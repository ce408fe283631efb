"""Detections of many images on disk, image by image: a results file need not fit in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..file_io import atomic_write
from .coco_annotations import class_of_detection
from .entries import is_finite, require
from .json_stream import iter_json_list
from .sources import COCO_RESULTS

_ROW = np.dtype([("image", "<i8"), ("box", "<f8", 4), ("score", "<f8"), ("class", "<i8")])
_BATCH = 1 << 15  # detections held in memory while the file is read


class Detections(NamedTuple):
    """The N detections of an image, in the order of the results file.

    Attributes:
        boxes: float64 [N, 4], [x, y, width, height] in pixels.
        scores: float64 [N], from 0 to 1.
        classes: int64 [N], indices of the categories.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray

    @property
    def corners(self) -> np.ndarray:
        """float64 [N, 4], the boxes as xyxy."""
        return np.concatenate([self.boxes[:, :2], self.boxes[:, :2] + self.boxes[:, 2:]], axis=1)


class DetectionStore:
    """Opens what `build` wrote.

    Args:
        folder: of the store.

    Attributes:
        image_ids: int64 [I], of the images with detections, rising.
        num_zero_area: boxes of no width or no height.
    """

    def __init__(self, folder: Path):
        self._rows_file = folder / "rows.bin"
        with np.load(folder / "index.npz") as index:
            self.image_ids = index["image_ids"]
            self.num_zero_area = int(index["num_zero_area"])
            self._starts = index["starts"]

    @staticmethod
    def is_built(folder: Path) -> bool:
        """Whether the folder has a complete store."""
        return (folder / "index.npz").is_file()

    @classmethod
    def build(
        cls, results_file: Path, class_of: Mapping[int, int], categories_file: Path, folder: Path
    ) -> DetectionStore:
        """Bring the detections of a results file in order.

        Memory grows with the number of images, by a few numbers each, not with the file.

        Args:
            results_file: COCO results, in any order.
            class_of: from category id to class.
            categories_file: where the categories came from, for messages.
            folder: exists; what is in it of an unfinished store is replaced.

        Raises:
            FileNotFoundError: there is no results file.
            ValueError: it is damaged, or a detection is of an unknown category or has a box or
                a score that cannot be; the message names the detection.
        """
        spool = folder / "spool.bin"
        counts: dict[int, int] = {}
        num_zero_area = 0
        with spool.open("wb") as file:
            for rows in _batches(results_file, class_of, categories_file):
                file.write(rows.tobytes())
                num_zero_area += int((rows["box"][:, 2:] == 0).any(axis=1).sum())
                found, times = np.unique(rows["image"], return_counts=True)
                for image_id, count in zip(found.tolist(), times.tolist(), strict=True):
                    counts[image_id] = counts.get(image_id, 0) + count
        image_ids = np.array(sorted(counts), dtype=np.int64)
        starts = np.cumsum([0] + [counts[i] for i in image_ids.tolist()])
        first_row = dict(zip(image_ids.tolist(), starts[:-1].tolist(), strict=True))
        _sort(spool, folder / "rows.bin", first_row)
        spool.unlink()
        with atomic_write(folder / "index.npz") as file:
            np.savez(file, image_ids=image_ids, starts=starts, num_zero_area=num_zero_area)
        return cls(folder)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __contains__(self, image_id: int) -> bool:
        return self._place(image_id) is not None

    def count(self, image_id: int) -> int:
        """How many detections an image has."""
        place = self._place(image_id)
        return 0 if place is None else int(self._starts[place + 1] - self._starts[place])

    def of(self, image_id: int) -> Detections:
        """The detections of an image; none for one that the file does not name."""
        place = self._place(image_id)
        if place is None:
            rows = np.empty(0, dtype=_ROW)
        else:
            start, end = self._starts[place : place + 2].tolist()
            rows = np.fromfile(
                self._rows_file, _ROW, count=end - start, offset=start * _ROW.itemsize
            )
        return Detections(rows["box"], rows["score"], rows["class"])

    def _place(self, image_id: int) -> int | None:
        place = int(np.searchsorted(self.image_ids, image_id))
        found = place < len(self.image_ids) and self.image_ids[place] == image_id
        return place if found else None


def _sort(spool: Path, rows_file: Path, next_row: dict[int, int]) -> None:
    """Write the rows image by image, in each image in their old order.

    Args:
        next_row: per image where its first row goes; counts on.
    """
    with spool.open("rb") as source, rows_file.open("wb") as target:
        while chunk := source.read(_BATCH * _ROW.itemsize):
            rows = np.frombuffer(chunk, dtype=_ROW)
            rows = rows[rows["image"].argsort(kind="stable")]
            ends = np.flatnonzero(np.diff(rows["image"])) + 1
            for run in np.split(rows, ends):
                image_id = int(run["image"][0])
                target.seek(next_row[image_id] * _ROW.itemsize)
                target.write(run.tobytes())
                next_row[image_id] += len(run)


def _batches(
    results_file: Path, class_of: Mapping[int, int], categories_file: Path
) -> Iterator[np.ndarray]:
    rows = []
    for number, entry in enumerate(iter_json_list(results_file, COCO_RESULTS)):
        where = f"{results_file}: detection number {number}"
        rows.append(_row(entry, class_of, categories_file, where))
        if len(rows) == _BATCH:
            yield np.array(rows, dtype=_ROW)
            rows = []
    if rows:
        yield np.array(rows, dtype=_ROW)


def _row(
    entry: dict[str, Any], class_of: Mapping[int, int], categories_file: Path, where: str
) -> tuple[int, tuple[float, ...], float, int]:
    box, score = require(entry, "bbox", list, where), entry.get("score")
    if len(box) != 4 or not all(map(is_finite, box)) or min(box[2:]) < 0:
        raise ValueError(
            f"{where}: 'bbox' is {box!r}, expected [x, y, width, height] in pixels, finite and "
            f"with no negative size. {COCO_RESULTS}"
        )
    if not is_finite(score) or not 0 <= score <= 1:
        raise ValueError(
            f"{where}: 'score' is {score!r}, expected the confidence, a number from 0 to 1. "
            f"{COCO_RESULTS}"
        )
    of_class = class_of_detection(entry, class_of, categories_file, where)
    return require(entry, "image_id", int, where), tuple(box), score, of_class
