"""Rerank a detector's results file for all queries of a data set.

Memory holds the queries and the ids of the images, but detections and proposals of one image at a
time.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vlnms_d2.data.mapper import read_image
from vlnms_d2.export import FORMATS
from vlnms_d2.export.job import Job, identity_of_files, versions
from vlnms_d2.export.threshold import threshold_for_mean
from vlnms_d2.export.workers import Processes, Workers
from vlnms_d2.file_io import atomic_write, shown

from .annotations import read_annotations, read_mentioned
from .detections import DetectionStore, check_not_corners
from .queries import Query, read_queries
from .recall import load_matches, recall_of_mentions
from .worker import COUNTS, RECALL, SCORES, Reranker, RerankImage, RerankSettings, TextRows

logger = logging.getLogger(__name__)

IDENTITY_VERSION = 2
IMAGES_PER_BLOCK = 32
PICTURES = "pictures"


def run_rerank(
    settings: RerankSettings, processes: int = 1, overwrite: bool = False
) -> dict[str, Any]:
    """Answer all queries and write the output; whatever is finished already is kept.

    Arguments, return value and errors as for `vlnms_d2.export.from_model.run_export`, but
    `processes` is their number. "threshold" in the manifest is None if there is none; with
    mentions there is also "recall", from `recall_of_mentions`.
    """
    return _Rerank(settings, Processes(processes=processes)).finish(overwrite)


class _Rerank(Job):
    def __init__(self, settings: RerankSettings, processes: Processes):
        self.settings = settings
        for role, path in settings.inputs.items():
            if not path.exists():
                raise FileNotFoundError(
                    f"{path}: no such file, expected the {role}. Check the path."
                )
        self.annotations = read_annotations(settings.annotations)
        self.queries = read_queries(settings.queries, settings.split)
        self.mentioned = {}
        if settings.mentions is not None:
            image_of = {query.query_id: query.image_id for query in self.queries}
            self.mentioned = read_mentioned(settings.mentions, self.annotations, image_of)
        by_image: dict[int, list[Query]] = {}
        for query in self.queries:
            by_image.setdefault(query.image_id, []).append(query)
        self.row_of: dict[str, int] = {}  # of each distinct text
        images = [self._image(by_image[image_id]) for image_id in sorted(by_image)]
        super().__init__(settings.out, images, IMAGES_PER_BLOCK, processes)
        self.outputs = [FORMATS[name].output for name in settings.formats]
        self.inputs = list(settings.inputs.values())
        if settings.pictures:
            self.outputs.append(PICTURES)
        if settings.image_dir is not None:
            self.inputs.append(settings.image_dir)

    def _image(self, queries: Sequence[Query]) -> RerankImage:
        image_id = queries[0].image_id
        known = self.annotations.images.get(image_id)
        return RerankImage(
            image_id,
            None if known is None else known.size,
            tuple(queries),
            tuple(self.row_of.setdefault(query.text, len(self.row_of)) for query in queries),
            tuple(self.mentioned.get(query.query_id) for query in queries),
            self._image_path(image_id) if self._uses_colours else None,
        )

    @property
    def _uses_colours(self) -> bool:
        return self.settings.relatedness == "Portable" and self.settings.image_dir is not None

    def identity(self) -> dict[str, Any]:
        names = ("split", "score_thresh", "mean_proposals", "nms_thresh", "pictures")
        settings = {name: getattr(self.settings, name) for name in names} | {
            "formats": list(self.settings.formats),
            "top_n": None if self.settings.topk < 0 else self.settings.topk,
            "relatedness": self.settings.relatedness,
            "images_per_block": IMAGES_PER_BLOCK,
        }
        if self._uses_colours:
            settings["colours"] = True
        try:
            spacy = importlib.metadata.version("spacy")
        except importlib.metadata.PackageNotFoundError:
            spacy = ""
        return {
            "run_version": IDENTITY_VERSION,
            "inputs": identity_of_files(self.settings.inputs),
            "settings": settings,
            "versions": versions() | {"spacy": spacy},
        }

    def fill(self) -> None:
        self.store = self._open_store()
        self._check_images()
        images = ((self.store.of(image.image_id).boxes, image.size) for image in self.images)
        check_not_corners(self.settings.detections, images)
        self.drawn = self._queries_to_draw()
        texts = TextRows(self.work / "texts", self.annotations.category_names)
        with tqdm(total=len(self.row_of), desc="texts", disable=None) as bar:
            self.num_silent = texts.encode(list(self.row_of), bar.update)
        self.threshold = self.settings.score_thresh
        if self.settings.mean_proposals is not None:
            self._run("write_scores", SCORES, "blocks, for the threshold")
            paths = list(self.shards.paths(SCORES))
            self.threshold = threshold_for_mean(paths, self.settings.mean_proposals)
        self._run("write", COUNTS, "blocks")

    def _run(self, method: str, suffix: str, label: str) -> None:
        with Workers(self.processes, Reranker, *self._reranker_arguments()) as workers:
            self.run(workers, method, suffix, label)

    def _reranker_arguments(self) -> tuple:
        categories = self.annotations.category_ids, self.annotations.category_names
        return self.settings, self.shards, self.work, *categories, self.threshold

    def merge(self) -> dict[str, Any]:
        formats = [FORMATS[name] for name in self.settings.formats]
        manifest: dict[str, Any] = {
            "counts": self._counts(),
            "threshold": self.threshold,
            "outputs": self.merge_formats(formats),
            "pictures": len(self.drawn),
        }
        if self.mentioned:
            manifest["recall"] = recall_of_mentions(load_matches(self.shards.paths(RECALL)))
            manifest["recall"]["relatedness"] = self.settings.relatedness
        if self.settings.pictures:
            self._draw()
        return manifest

    def _open_store(self) -> DetectionStore:
        folder = self.work / "store"
        folder.mkdir(exist_ok=True)
        if DetectionStore.is_built(folder):
            return DetectionStore(folder)
        return DetectionStore.build(
            self.settings.detections, self.annotations.class_of, self.annotations.path, folder
        )

    def _check_images(self) -> None:
        without = [image for image in self.images if image.image_id not in self.store]
        for image in without:
            if image.image_id not in self.annotations.images:
                raise ValueError(
                    f"{self.settings.queries}: query {shown(image.queries[0].query_id)} is of "
                    f"image {image.image_id}, which is neither in {self.settings.detections} nor "
                    f"among the images of {self.annotations.path}. Use files of the same images."
                )
        if without:
            logger.warning(
                "%s: %d of the %d images with queries have no detections (the first is %d); their "
                "queries get empty results",
                self.settings.detections,
                len(without),
                len(self.images),
                without[0].image_id,
            )

    def _queries_to_draw(self) -> list[Query]:
        """Evenly spread over the queries with detections; all of them if there are fewer."""
        able = [query for query in self.queries if query.image_id in self.store]
        count = min(self.settings.pictures, len(able))
        drawn = [able[i * len(able) // count] for i in range(count)]
        for query in drawn:
            try:
                read_image(self._image_path(query.image_id), "BGR")
            except (OSError, ValueError) as error:
                raise ValueError(f"{error}, to draw query {shown(query.query_id)}") from error
        return drawn

    def _image_path(self, image_id: int) -> Path:
        known = self.annotations.images.get(image_id)
        if known is None or known.file_name is None:
            raise ValueError(
                f"image {image_id} has no 'file_name' in the annotations, which pictures and "
                "colours need. Give annotations that list the images, or leave out image_dir."
            )
        return self.settings.image_dir / known.file_name

    def _draw(self) -> None:
        folder = self.work / PICTURES
        folder.mkdir(exist_ok=True)
        reranker = Reranker(*self._reranker_arguments())
        for number, query in enumerate(self.drawn):
            picture = reranker.draw(self._image_path(query.image_id), self._image([query]))
            with atomic_write(folder / f"{number:03d}_{query.image_id}.jpg") as file:
                file.write(picture)
        self.output.publish(PICTURES)

    def _counts(self) -> dict[str, int | float]:
        counts = self.shards.sum_counts(COUNTS)
        with_queries = {image.image_id for image in self.images}
        unasked = [i for i in self.store.image_ids.tolist() if i not in with_queries]
        return {
            "images": len(self.images),
            "queries": len(self.queries),
            **counts,
            "distinct_texts": len(self.row_of),
            "distinct_texts_without_category": self.num_silent,
            "detections": len(self.store),
            "detections_of_zero_area": self.store.num_zero_area,
            "detections_without_queries": sum(map(self.store.count, unasked)),
            "images_without_queries": len(unasked),
            "queries_with_mentions": len(self.mentioned),
            "proposals_per_query": counts["proposals"] / len(self.queries),
        }
