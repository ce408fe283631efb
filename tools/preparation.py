"""Data preparation, as tools/prepare_data.py runs it: check a data set and write its vocabulary,
word vectors, pseudo ground truth and statistics.

Each step writes one file and is skipped if that file exists and was written with the same settings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog

from pseudo_gt import contexts_of, mentioned_objects, referent_misses, weakly_supervised
from reranking.annotations import read_categories
from reranking.detections import check_not_corners, iter_detections
from vlnms_d2.data.builtin import registered_images
from vlnms_d2.data.pseudo_gt import has_contexts, pseudo_gt_file, save_pseudo_gt
from vlnms_d2.file_io import atomic_write, claim, refuse_foreign, write_json
from vlnms_d2.language.matching import CategoryMatcher
from vlnms_d2.language.nouns import NounFinder
from vlnms_d2.language.word_vectors import WordVectors, read_word_vectors
from vlnms_d2.modeling.text import Vocabulary, tokenize

OUTPUTS = ("vocab.json", "word_vectors.txt", "statistics.json", "refer_val_test_images.json")
# Chosen by tools/calibrate_words.py on the training split of RefShapes.
GAMMA_MINILM = 0.65
GAMMA_GLOVE = 0.4  # the paper's


@dataclass(frozen=True)
class Settings:
    """How data sets are prepared."""

    pipeline: str = ""  # spaCy pipeline that finds the nouns
    word_vectors: str = ""  # file in the format of GloVe; empty for MiniLM
    gamma: float = GAMMA_MINILM  # least cosine of a noun and a category name
    vocab_min_count: int = 2  # words that occur less often in a training set are unknown
    # COCO results file of a detector for WSPG; empty for text similarity with the annotated boxes.
    detections: str = ""
    # Detections below it are ignored. Of 0.05, 0.1 and 0.3 the default is best for referents and
    # contextual objects together on RefShapes val.
    min_score: float = 0.1


@dataclass(frozen=True)
class CategorisedDetections:
    """Detections of many images, in memory.

    Attributes:
        by_image: image id -> boxes, float64 [D, 4], [x, y, width, height] in pixels, and classes,
            int64 [D], indices into `category_names`; in descending score order.
    """

    by_image: dict[int, tuple[np.ndarray, np.ndarray]]
    category_names: list[str]


def read_detections(
    results_file: str | Path, categories_file: str | Path, min_score: float = 0.0
) -> CategorisedDetections:
    """Reads a results file in COCO's format, without detections below `min_score`.

    Args:
        results_file: COCO results.
        categories_file: a file in COCO's format with "categories", such as the annotations that
            the detector was trained with.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: as of `DetectionStore.build`, or a file is damaged.
    """
    categories_file = Path(categories_file)
    names = read_categories(categories_file)
    class_of = {category_id: i for i, category_id in enumerate(names)}
    detections: dict[int, list[tuple[float, list[float], int]]] = {}
    found = iter_detections(Path(results_file), class_of, categories_file)
    for image_id, box, score, of_class in found:
        if score >= min_score:
            detections.setdefault(image_id, []).append((-score, box, of_class))
    by_image = {}
    for image_id, image_detections in detections.items():
        image_detections.sort(key=lambda detection: detection[0])
        boxes = np.array([box for _, box, _ in image_detections], dtype=np.float64)
        classes = np.array([of_class for *_, of_class in image_detections], dtype=np.int64)
        by_image[image_id] = (boxes, classes)
    return CategorisedDetections(by_image, list(names.values()))


class Preparation:
    """Prepares data sets one after another, with the same pipeline and word vectors.

    Args:
        out: folder; each data set has a subfolder with its name; see `prepared_folder`.
        load_vectors: returns the word vectors; called once, when they are first needed.
        detected: detections by image for WSPG, or None for text similarity.
        redo: write files again that exist already.
        report: called with lines for the user.
        processes: number of processes that find the nouns.
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
        self.out, self.settings, self.detected = out, settings, detected
        self.redo, self.report, self.processes = redo, report, processes
        self._load_vectors = load_vectors

    def prepare(self, name: str) -> dict[str, Any]:
        """Prepare a registered data set; returns its statistics, as `statistics.json` has them.

        For a data set to train detectors on, the ids of the images are written that it must not
        have.

        Raises:
            FileNotFoundError, ValueError: a file of the data set is missing or damaged.
        """
        images = registered_images(name)
        folder = self.out / name
        outputs = [folder / one for one in OUTPUTS]
        outputs.append(pseudo_gt_file(self.out, name))
        if not any(folder.glob(".*.made")):  # which earlier versions left as well
            refuse_foreign(*outputs)
        left_out = MetadataCatalog.get(name).get("refer_val_test_images")
        if left_out is not None:
            claim(*outputs)
            self.report(f"{name}: the ids of REFER's images of val and test are in {folder}")
            write_json(folder / "refer_val_test_images.json", left_out)
            statistics = {"images": len(images), "images_of_val_and_test": len(left_out)}
            write_json(folder / "statistics.json", statistics)
            return statistics
        queries = [e["query"] for image in images for e in image["expressions"]]
        if not queries:
            raise ValueError(f"the data set {name} has no expression")
        if self.settings.word_vectors:
            self._vectors  # noqa: B018, fails before anything is written
        claim(*outputs)
        self.report(f"{name}: {len(images):,} images, {len(queries):,} expressions")
        vocabulary = self._vocabulary(name, queries, folder)
        statistics = {"images": len(images), "expressions": len(queries)}
        statistics |= _word_statistics(queries, vocabulary)
        statistics |= self._pseudo_gt(name, images)
        write_json(folder / "statistics.json", statistics)
        return statistics

    def _vocabulary(self, name: str, queries: list[str], folder: Path) -> Vocabulary | None:
        """The vocabulary of a training set; of any other split that of its training set, if any."""
        stem, _, split = name.rpartition("_")
        path = folder / "vocab.json"
        if split != "train":
            path = self.out / f"{stem}_train" / "vocab.json"
            return Vocabulary.load(path) if path.is_file() else None
        settings = {"min_count": self.settings.vocab_min_count, "expressions": len(queries)}
        if not self._is_done(path, settings):
            vocabulary = Vocabulary.build(queries, self.settings.vocab_min_count)
            vocabulary.save(path)
            if self.settings.word_vectors:
                self._word_vectors(vocabulary, folder / "word_vectors.txt")
            write_json(_marker_of(path), settings)
        return Vocabulary.load(path)

    def _word_vectors(self, vocabulary: Vocabulary, path: Path) -> None:
        """Write the word vectors of the vocabulary, for MODEL.VLNMS.WORD_VECTORS."""
        source = self.settings.word_vectors
        vectors = read_word_vectors(source, vocabulary.words[2:], self._vectors.dim)
        with atomic_write(path) as file:
            for word, vector in vectors.items():
                file.write(f"{word} {' '.join(map(str, vector))}\n".encode())

    def _pseudo_gt(self, name: str, images: list[dict[str, Any]]) -> dict[str, Any]:
        if self.detected is None and has_contexts(images):
            contexts = [len(e["context_ann_ids"]) for i in images for e in i["expressions"]]
            return {"contexts": "annotated", "contexts_per_expression": float(np.mean(contexts))}
        if self.detected is None and not any(image["annotations"] for image in images):
            raise ValueError(
                f"the data set {name} has no annotated objects that its texts could mention; "
                "give the results file of a detector (--detections and --categories), or, for "
                "captions of COCO, fetch its annotations (datasets/README.md)"
            )
        path = pseudo_gt_file(self.out, name)
        settings = asdict(self.settings) | {"images": len(images)}
        if not self._is_done(path, settings):
            self._make_pseudo_gt(name, images, path, settings)
            write_json(_marker_of(path), settings)
        return json.loads(path.read_text())["statistics"]

    def _make_pseudo_gt(
        self, name: str, images: list[dict[str, Any]], path: Path, settings: dict[str, Any]
    ) -> None:
        matcher = self._matcher(name)
        gamma = self.settings.gamma
        if self.detected is None:
            mentioned = list(mentioned_objects(images, matcher, gamma))
            objects = contexts_of(mentioned)
            misses = referent_misses(mentioned)
            statistics = {"contexts": "text similarity", "referent_misses": misses}
            content = {"contexts": objects}
        else:
            boxes = self.detected.by_image
            sized = [i for i in images if "height" in i and i["image_id"] in boxes]
            check_not_corners(
                Path(self.settings.detections),
                ((boxes[i["image_id"]][0], (i["height"], i["width"])) for i in sized),
            )
            objects = weakly_supervised(images, self.detected.by_image, matcher, gamma)
            statistics, content = {"contexts": "WSPG"}, {"boxes": objects}
        counts = [len(of_expression) for of_expression in objects.values()]
        statistics["contexts_per_expression"] = float(np.mean(counts))
        statistics["share_with_context"] = float(np.mean([count > 0 for count in counts]))
        save_pseudo_gt(path, name, settings, statistics=statistics, **content)

    def _matcher(self, name: str) -> CategoryMatcher:
        if self.detected is not None:
            names, mentions = self.detected.category_names, self._chunk_heads
        else:
            names, mentions = MetadataCatalog.get(name).thing_classes, self._nouns.nouns
        return CategoryMatcher(names, mentions, self._vectors)

    def _chunk_heads(self, texts: Sequence[str]) -> list[list[str]]:
        """For each text the last word of each noun chunk, its head."""
        return [
            [chunk.split()[-1] for chunk in chunks] for chunks in self._nouns.noun_chunks(texts)
        ]

    @cached_property
    def _nouns(self) -> NounFinder:
        return NounFinder(self.settings.pipeline, processes=self.processes)

    @cached_property
    def _vectors(self) -> WordVectors:
        return self._load_vectors()

    def _is_done(self, path: Path, settings: dict[str, Any]) -> bool:
        """Whether the file exists and was written with these settings; reports it."""
        marker = _marker_of(path)
        if self.redo or not path.is_file() or not marker.is_file():
            return False
        same = json.loads(marker.read_text()) == settings
        state = "up to date, skipped" if same else "written again, the settings have changed"
        self.report(f"  {path}: {state}")
        return same


def _marker_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.made")


def _word_statistics(queries: list[str], vocabulary: Vocabulary | None) -> dict[str, float]:
    tokenized = [tokenize(query) for query in queries]
    statistics = {"words_per_expression": float(np.mean([len(words) for words in tokenized]))}
    if vocabulary is not None:
        unknown = [word not in vocabulary for words in tokenized for word in words]
        statistics["unknown_words"] = float(np.mean(unknown)) if unknown else 0.0
    return statistics
