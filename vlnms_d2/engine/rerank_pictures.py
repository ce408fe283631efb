"""Pictures of what a rerank run keeps, beside what the detector alone would."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

from ..data.datasets.coco import ImageInfo
from ..data.detections import DetectionStore
from ..data.queries import Query
from ..file_io import atomic_write
from ..visualization import draw_comparison
from .rerank_blocks import BlockWorker, ImageTask

PROPOSALS = 8  # drawn at most: more hide the image
_JPEG_QUALITY = 92


class Pictures:
    """Draws queries on their images.

    Args:
        image_dir: folder of the images.
        images: by id, with their file names.
    """

    def __init__(self, image_dir: Path, images: Mapping[int, ImageInfo]):
        self.image_dir = image_dir
        self.images = images

    def choose(self, queries: Sequence[Query], store: DetectionStore, count: int) -> list[Query]:
        """`count` of the queries with detections, spread evenly; all where there are fewer.

        Raises:
            FileNotFoundError: the image of one is missing.
            ValueError: the file name of one is not known.
        """
        able = [query for query in queries if query.image_id in store]
        count = min(count, len(able))
        chosen = [able[i * len(able) // count] for i in range(count)]
        for query in chosen:
            path = self._path(query.image_id)
            if not path.is_file():
                raise FileNotFoundError(
                    f"{path}: no such image, to draw query {query.query_id!r}. Check the folder of "
                    "the images."
                )
        return chosen

    def draw(self, path: Path, task: ImageTask, worker: BlockWorker) -> None:
        """Draw the query of a task of one query.

        Raises:
            ValueError: the image cannot be read.
        """
        image_path = self._path(task.image_id)
        image = cv2.imread(str(image_path))
        if image is None:
            raise ValueError(f"{image_path}: not an image that can be read. Fetch it again.")
        [query] = task.queries
        detections = worker.store.of(task.image_id)
        related = worker.relatedness(task, detections)
        topk = PROPOSALS if worker.settings.topk < 0 else min(PROPOSALS, worker.settings.topk)
        [aware] = worker.answer(task, detections, related, topk)
        [alone] = worker.answer(task, detections, np.ones_like(related), topk, cut=False)
        alone.remove("relatedness")  # or its labels would show one
        drawn = draw_comparison(
            image,
            query.text,
            query.text.split(),
            None,
            alone,
            aware,
            worker.settings.category_names,
        )
        _, content = cv2.imencode(".jpg", drawn, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
        with atomic_write(path) as file:
            file.write(content.tobytes())

    def _path(self, image_id: int) -> Path:
        known = self.images.get(image_id)
        if known is None or known.file_name is None:
            raise ValueError(
                f"image {image_id} has no 'file_name' in the annotations, which pictures need. "
                "Give annotations that list the images, or ask for no pictures."
            )
        return self.image_dir / known.file_name
