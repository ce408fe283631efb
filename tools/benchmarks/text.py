"""Time of text processing before training: word vectors, nouns, pseudo ground truth."""

from __future__ import annotations

import os
import random
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.structures import BoxMode

from pseudo_gt import SAME_IOU, text_similarity
from vlnms_d2.language.matching import CategoryMatcher
from vlnms_d2.language.nouns import EMBEDDED, NOUN_POS, NounFinder
from vlnms_d2.language.synonyms import words_of
from vlnms_d2.language.word_vectors import GloveVectors, MiniLMVectors, WordVectors

from .base import Benchmark, Options, describe_machine, in_fresh_process, show_machine
from .rerank import category_names

DIM = 300  # numbers per line, as in GloVe 840B
DISTINCT_LINES = 1000  # lines with distinct numbers; all words are distinct
PROCESSES = 2
GAMMA = 0.65
ONE_BY_ONE = 1000  # expressions processed by the slow way
PER_IMAGE = 7  # expressions, as in RefCOCO
BOXES = 10  # per image
_WORDS = ("small", "large", "red", "blue", "old", "wooden", "broken", "empty", "open", "white")
_PLACES = ("left of", "next to", "behind", "in front of", "on top of", "far from", "under", "near")
_PATTERNS = (  # 3 to 11 words, 6.6 on average
    "the {0} {1}",
    "{1} {4} the {3}",
    "{0} {1} {4} a {2} {3}",
    "the {0} {1} that is {4} the {2} {3}",
)


class Text(Benchmark):
    """Reading word vectors, and pseudo ground truth in batches and one expression at a time."""

    def measure(self, options: Options) -> dict[str, Any]:
        """See `Benchmark.measure`."""
        if options.device != "cpu":
            raise ValueError("text is measured on the CPU only; leave --device out")
        return {
            "glove": measure_glove(options.lines),
            "pseudo_gt": measure_pseudo_gt(options.captions),
            "machine": describe_machine(options.torch_device),
        }

    def show(self, results: dict[str, Any]) -> str:
        """See `Benchmark.show`."""
        glove, pseudo = results["glove"], results["pseudo_gt"]
        return (
            f"{glove['lines']:,} lines of {DIM} word-vector numbers ({glove['mib']:,.0f} MiB): "
            f"{glove['first_s']:.2f} s the first time ({glove['lines_per_second']:,.0f} lines a "
            f"second), {glove['cached_s']:.4f} s from the cache, {glove['peak_mib']:,.0f} MiB the "
            "peak of the process\n"
            f"{pseudo['expressions']:,} distinct expressions of {pseudo['words']:.1f} words, "
            f"{PROCESSES} processes: {pseudo['seconds']:.2f} s "
            f"({pseudo['per_second']:,.0f} a second); in one process "
            f"{pseudo['one_process_per_second']:,.0f} a second; one by one "
            f"{pseudo['one_by_one_per_second']:,.0f} a second, {pseudo['ratio']:.1f} times slower\n"
            + show_machine(results)
        )


def measure_glove(lines: int) -> dict[str, Any]:
    """Read a generated file in GloVe's format in a fresh process.

    Returns:
        "first_s" and "cached_s", and "peak_mib", the peak resident memory of the process. Linux
        only.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vectors.txt"
        write_vectors(path, lines)
        first, cached, peak = in_fresh_process(_read_twice, path)
        mib = os.path.getsize(path) / 2**20
    return {
        "lines": lines,
        "mib": mib,
        "first_s": first,
        "lines_per_second": lines / first,
        "cached_s": cached,
        "peak_mib": peak,
    }


def write_vectors(path: Path, lines: int) -> None:
    """Write a file in GloVe's format with distinct words."""
    rng = np.random.default_rng(0)
    numbers = rng.normal(0, 0.35, (min(lines, DISTINCT_LINES), DIM))
    tails = [" ".join(f"{value:.5g}" for value in row) for row in numbers]
    with path.open("w", encoding="utf-8") as file:
        file.writelines(f"word{i} {tails[i % len(tails)]}\n" for i in range(lines))


def _read_twice(path: Path) -> tuple[float, float, float]:
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        GloveVectors(path)(["word0"])
        seconds.append(time.perf_counter() - start)
    return *seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_pseudo_gt(count: int) -> dict[str, Any]:
    """Nouns and pseudo ground truth of distinct expressions, in batches and one at a time.

    Both have the vectors of all words cached; the slow way is timed on the first `ONE_BY_ONE`.

    Raises:
        RuntimeError: the results of the two ways differ.
    """
    import spacy

    names = category_names()
    images = made_up_images(count, names)
    few = images[: -(-ONE_BY_ONE // PER_IMAGE)]
    num_few = sum(len(image["expressions"]) for image in few)
    vectors = MiniLMVectors()

    def fast(processes: int) -> Callable[[Sequence[dict[str, Any]]], dict[int, list[int]]]:
        matcher = CategoryMatcher(names, NounFinder(processes=processes).nouns, vectors)
        return lambda some: text_similarity(some, matcher, GAMMA)

    fast(1)(images[: 2 * len(few)])  # encodes the words
    nlp = spacy.load(EMBEDDED)
    seconds, contexts = _timed(fast(PROCESSES), images)
    alone, _ = _timed(fast(1), images)
    slow, expected = _timed(lambda some: one_by_one(some, names, nlp, vectors), few)
    if any(contexts[sent_id] != ids for sent_id, ids in expected.items()):
        raise RuntimeError("the fast way and the loop give different contextual objects")
    texts = [e["query"] for image in images for e in image["expressions"]]
    return {
        "expressions": count,
        "words": float(np.mean([len(text.split()) for text in texts])),
        "seconds": seconds,
        "per_second": count / seconds,
        "one_process_per_second": count / alone,
        "one_by_one_per_second": num_few / slow,
        "ratio": (slow / num_few) / (seconds / count),
    }


def _timed(function: Callable[[Any], Any], given: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function(given)
    return time.perf_counter() - start, result


def one_by_one(
    images: Sequence[dict[str, Any]],
    names: Sequence[str],
    nlp: Callable,
    vectors: WordVectors,
) -> dict[int, list[int]]:
    """A simple implementation of `text_similarity`.

    Args:
        images: see `text_similarity`, with boxes [x, y, width, height].
        names: names of the categories.
        nlp: a spaCy pipeline.
        vectors: word vectors; each word is looked up once.
    """
    known: dict[str, np.ndarray] = {}

    def vector(word: str) -> np.ndarray:
        if word not in known:
            known[word] = vectors([word])[0]
        return known[word]

    contexts = {}
    for image in images:
        box_of = {a["id"]: a["bbox"] for a in image["annotations"]}
        for expression in image["expressions"]:
            nouns = [t.text.lower() for t in nlp(expression["query"]) if t.pos_ in NOUN_POS]
            context = []
            for annotation in image["annotations"]:
                same = _iou(annotation["bbox"], box_of[expression["ann_id"]]) > SAME_IOU
                words = words_of(names[annotation["category_id"]])
                if not same and any(
                    float(np.dot(vector(noun), vector(word))) > GAMMA
                    for noun in nouns
                    for word in words
                ):
                    context.append(annotation["id"])
            contexts[expression["sent_id"]] = context
    return contexts


def _iou(a: Sequence[float], b: Sequence[float]) -> float:
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    return both / (a[2] * a[3] + b[2] * b[3] - both)


def made_up_images(count: int, names: Sequence[str]) -> list[dict[str, Any]]:
    """Dataset dicts of random boxes with distinct expressions, `PER_IMAGE` each."""
    rng = np.random.default_rng(0)
    queries = _made_up_expressions(count, names)
    images = []
    for number, start in enumerate(range(0, count, PER_IMAGE)):
        corners, sizes = rng.uniform(0, 400, (BOXES, 2)), rng.uniform(20, 200, (BOXES, 2))
        annotations = [
            {"id": i, "bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": category}
            for i, (box, category) in enumerate(
                zip(
                    np.concatenate([corners, sizes], axis=1).tolist(),
                    rng.integers(0, len(names), BOXES).tolist(),
                    strict=True,
                )
            )
        ]
        expressions = [
            {"sent_id": start + i, "query": query, "ann_id": i % BOXES}
            for i, query in enumerate(queries[start : start + PER_IMAGE])
        ]
        images.append({"image_id": number, "annotations": annotations, "expressions": expressions})
    return images


def _made_up_expressions(count: int, names: Sequence[str]) -> list[str]:
    chance = random.Random(0)
    texts: dict[str, None] = {}
    while len(texts) < count:
        words = [chance.choice(pool) for pool in (_WORDS, names, _WORDS, names, _PLACES)]
        # The short patterns are soon exhausted.
        for pattern in (_PATTERNS[len(texts) % len(_PATTERNS)], _PATTERNS[-1]):
            text = pattern.format(*words)
            if text not in texts:
                texts[text] = None
                break
    expressions = list(texts)
    chance.shuffle(expressions)
    return expressions
