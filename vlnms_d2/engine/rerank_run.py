"""Query-aware proposals for all queries of a data set, from a detector's results file.

Image by image and in blocks of images, of which each writes one shard per format: memory holds the
queries and image ids, but neither detections nor proposals, and a run that was killed goes on with
the blocks that are missing. What is written does not depend on how many processes there are.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.datasets.coco import Annotations, Mentioned, read_annotations, read_mentioned
from ..data.detections import DetectionStore
from ..data.queries import Query, read_queries
from ..evaluation.mention_recall import load_matches, recall_of_mentions
from ..export import FORMATS, check_formats
from ..rerank import NMS_THRESH
from .cut import check_cut
from .parallel import run_tasks
from .rerank_blocks import BlockSettings, BlockTask, BlockWorker, ImageTask
from .rerank_pictures import Pictures
from .rerank_text import TextRows
from .resumable import OutputFolder, identity_of_files, versions
from .score_threshold import threshold_for_mean
from .shards import Shards, merge_format, progress, sum_counts

logger = logging.getLogger(__name__)

RUN_VERSION = 1
IMAGES_PER_BLOCK = 32
TOP_N = 100
PICTURES = "pictures"  # folder of them


@dataclass(frozen=True)
class RerankSettings:
    """What a run makes of what.

    Attributes:
        detections: COCO results file.
        annotations: file in COCO's format with the detector's categories; may have images and
            annotations.
        queries: see `read_queries`.
        out: folder for the output.
        formats: names in `vlnms_d2.export.FORMATS`.
        split: of REFER's queries; None for all.
        top_n: proposals kept per query. Of this and the next two at most one is given; without
            any, `TOP_N` are kept.
        score_thresh: all proposals with s above it are kept, and the best one.
        mean_proposals: like `score_thresh`, with the threshold at which the mean number per query
            (of those with detections) comes closest to this. To find it all queries are answered
            once more, before.
        nms_thresh: IoU of the class-wise NMS.
        mentions: JSON list of {"caption_id", "annotation_ids"} to measure recall; or None.
        image_dir: folder of the images, for pictures; or None.
        pictures: how many queries to draw.

    Raises:
        ValueError: a value that cannot be, or several that exclude each other.
    """

    detections: Path
    annotations: Path
    queries: Path
    out: Path
    formats: tuple[str, ...] = ("jsonl",)
    split: str | None = None
    top_n: int | None = None
    score_thresh: float | None = None
    mean_proposals: float | None = None
    nms_thresh: float = NMS_THRESH
    mentions: Path | None = None
    image_dir: Path | None = None
    pictures: int = 0

    def __post_init__(self):
        check_cut(self.top_n, self.score_thresh, self.mean_proposals)
        if not 0 <= self.nms_thresh <= 1:
            raise ValueError(f"nms_thresh is {self.nms_thresh}, expected a number from 0 to 1")
        check_formats(self.formats, FORMATS)
        if self.pictures < 0 or (self.pictures > 0) != (self.image_dir is not None):
            raise ValueError("the number of pictures and the folder of the images go together")

    @property
    def inputs(self) -> dict[str, Path]:
        """The files that are read, by their role."""
        roles = ("detections", "annotations", "queries", "mentions")
        paths = {role: getattr(self, role) for role in roles}
        return {role: path for role, path in paths.items() if path is not None}

    @property
    def identity(self) -> dict[str, Any]:
        """All that the output depends on."""
        names = ("split", "score_thresh", "mean_proposals", "nms_thresh", "pictures")
        by_threshold = self.score_thresh is not None or self.mean_proposals is not None
        settings = {name: getattr(self, name) for name in names} | {
            "formats": list(self.formats),
            "top_n": None if by_threshold else self.top_n or TOP_N,
            "relatedness": "Category",
            "images_per_block": IMAGES_PER_BLOCK,
        }
        return {
            "run_version": RUN_VERSION,
            "inputs": identity_of_files(self.inputs),
            "settings": settings,
            "versions": _versions(),
        }


def run_rerank(
    settings: RerankSettings, processes: int = 1, overwrite: bool = False
) -> dict[str, Any]:
    """Answer all queries and write the output; skip what is there.

    Args:
        settings: see `RerankSettings`.
        processes: that share the work.
        overwrite: replace the output of a run of other input or settings.

    Returns:
        The manifest, as `manifest.json` has it: "identity" (sha256 of the input, settings,
        versions), "counts", "threshold" (None where there is none), "outputs" (sha256 of each
        file) and, with mentions, "recall" as of `recall_of_mentions`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, files do not fit together, or the folder is in use.
        RuntimeError: one of the processes was killed.
    """
    if processes < 1:
        raise ValueError(f"the number of processes is {processes}, expected at least 1")
    for role, path in settings.inputs.items():
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file, expected the {role}. Check the path.")
    annotations = read_annotations(settings.annotations)
    queries = read_queries(settings.queries, settings.split)
    mentioned = {}
    if settings.mentions is not None:
        image_of = {query.query_id: query.image_id for query in queries}
        mentioned = read_mentioned(settings.mentions, annotations, image_of)
    output = OutputFolder(settings.out, settings.identity)
    with output.begin(overwrite) as manifest:
        if manifest is None:
            run = _Run(settings, output, annotations, queries, mentioned, processes)
            manifest = run.finish()
    return manifest


class _Run:
    def __init__(
        self,
        settings: RerankSettings,
        output: OutputFolder,
        annotations: Annotations,
        queries: Sequence[Query],
        mentioned: dict[int | str, Mentioned],
        processes: int,
    ):
        self.settings = settings
        self.output = output
        self.annotations = annotations
        self.mentioned = mentioned
        self.processes = processes
        self.queries = queries
        self.by_image: dict[int, list[Query]] = {}
        for query in queries:
            self.by_image.setdefault(query.image_id, []).append(query)
        self.image_ids = sorted(self.by_image)
        self.row_of: dict[str, int] = {}
        for image_id in self.image_ids:
            for query in self.by_image[image_id]:
                self.row_of.setdefault(query.text, len(self.row_of))
        num_blocks = -(-len(self.image_ids) // IMAGES_PER_BLOCK)
        self.shards = Shards(output.work / "shards", num_blocks)
        self.shards.folder.mkdir(exist_ok=True)

    def finish(self) -> dict[str, Any]:
        """Do what is not yet done; returns the manifest."""
        try:
            store = self._store()
            self._check_images(store)
        except ValueError:
            self.output.discard()
            raise
        pictures, drawn = None, []
        if self.settings.image_dir is not None:
            pictures = Pictures(self.settings.image_dir, self.annotations.images)
            drawn = pictures.choose(self.queries, store, self.settings.pictures)
        num_silent = self._encode()
        threshold = self._threshold()
        top_n = (self.settings.top_n or TOP_N) if threshold is None else -1
        blocks = self._block_settings(top_n, threshold)
        self._run("write", "counts", blocks, "images")
        manifest: dict[str, Any] = {
            "counts": self._counts(store, num_silent),
            "threshold": threshold,
            "outputs": {
                one.output: merge_format(one, self.shards, self.output)
                for one in (FORMATS[name] for name in self.settings.formats)
            },
            "pictures": len(drawn),
        }
        if self.mentioned:
            manifest["recall"] = recall_of_mentions(load_matches(self.shards.paths("recall")))
        if pictures is not None:
            self._draw(pictures, drawn, BlockWorker(blocks))
        return self.output.finish(manifest)

    def _draw(self, pictures: Pictures, drawn: Sequence[Query], worker: BlockWorker) -> None:
        folder = self.output.work / PICTURES
        folder.mkdir(exist_ok=True)
        for number, query in enumerate(drawn):
            [task] = self._images([query.image_id], [query])
            pictures.draw(folder / f"{number:03d}_{query.image_id}.jpg", task, worker)
        self.output.publish(PICTURES)

    def _store(self) -> DetectionStore:
        folder = self.output.work / "store"
        folder.mkdir(exist_ok=True)
        if DetectionStore.is_built(folder):
            return DetectionStore(folder)
        return DetectionStore.build(
            self.settings.detections, self.annotations.class_of, self.annotations.path, folder
        )

    def _check_images(self, store: DetectionStore) -> None:
        without = [image_id for image_id in self.image_ids if image_id not in store]
        for image_id in without:
            if image_id not in self.annotations.images:
                query = self.by_image[image_id][0]
                raise ValueError(
                    f"{self.settings.queries}: query {query.query_id!r} is of image {image_id}, "
                    f"which is neither in {self.settings.detections} nor among the images of "
                    f"{self.annotations.path}. Use files of the same images."
                )
        if without:
            logger.warning(
                "%s: %d of the %d images with queries have no detections (the first is %d); their "
                "queries get empty results",
                self.settings.detections,
                len(without),
                len(self.image_ids),
                without[0],
            )

    def _encode(self) -> int:
        texts = TextRows(self.output.work / "texts", self.annotations.category_names)
        with progress("texts", len(self.row_of)) as bar:
            return texts.encode(list(self.row_of), bar.update)

    def _threshold(self) -> float | None:
        """The threshold on s, or None."""
        if self.settings.mean_proposals is None:
            return self.settings.score_thresh
        blocks = self._block_settings(-1, None)
        self._run("write_scores", "scores", blocks, "images, for the threshold")
        return threshold_for_mean(list(self.shards.paths("scores")), self.settings.mean_proposals)

    def _block_settings(self, topk: int, score_thresh: float | None) -> BlockSettings:
        return BlockSettings(
            work=self.output.work,
            category_ids=tuple(self.annotations.category_ids),
            category_names=tuple(self.annotations.category_names),
            formats=self.settings.formats,
            topk=topk,
            score_thresh=score_thresh,
            nms_thresh=self.settings.nms_thresh,
        )

    def _run(self, method: str, suffix: str, settings: BlockSettings, what: str) -> None:
        """Run a method of `BlockWorker` on all blocks that lack the file that it writes last."""
        missing = self.shards.missing(suffix)
        with progress(what, len(self.image_ids)) as bar:
            bar.update(len(self.image_ids) - sum(len(self._ids(number)) for number in missing))
            if missing:
                run_tasks(
                    BlockWorker,
                    settings,
                    method,
                    (BlockTask(n, tuple(self._images(self._ids(n)))) for n in missing),
                    min(self.processes, len(missing)),
                    lambda block: bar.update(len(block.images)),
                )

    def _ids(self, number: int) -> list[int]:
        return self.image_ids[number * IMAGES_PER_BLOCK : (number + 1) * IMAGES_PER_BLOCK]

    def _images(
        self, image_ids: Sequence[int], queries: Sequence[Query] | None = None
    ) -> Iterator[ImageTask]:
        for image_id in image_ids:
            own = self.by_image[image_id] if queries is None else queries
            known = self.annotations.images.get(image_id)
            yield ImageTask(
                image_id,
                None if known is None else known.size,
                tuple(own),
                tuple(self.row_of[query.text] for query in own),
                tuple(self.mentioned.get(query.query_id) for query in own),
            )

    def _counts(self, store: DetectionStore, num_silent: int) -> dict[str, int | float]:
        counts = sum_counts(self.shards.paths("counts"))
        unasked = [i for i in store.image_ids.tolist() if i not in self.by_image]
        return {
            "images": len(self.image_ids),
            "queries": len(self.queries),
            **counts,
            "distinct_texts": len(self.row_of),
            "distinct_texts_without_category": num_silent,
            "detections": len(store),
            "detections_of_zero_area": store.num_zero_area,
            "detections_without_queries": sum(map(store.count, unasked)),
            "images_without_queries": len(unasked),
            "queries_with_mentions": len(self.mentioned),
            "proposals_per_query": counts["proposals"] / len(self.queries),
        }


def _versions() -> dict[str, str]:
    found = versions()
    try:
        found["spacy"] = importlib.metadata.version("spacy")
    except importlib.metadata.PackageNotFoundError:
        found["spacy"] = ""
    return found
