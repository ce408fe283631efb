"""Detections of any detector, from a results file in COCO's format: one by one, or on disk image by
image where the file need not fit in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vlnms_d2.data.entries import is_box, is_finite, iter_json_list, require
from vlnms_d2.file_io import atomic_write, shown

from .annotations import class_of_detection

SOURCE = (
    "It is a JSON list of {image_id, category_id, bbox [x, y, width, height], score}, as "
    "Detectron2's COCOEvaluator writes (coco_instances_results.json)."
)

_ROW = np.dtype([("image", "<i8"), ("box", "<f8", 4), ("score", "<f8"), ("class", "<i8")])
_BATCH = 1 << 15  # detections in memory while a file is read


class Detections(NamedTuple):
    """The N detections of an image, in the order of the results file."""

    boxes: np.ndarray  # float64 [N, 4], [x, y, width, height] in pixels
    scores: np.ndarray  # float64 [N], from 0 to 1
    classes: np.ndarray  # int64 [N], indices of the categories

    @property
    def corners(self) -> np.ndarray:
        """float64 [N, 4], the boxes as xyxy."""
        return np.concatenate([self.boxes[:, :2], self.boxes[:, :2] + self.boxes[:, 2:]], axis=1)


class DetectionStore:
    """Detections of many images, on disk; opens what `build` wrote in a folder.

    Attributes:
        image_ids: int64 [I], of the images with detections, in ascending order.
        num_zero_area: number of boxes without width or height.
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
        """Sort the detections of a results file by image.

        Memory grows with the number of images, by a few numbers each, not with the file.

        Args:
            results_file: COCO results, in any order.
            class_of: from category id to class.
            categories_file: where the categories came from, for messages.
            folder: an existing folder; an unfinished store in it is replaced.

        Raises:
            FileNotFoundError: there is no results file.
            ValueError: it is damaged, or a detection has an unknown category or an impossible box
                or score; the message names the detection.
        """
        spool = folder / "spool.bin"
        counts, num_zero_area = Counter(), 0
        with spool.open("wb") as file:
            for rows in _batches(results_file, class_of, categories_file):
                file.write(rows.tobytes())
                num_zero_area += int((rows["box"][:, 2:] == 0).any(axis=1).sum())
                ids, times = np.unique(rows["image"], return_counts=True)
                counts.update(dict(zip(ids.tolist(), times.tolist(), strict=True)))
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
        """The detections of an image; none if it is not in the file."""
        place = self._place(image_id)
        if place is None:
            rows = np.empty(0, dtype=_ROW)
        else:
            start, end = self._starts[place : place + 2].tolist()
            rows = np.fromfile(self._rows_file, _ROW, end - start, offset=start * _ROW.itemsize)
        return Detections(rows["box"], rows["score"], rows["class"])

    def _place(self, image_id: int) -> int | None:
        place = int(np.searchsorted(self.image_ids, image_id))
        known = place < len(self.image_ids) and self.image_ids[place] == image_id
        return place if known else None


def check_not_corners(
    results_file: Path, images: Iterable[tuple[np.ndarray, tuple[int, int] | None]]
) -> None:
    """Check that boxes are not [x1, y1, x2, y2], which, read as sizes, end beyond the image.

    Args:
        results_file: for the message.
        images: boxes of each image as in `Detections`, and its (height, width) if known.

    Raises:
        ValueError: more than half of the boxes end beyond their image.
    """
    total, beyond = 0, []
    for boxes, size in images:
        if size is not None:
            ends = boxes[:, :2] + boxes[:, 2:]
            total += len(boxes)
            beyond += boxes[(ends > np.array(size[::-1]) + 1).any(axis=1)].tolist()
    if 2 * len(beyond) > total:
        raise ValueError(
            f"{results_file}: {len(beyond)} of {total} boxes, as 'bbox' {beyond[0]}, end beyond "
            "their images: expected [x, y, width, height], they look like corners [x1, y1, x2, y2]"
        )


def _sort(spool: Path, rows_file: Path, next_row: dict[int, int]) -> None:
    """Write the rows image by image, in their previous order within each image; `next_row` (image
    id -> position of its next row) is updated."""
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
    for row in iter_detections(results_file, class_of, categories_file):
        rows.append(row)
        if len(rows) == _BATCH:
            yield np.array(rows, dtype=_ROW)
            rows = []
    if rows:
        yield np.array(rows, dtype=_ROW)


def iter_detections(
    results_file: Path, class_of: Mapping[int, int], categories_file: Path
) -> Iterator[tuple[int, list[float], float, int]]:
    """For each detection of a file its image id, box, score and class."""
    for number, entry in enumerate(iter_json_list(results_file, SOURCE)):
        where = f"{results_file}: detection number {number}"
        box, score = require(entry, "bbox", list, where), entry.get("score")
        if not is_box(box) or min(box[2:]) < 0:
            raise ValueError(
                f"{where}: 'bbox' is {shown(box)}, expected [x, y, width, height] in pixels, four "
                f"finite numbers with no negative size. {SOURCE}"
            )
        if not is_finite(score) or not 0 <= score <= 1:
            raise ValueError(
                f"{where}: 'score' is {shown(score)}, expected the confidence, a number from 0 to "
                f"1. {SOURCE}"
            )
        of_class = class_of_detection(entry, class_of, categories_file, where)
        yield require(entry, "image_id", int, where), box, score, of_class
