"""Rerank the detections of blocks of images, as each process does it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from detectron2.structures import Instances

from ..data.coco_annotations import Mentioned
from ..data.detection_store import Detections, DetectionStore
from ..data.query_files import Query
from ..evaluation.matching import Match
from ..evaluation.mention_recall import METHODS, match_mentions, save_matches
from ..file_io import atomic_write, write_json
from ..language.curve import relatedness
from ..language.matching import category_matcher
from ..rerank import rerank
from ..visualization import draw_comparison
from . import FORMATS
from .base import QueryProposals
from .job import Block, Shards
from .threshold import save_scores

QUERY_CHUNK = 128  # an image may have any number of queries
TEXTS_PER_FILE = 1024
SCORES, COUNTS, RECALL = "scores", "counts", "recall"
DRAWN_PROPOSALS = 8  # more hide the image
_JPEG_QUALITY = 92


def category_relatedness(category_names: Sequence[str]) -> Callable[[list[str]], np.ndarray]:
    """The function from T texts to r of Category, float32 [T, C]; a text that names no category
    has a row of ones."""
    matcher = category_matcher(category_names)
    return lambda texts: relatedness(matcher.best_cosines(texts))


class TextRows:
    """A table on disk with r of each category, one row per distinct text.

    Args:
        folder: of the table.
        category_names: C names.
    """

    def __init__(self, folder: Path, category_names: Sequence[str]):
        self.folder = folder
        self.category_names = list(category_names)

    def encode(self, texts: Sequence[str], report: Callable[[int], object]) -> int:
        """Write the rows that are missing.

        Always in the same chunks and in one process, so that neither interruptions nor the number
        of processes change a bit of them.

        Args:
            texts: distinct, in the order of the rows.
            report: called with the number of texts of each finished chunk.

        Returns:
            How many texts name no category.
        """
        self.folder.mkdir(exist_ok=True)
        encode, num_silent = None, 0
        for start in range(0, len(texts), TEXTS_PER_FILE):
            chunk = list(texts[start : start + TEXTS_PER_FILE])
            path = self._file(start // TEXTS_PER_FILE)
            if not path.is_file():
                if encode is None:  # takes seconds to load
                    encode = category_relatedness(self.category_names)
                rows = np.asarray(encode(chunk), dtype=np.float32)
                with atomic_write(path) as file:
                    np.save(file, rows)
            num_silent += int((np.load(path) == 1).all(axis=1).sum())
            report(len(chunk))
        return num_silent

    def read(self, rows: Sequence[int]) -> np.ndarray:
        """float32 [len(rows), C]."""
        rows = np.asarray(rows, dtype=np.int64)
        table = np.empty((len(rows), len(self.category_names)), dtype=np.float32)
        files = rows // TEXTS_PER_FILE
        for number in np.unique(files).tolist():
            here = files == number
            # Memory-mapped, because often only few rows of a file are needed.
            table[here] = np.load(self._file(number), mmap_mode="r")[rows[here] % TEXTS_PER_FILE]
        return table

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.npy"


class RerankImage(NamedTuple):
    """An image with its queries.

    Attributes:
        image_id: of the image.
        size: (height, width) in pixels, or None.
        queries: Q queries.
        rows: of each query's text in `TextRows`.
        mentioned: by each query; None if unknown.
    """

    image_id: int
    size: tuple[int, int] | None
    queries: tuple[Query, ...]
    rows: tuple[int, ...]
    mentioned: tuple[Mentioned | None, ...]


class RerankerSettings(NamedTuple):
    """What all blocks have in common.

    Attributes:
        shards: of the blocks.
        work: folder with "store" and "texts".
        category_ids, category_names: by class.
        formats: names in `vlnms_d2.export.FORMATS`.
        topk: maximum number of proposals per query; -1 for all.
        score_thresh: on the fused score; None for none.
        nms_thresh: IoU of the class-wise NMS.
    """

    shards: Shards
    work: Path
    category_ids: tuple[int, ...]
    category_names: tuple[str, ...]
    formats: tuple[str, ...]
    topk: int
    score_thresh: float | None
    nms_thresh: float


class Reranker:
    """Reranks the detections of images for their queries."""

    def __init__(self, settings: RerankerSettings):
        self.settings = settings
        self.store = DetectionStore(settings.work / "store")
        self.texts = TextRows(settings.work / "texts", settings.category_names)
        self._category_ids = np.array(settings.category_ids, dtype=np.int64)

    def write_scores(self, blocks: Sequence[Block]) -> None:
        """Write the scores of everything that NMS leaves, for the threshold."""
        for number, images in blocks:
            results = (
                result
                for image in images
                for result in self.answer(image, *self.read(image), topk=-1, score_thresh=None)
            )
            path = self.settings.shards.path(number, SCORES)
            save_scores(path, (result.scores.numpy() for result in results))

    def write(self, blocks: Sequence[Block]) -> None:
        """Write the shards of all formats of each block, and last the counts."""
        for block in blocks:
            self._write_block(block)

    def _write_block(self, block: Block) -> None:
        settings = self.settings
        matches: dict[str, list[Match]] = {method: [] for method in METHODS}
        counts = dict.fromkeys(("images_without_detections", "queries_without_detections"), 0)
        counts["proposals"] = 0
        with ExitStack() as stack:
            files = {
                name: stack.enter_context(atomic_write(settings.shards.path(block.number, name)))
                for name in settings.formats
            }
            for image in block.images:
                detections, related = self.read(image)
                results = self.answer(
                    image, detections, related, settings.topk, settings.score_thresh
                )
                proposals = [
                    self._record(query, result, detections)
                    for query, result in zip(image.queries, results, strict=True)
                ]
                for name, file in files.items():
                    FORMATS[name].write(proposals, file)
                counts["proposals"] += sum(map(len, proposals))
                if not len(detections.scores):
                    counts["images_without_detections"] += 1
                    counts["queries_without_detections"] += len(image.queries)
                for method, image_matches in self._matches(image, detections, related).items():
                    matches[method] += image_matches
        save_matches(settings.shards.path(block.number, RECALL), matches)
        write_json(settings.shards.path(block.number, COUNTS), counts)

    def read(self, image: RerankImage) -> tuple[Detections, np.ndarray]:
        """The N detections of an image and their relatedness to its Q queries, float32 [Q, N]."""
        detections = self.store.of(image.image_id)
        return detections, self.texts.read(image.rows)[:, detections.classes]

    def answer(
        self,
        image: RerankImage,
        detections: Detections,
        related: np.ndarray,
        topk: int,
        score_thresh: float | None,
    ) -> list[Instances]:
        """The proposals of each query."""
        results = []
        corners = detections.corners
        for start in range(0, len(image.queries), QUERY_CHUNK):
            end = start + QUERY_CHUNK
            results += rerank(
                corners,
                detections.scores,
                detections.classes,
                self.settings.category_names,
                [query.text for query in image.queries[start:end]],
                topk=topk,
                score_thresh=score_thresh,
                nms_thresh=self.settings.nms_thresh,
                relatedness=related[start:end],
                image_size=image.size,
            )
        return results

    def draw(self, path: Path, image: RerankImage) -> bytes:
        """A JPEG that compares the proposals of a query with those of the detector alone.

        Args:
            path: of the image file.
            image: with this one query.

        Raises:
            ValueError: the image file cannot be read.
        """
        pixels = cv2.imread(str(path))
        if pixels is None:
            raise ValueError(f"{path}: not an image that can be read. Fetch it again.")
        settings, [query] = self.settings, image.queries
        detections, related = self.read(image)
        topk = DRAWN_PROPOSALS if settings.topk < 0 else min(DRAWN_PROPOSALS, settings.topk)
        [aware] = self.answer(image, detections, related, topk, settings.score_thresh)
        [alone] = self.answer(image, detections, np.ones_like(related), topk, None)
        alone.remove("relatedness")  # or its labels would show it
        words = query.text.split()
        drawn = draw_comparison(
            pixels, query.text, words, None, alone, aware, settings.category_names
        )
        return cv2.imencode(".jpg", drawn, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])[1].tobytes()

    def _record(self, query: Query, result: Instances, detections: Detections) -> QueryProposals:
        index = result.candidate_index.numpy()
        classes = detections.classes[index]
        return QueryProposals(
            image_id=query.image_id,
            query_id=query.query_id,
            query=query.text,
            ref_id=query.ref_id,
            split=query.split,
            # From the file: `rerank` rounds to float32.
            boxes=detections.boxes[index],
            corners=detections.corners[index],
            category_ids=self._category_ids[classes],
            category_names=[self.settings.category_names[c] for c in classes.tolist()],
            scores=result.scores.numpy(),
            cls_scores=detections.scores[index],
            relatedness=result.relatedness.numpy(),
            candidate_index=index,
        )

    def _matches(
        self, image: RerankImage, detections: Detections, related: np.ndarray
    ) -> dict[str, list[Match]]:
        known = [i for i, mentioned in enumerate(image.mentioned) if mentioned is not None]
        if not known:
            return {}
        return match_mentions(
            detections.corners,
            detections.scores,
            detections.classes,
            self.settings.category_names,
            related[known],
            [image.mentioned[i] for i in known],
            self.settings.nms_thresh,
        )
