"""The work on one block of images, as each process does it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from detectron2.structures import Instances

from ..data.datasets.coco import Mentioned
from ..data.detections import Detections, DetectionStore
from ..data.queries import Query
from ..evaluation.matching import Match
from ..evaluation.mention_recall import METHODS, match_mentions, save_matches
from ..export import FORMATS, QueryProposals
from ..file_io import atomic_write, write_json
from ..rerank import rerank
from .rerank_text import TextRows
from .score_threshold import save_scores
from .shards import shard_path

QUERIES_AT_ONCE = 128


@dataclass(frozen=True)
class ImageTask:
    """An image with its queries.

    Attributes:
        image_id: of the image.
        size: (height, width) in pixels, or None.
        queries: Q of them.
        rows: of each query's text in `TextRows`.
        mentioned: by each query; None where that is not known.
    """

    image_id: int
    size: tuple[int, int] | None
    queries: tuple[Query, ...]
    rows: tuple[int, ...]
    mentioned: tuple[Mentioned | None, ...]


@dataclass(frozen=True)
class BlockTask:
    """Images that are answered together and written to one shard of each format."""

    number: int
    images: tuple[ImageTask, ...]


@dataclass(frozen=True)
class BlockSettings:
    """What all blocks have in common.

    Attributes:
        work: folder with "store" and "texts"; shards go there.
        category_ids, category_names: by class.
        formats: names in `vlnms_d2.export.FORMATS`.
        topk: proposals per query at most; -1 for all.
        score_thresh: on the fused score; None for none.
        nms_thresh: IoU of the class-wise NMS.
    """

    work: Path
    category_ids: tuple[int, ...]
    category_names: tuple[str, ...]
    formats: tuple[str, ...]
    topk: int
    score_thresh: float | None
    nms_thresh: float

    def shard(self, number: int, suffix: str) -> Path:
        """The file of a block: `suffix` is the name of a format, "counts", "recall" or
        "scores"."""
        return shard_path(self.work / "shards", number, suffix)


class BlockWorker:
    """Answers blocks.

    Args:
        settings: see `BlockSettings`.
    """

    def __init__(self, settings: BlockSettings):
        self.settings = settings
        self.store = DetectionStore(settings.work / "store")
        self.texts = TextRows(settings.work / "texts", settings.category_names)
        self._category_ids = np.array(settings.category_ids, dtype=np.int64)

    def write(self, block: BlockTask) -> None:
        """Write the shards of all formats, and last the counts, with which the block is done."""
        settings = self.settings
        matches: dict[str, list[Match]] = {method: [] for method in METHODS}
        counts = dict.fromkeys(("images_without_detections", "queries_without_detections"), 0)
        counts["proposals"] = 0
        with ExitStack() as stack:
            shards = {
                name: stack.enter_context(atomic_write(settings.shard(block.number, name)))
                for name in settings.formats
            }
            for image in block.images:
                detections = self.store.of(image.image_id)
                related = self.relatedness(image, detections)
                found = self.answer(image, detections, related, settings.topk)
                proposals = [
                    self._record(query, own, detections)
                    for query, own in zip(image.queries, found, strict=True)
                ]
                for name, file in shards.items():
                    FORMATS[name].write(proposals, file)
                counts["proposals"] += sum(map(len, proposals))
                if not len(detections.scores):
                    counts["images_without_detections"] += 1
                    counts["queries_without_detections"] += len(image.queries)
                for method, own in self._matches(image, detections, related).items():
                    matches[method] += own
        save_matches(settings.shard(block.number, "recall"), matches)
        write_json(settings.shard(block.number, "counts"), counts)

    def write_scores(self, block: BlockTask) -> None:
        """Write the scores of all that NMS leaves, but for the best of each query: on these
        depends what a threshold leaves."""
        path = self.settings.shard(block.number, "scores")
        save_scores(path, (own.scores.numpy() for own in self._answers_uncut(block)))

    def _answers_uncut(self, block: BlockTask) -> Iterator[Instances]:
        for image in block.images:
            detections = self.store.of(image.image_id)
            related = self.relatedness(image, detections)
            yield from self.answer(image, detections, related, topk=-1, cut=False)

    def relatedness(self, image: ImageTask, detections: Detections) -> np.ndarray:
        """float32 [Q, N]."""
        return self.texts.read(image.rows)[:, detections.classes]

    def answer(
        self,
        image: ImageTask,
        detections: Detections,
        related: np.ndarray,
        topk: int,
        cut: bool = True,
    ) -> list[Instances]:
        """The proposals of each query; `cut` is whether the threshold applies."""
        found = []
        corners = detections.corners
        # An image may have any number of queries.
        for start in range(0, len(image.queries), QUERIES_AT_ONCE):
            end = start + QUERIES_AT_ONCE
            found += rerank(
                corners,
                detections.scores,
                detections.classes,
                self.settings.category_names,
                [query.text for query in image.queries[start:end]],
                topk=topk,
                score_thresh=self.settings.score_thresh if cut else None,
                nms_thresh=self.settings.nms_thresh,
                relatedness=related[start:end],
                image_size=image.size,
            )
        return found

    def _record(self, query: Query, found: Instances, detections: Detections) -> QueryProposals:
        index = found.candidate_index.numpy()
        classes = detections.classes[index]
        return QueryProposals(
            image_id=query.image_id,
            query_id=query.query_id,
            query=query.text,
            ref_id=query.ref_id,
            split=query.split,
            # Of the file, not of the float32 that they were compared in.
            boxes=detections.boxes[index],
            corners=detections.corners[index],
            category_ids=self._category_ids[classes],
            category_names=[self.settings.category_names[c] for c in classes.tolist()],
            scores=found.scores.numpy(),
            cls_scores=detections.scores[index],
            relatedness=found.relatedness.numpy(),
            candidate_index=index,
        )

    def _matches(
        self, image: ImageTask, detections: Detections, related: np.ndarray
    ) -> dict[str, list[Match]]:
        known = [i for i, one in enumerate(image.mentioned) if one is not None]
        if not known:
            return {}
        mentioned: Sequence[Mentioned] = [image.mentioned[i] for i in known]
        return match_mentions(
            detections.corners,
            detections.scores,
            detections.classes,
            self.settings.category_names,
            related[known],
            mentioned,
            self.settings.nms_thresh,
        )
