"""What tools/prepare_data.py does with a data set: check, vocabulary, word vectors, pseudo ground
truth and statistics. Each step writes one file, and is skipped where that file was made with the
same settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..data.detections import CategorisedDetections
from ..data.pseudo_gt import (
    contexts_of,
    has_contexts,
    mentioned_objects,
    pseudo_gt_file,
    referent_misses,
    save_pseudo_gt,
    weakly_supervised,
)
from ..file_io import atomic_write, write_json
from ..language.matching import CategoryMatcher
from ..language.nouns import NounFinder
from ..language.word_vectors import WordVectors, read_word_vectors
from ..modeling.text import Vocabulary, tokenize

# Chosen by tools/calibrate_words.py on the training split of RefShapes.
GAMMA_MINILM = 0.65
GAMMA_GLOVE = 0.4  # the paper's


@dataclass(frozen=True)
class Settings:
    """How data sets are prepared.

    Attributes:
        pipeline: spaCy pipeline that finds the nouns.
        word_vectors: file in the format of GloVe; empty for MiniLM.
        gamma: least cosine of a noun and a category name.
        vocab_min_count: words seen less often in a training set are unknown.
        detections: COCO results file of a detector for WSPG; empty for text similarity with the
            annotated boxes.
        min_score: detections below it are not looked at. Of 0.05, 0.1 and 0.3 the default is best
            for referents and contextual objects together on RefShapes val.
    """

    pipeline: str = ""
    word_vectors: str = ""
    gamma: float = GAMMA_MINILM
    vocab_min_count: int = 2
    detections: str = ""
    min_score: float = 0.1


class Preparation:
    """Prepares data sets one after the other, with the same pipeline and word vectors.

    Args:
        out: folder; each data set gets one of its name in it; see `prepared_folder`.
        settings: see `Settings`.
        load_vectors: gives the word vectors when they are first needed.
        detected: detections by image for WSPG, or None for text similarity.
        redo: make again what is there.
        report: takes lines for the user.
        processes: that find the nouns.
    """

    def __init__(
        self,
        out: Path,
        settings: Settings,
        load_vectors: Callable[[], WordVectors],
        detected: CategorisedDetections | None = None,
        redo: bool = False,
        report: Callable[[str], None] = print,
        processes: int = 1,
    ):
        self.out = out
        self.settings = settings
        self.detected = detected
        self.redo = redo
        self.report = report
        self.processes = processes
        self._load_vectors = load_vectors
        self._vectors: WordVectors | None = None
        self._nouns: NounFinder | None = None

    def prepare(self, name: str) -> dict[str, Any]:
        """Prepare a registered data set.

        Returns:
            Its statistics, as `statistics.json` has them.

        Raises:
            FileNotFoundError, ValueError: a file of the data set is missing or damaged.
        """
        images = DatasetCatalog.get(name)
        folder = self.out / name
        folder.mkdir(parents=True, exist_ok=True)
        queries = [e["query"] for image in images for e in image["expressions"]]
        if not queries:
            raise ValueError(f"the data set {name} has no expression")
        self.report(f"{name}: {len(images):,} images, {len(queries):,} expressions")
        vocabulary = self._vocabulary(name, queries, folder)
        statistics = {"images": len(images), "expressions": len(queries)}
        statistics |= _word_statistics(queries, vocabulary)
        statistics |= self._pseudo_gt(name, images)
        write_json(folder / "statistics.json", statistics)
        return statistics

    def _vocabulary(self, name: str, queries: list[str], folder: Path) -> Vocabulary | None:
        """Of a training set its own; of another that of the training set beside it, if any."""
        stem, _, split = name.rpartition("_")
        path = folder / "vocab.json"
        if split != "train":
            path = self.out / f"{stem}_train" / "vocab.json"
            return Vocabulary.load(path) if path.is_file() else None
        settings = {"min_count": self.settings.vocab_min_count, "expressions": len(queries)}
        if not self._is_made(path, settings):
            vocabulary = Vocabulary.build(queries, self.settings.vocab_min_count)
            vocabulary.save(path)
            if self.settings.word_vectors:
                self._word_vectors(vocabulary, folder / "word_vectors.txt")
            self._mark_made(path, settings)
        return Vocabulary.load(path)

    def _word_vectors(self, vocabulary: Vocabulary, path: Path) -> None:
        """The vocabulary's part of the word vectors, for MODEL.VLNMS.WORD_VECTORS."""
        source = self.settings.word_vectors
        vectors = read_word_vectors(source, vocabulary.words[2:], self._get_vectors().dim)
        with atomic_write(path) as file:
            for word, vector in vectors.items():
                file.write(f"{word} {' '.join(map(str, vector))}\n".encode())

    def _pseudo_gt(self, name: str, images: list[dict[str, Any]]) -> dict[str, Any]:
        if self.detected is None and has_contexts(images):
            contexts = [len(e["context_ann_ids"]) for i in images for e in i["expressions"]]
            return {"contexts": "annotated", "contexts_per_expression": float(np.mean(contexts))}
        if self.detected is None and not any(image["annotations"] for image in images):
            raise ValueError(
                f"the data set {name} has no annotated objects that its texts could speak of; "
                "give the results file of a detector (--detections and --categories)"
            )
        path = pseudo_gt_file(self.out, name)
        settings = asdict(self.settings) | {"images": len(images)}
        if not self._is_made(path, settings):
            self._make_pseudo_gt(name, images, path, settings)
            self._mark_made(path, settings)
        return json.loads(path.read_text())["statistics"]

    def _make_pseudo_gt(
        self, name: str, images: list[dict[str, Any]], path: Path, settings: dict[str, Any]
    ) -> None:
        matcher = self._matcher(name)
        gamma = self.settings.gamma
        if self.detected is None:
            mentioned = list(mentioned_objects(images, matcher, gamma))
            found = contexts_of(mentioned)
            statistics = {
                "contexts": "text similarity",
                "referent_misses": referent_misses(mentioned),
            }
            content = {"contexts": found}
        else:
            found = weakly_supervised(images, self.detected.by_image, matcher, gamma)
            statistics = {"contexts": "WSPG"}
            content = {"boxes": found}
        counts = [len(own) for own in found.values()]
        statistics["contexts_per_expression"] = float(np.mean(counts))
        statistics["share_with_context"] = float(np.mean([count > 0 for count in counts]))
        save_pseudo_gt(path, name, settings, statistics=statistics, **content)

    def _matcher(self, name: str) -> CategoryMatcher:
        if self._nouns is None:
            self._nouns = NounFinder(self.settings.pipeline, processes=self.processes)
        if self.detected is not None:
            names, mentions = self.detected.category_names, self._nouns.chunk_heads
        else:
            names, mentions = MetadataCatalog.get(name).thing_classes, self._nouns.nouns
        return CategoryMatcher(names, mentions, self._get_vectors())

    def _get_vectors(self) -> WordVectors:
        if self._vectors is None:
            self._vectors = self._load_vectors()
        return self._vectors

    def _is_made(self, path: Path, settings: dict[str, Any]) -> bool:
        mark = _mark_of(path)
        if self.redo or not path.is_file() or not mark.is_file():
            return False
        same = json.loads(mark.read_text()) == settings
        self.report(f"  {path}: {'is there' if same else 'is made again, with other settings'}")
        return same

    @staticmethod
    def _mark_made(path: Path, settings: dict[str, Any]) -> None:
        write_json(_mark_of(path), settings)


def _mark_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.made")


def _word_statistics(queries: list[str], vocabulary: Vocabulary | None) -> dict[str, float]:
    words = [tokenize(query) for query in queries]
    statistics = {"words_per_expression": float(np.mean([len(own) for own in words]))}
    if vocabulary is not None:
        unknown = [word not in vocabulary for own in words for word in own]
        statistics["unknown_words"] = float(np.mean(unknown)) if unknown else 0.0
    return statistics
