"""Rerank the detections of blocks of images, as each process does it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from detectron2.structures import Instances

from vlnms_d2.data.mapper import read_image
from vlnms_d2.evaluation.matching import Match
from vlnms_d2.export import FORMATS, QueryProposals, check_formats
from vlnms_d2.export.job import Block, Shards
from vlnms_d2.export.threshold import check_cut, save_scores
from vlnms_d2.file_io import atomic_write, write_json
from vlnms_d2.language.matching import category_matcher
from vlnms_d2.modeling.candidates import Candidates
from vlnms_d2.modeling.relatedness import PortablePhrases, portable_relatedness
from vlnms_d2.modeling.relatedness import category_relatedness as relatedness_of
from vlnms_d2.rerank import NMS_THRESH, rerank
from vlnms_d2.visualization import draw_comparison

from .annotations import Mentioned
from .detections import Detections, DetectionStore
from .queries import Query
from .recall import METHODS, match_mentions, save_matches

TOP_N = 100
QUERY_CHUNK = 128  # an image may have any number of queries
TEXTS_PER_FILE = 1024
SCORES, COUNTS, RECALL = "scores", "counts", "recall"
DRAWN_PROPOSALS = 8  # more hide the image
_JPEG_QUALITY = 92


@dataclass(frozen=True)
class RerankSettings:
    """What is reranked.

    Attributes:
        detections: COCO results file.
        annotations: file in COCO's format with the detector's categories; may have images and
            annotations.
        queries: see `read_queries`.
        out: the output folder.
        formats: names in `vlnms_d2.export.FORMATS`.
        split: of REFER's queries; None for all.
        top_n: proposals kept per query. At most one of this and the next two is given; without
            any, `TOP_N`.
        score_thresh: keep all proposals with s above this, and the best one.
        mean_proposals: like `score_thresh`, with the threshold at which the mean number per query
            (of queries with detections) is closest to this. It takes a pass over all queries.
        nms_thresh: IoU of the class-wise NMS.
        mentions: JSON list of {"caption_id", "annotation_ids"} to measure recall, or None.
        relatedness: "Category" or "Portable", see `rerank`.
        image_dir: folder of the images, for pictures and for the colours of Portable, or None.
        pictures: number of queries to draw.

    Raises:
        ValueError: a value is impossible, or several exclude each other.
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
    relatedness: str = "Category"
    image_dir: Path | None = None
    pictures: int = 0

    def __post_init__(self):
        check_cut(self.top_n, self.score_thresh, self.mean_proposals)
        if not 0 <= self.nms_thresh <= 1:
            raise ValueError(f"nms_thresh is {self.nms_thresh}, expected a number from 0 to 1")
        check_formats(self.formats, FORMATS)
        uses_images = self.pictures > 0 or self.relatedness == "Portable"
        lacks_images = self.pictures > 0 and self.image_dir is None
        if self.pictures < 0 or lacks_images or (self.image_dir is not None and not uses_images):
            raise ValueError("the number of pictures and the folder of the images go together")

    @property
    def inputs(self) -> dict[str, Path]:
        """The input files by their role."""
        roles = ("detections", "annotations", "queries", "mentions")
        paths = {role: getattr(self, role) for role in roles}
        return {role: path for role, path in paths.items() if path is not None}

    @property
    def topk(self) -> int:
        """Maximum number of proposals per query; -1 if a threshold decides."""
        by_threshold = self.score_thresh is not None or self.mean_proposals is not None
        return -1 if by_threshold else self.top_n or TOP_N


def category_relatedness(category_names: Sequence[str]) -> Callable[[list[str]], np.ndarray]:
    """The function from T texts to r of Category, float32 [T, C]; a text that names no category
    has a row of ones."""
    matcher = category_matcher(category_names)
    return lambda texts: relatedness_of(matcher.best_cosines(texts)).numpy()


class TextRows:
    """A table in a folder with r of each of C categories, one row per distinct text."""

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
        numbers = np.asarray(rows, dtype=np.int64)
        table = np.empty((len(rows), len(self.category_names)), dtype=np.float32)
        files = numbers // TEXTS_PER_FILE
        for number in np.unique(files).tolist():
            here = files == number
            # Memory-mapped, because often only few rows of a file are needed.
            table[here] = np.load(self._file(number), mmap_mode="r")[numbers[here] % TEXTS_PER_FILE]
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
        path: of the image file, or None.
    """

    image_id: int
    size: tuple[int, int] | None
    queries: tuple[Query, ...]
    rows: tuple[int, ...]
    mentioned: tuple[Mentioned | None, ...]
    path: Path | None = None


class Reranker:
    """Reranks the detections of images for their queries.

    Args:
        settings: of the job.
        shards: of the blocks.
        work: folder with "store" and "texts".
        category_ids, category_names: by class.
        score_thresh: on the fused score; None for none.
    """

    def __init__(
        self,
        settings: RerankSettings,
        shards: Shards,
        work: Path,
        category_ids: Sequence[int],
        category_names: Sequence[str],
        score_thresh: float | None,
    ):
        self.settings, self.shards = settings, shards
        self.category_ids = np.array(category_ids, dtype=np.int64)
        self.category_names = category_names
        self.score_thresh = score_thresh
        self.store = DetectionStore(work / "store")
        self.texts = TextRows(work / "texts", category_names)
        self.phrases: PortablePhrases | None = None  # takes seconds to load

    def write_scores(self, blocks: Sequence[Block]) -> None:
        """Write the scores of everything that NMS leaves, for the threshold."""
        for number, images in blocks:
            results = (
                result
                for image in images
                for result in self.answer(image, *self.read(image), topk=-1, score_thresh=None)
            )
            path = self.shards.path(number, SCORES)
            save_scores(path, (result.scores.numpy() for result in results))

    def write(self, blocks: Sequence[Block]) -> None:
        """Write the shards of all formats of each block, and last the counts."""
        for block in blocks:
            self._write_block(block)

    def _write_block(self, block: Block) -> None:
        matches: dict[str, list[Match]] = {method: [] for method in METHODS}
        counts = dict.fromkeys(("images_without_detections", "queries_without_detections"), 0)
        counts["proposals"] = 0
        with ExitStack() as stack:
            files = {
                name: stack.enter_context(atomic_write(self.shards.path(block.number, name)))
                for name in self.settings.formats
            }
            for image in block.images:
                detections, related = self.read(image)
                topk, score_thresh = self.settings.topk, self.score_thresh
                results = self.answer(image, detections, related, topk, score_thresh)
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
        save_matches(self.shards.path(block.number, RECALL), matches)
        write_json(self.shards.path(block.number, COUNTS), counts)

    def read(self, image: RerankImage) -> tuple[Detections, np.ndarray]:
        """The N detections of an image and their relatedness to its Q queries, float32 [Q, N]."""
        detections = self.store.of(image.image_id)
        if self.settings.relatedness == "Portable":
            return detections, self._portable(image, detections)
        return detections, self.texts.read(image.rows)[:, detections.classes]

    def _portable(self, image: RerankImage, detections: Detections) -> np.ndarray:
        if self.phrases is None:
            self.phrases = PortablePhrases(category_names=self.category_names)
        boxes, scores = (
            torch.from_numpy(x).float() for x in (detections.corners, detections.scores)
        )
        classes = torch.from_numpy(detections.classes)
        candidates = Candidates(boxes, scores, classes, proposal_index=classes)
        pixels = None if image.path is None else read_image(image.path, "BGR")
        size = image.size if pixels is None else pixels.shape[:2]
        if size is None:
            size = tuple(boxes[:, [3, 2]].amax(dim=0).tolist()) if len(boxes) else (1, 1)
        texts = [query.text for query in image.queries]
        chunks = (texts[i : i + QUERY_CHUNK] for i in range(0, len(texts), QUERY_CHUNK))
        parts = (portable_relatedness(self.phrases(c), candidates, size, pixels) for c in chunks)
        return torch.cat(list(parts)).numpy()

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
                self.category_names,
                [query.text for query in image.queries[start:end]],
                topk=topk,
                score_thresh=score_thresh,
                nms_thresh=self.settings.nms_thresh,
                relatedness=related[start:end],
            )
        return results

    def draw(self, path: Path, image: RerankImage) -> bytes:
        """A JPEG that compares the proposals of a query with those of the detector alone.

        Args:
            path: of the image file.
            image: with this one query.

        Raises:
            FileNotFoundError, ValueError: the image file cannot be read.
        """
        pixels = read_image(path, "BGR")
        [query] = image.queries
        detections, related = self.read(image)
        topk = self.settings.topk
        topk = DRAWN_PROPOSALS if topk < 0 else min(DRAWN_PROPOSALS, topk)
        [aware] = self.answer(image, detections, related, topk, self.score_thresh)
        [alone] = self.answer(image, detections, np.ones_like(related), topk, None)
        alone.remove("relatedness")  # or its labels would show it
        words = query.text.split()
        drawn = draw_comparison(pixels, query.text, words, None, alone, aware, self.category_names)
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
            category_ids=self.category_ids[classes],
            category_names=[self.category_names[c] for c in classes.tolist()],
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
            self.category_names,
            related[known],
            [image.mentioned[i] for i in known],
            self.settings.nms_thresh,
        )
