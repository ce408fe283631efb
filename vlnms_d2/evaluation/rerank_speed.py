"""How much time and memory `vlnms_d2.rerank` takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog

from ..language.matching import category_matcher
from ..rerank import rerank
from .memory import peak_rows, raise_of_peak
from .timing import describe_machine

CATEGORIES_OF = "coco_2017_val"  # 80 of them
BATCH = 128  # queries answered at once
IMAGE_SIZE = (480, 640)
_WORDS = ("small", "large", "red", "blue", "old", "wooden", "broken", "empty", "open", "standing")


def measure_rerank(num_candidates: int, num_texts: int, counts: Sequence[int]) -> dict[str, Any]:
    """Time reranking and the encoding of captions, and measure memory, on the CPU.

    Args:
        num_candidates: random boxes of the image, before NMS.
        num_texts: distinct captions to encode.
        counts: numbers of queries; each in a fresh process, `BATCH` at once.

    Returns:
        "queries_per_second" with the text encoded, NMS and the cut at 100 included;
        "captions_per_second" for distinct captions, loading not included; "rows" with the raise of
        the peak of resident memory in MiB per count; and what they were measured on. Linux only.
    """
    names = category_names()
    encode = category_matcher(names).best_cosines
    encode(["a first caption, for what is made only once"])
    captions = made_up_captions(num_texts, names)
    start = time.perf_counter()
    encode(captions)
    captions_per_second = num_texts / (time.perf_counter() - start)
    answer = _answering(num_candidates, len(names))
    answer(BATCH)
    start = time.perf_counter()
    answer(max(counts))
    queries_per_second = max(counts) / (time.perf_counter() - start)
    return {
        "candidates": num_candidates,
        "categories": len(names),
        "queries_per_second": round(queries_per_second, 1),
        "captions": num_texts,
        "captions_per_second": round(captions_per_second, 1),
        "rows": peak_rows(_peak_of_answering, (num_candidates, len(names)), counts),
        "machine": describe_machine(torch.device("cpu")),
    }


def category_names() -> list[str]:
    """COCO's."""
    return list(MetadataCatalog.get(CATEGORIES_OF).thing_classes)


def made_up_captions(count: int, names: Sequence[str]) -> list[str]:
    """Distinct captions of about ten words that name two things each."""
    rng = np.random.default_rng(0)
    captions = []
    for number in range(count):
        one, other = rng.choice(names, 2, replace=False)
        first, second, third = rng.choice(_WORDS, 3)
        captions.append(
            f"A {first} {one} next to a {second} {other} in the {third} street, number {number}."
        )
    return captions


def _answering(num_candidates: int, num_categories: int) -> Callable[[int], None]:
    """From a number of queries to nothing, after answering them."""
    rng = np.random.default_rng(0)
    height, width = IMAGE_SIZE
    corners = rng.uniform(0, [0.8 * width, 0.8 * height], (num_candidates, 2))
    sizes = rng.uniform(10, [0.2 * width, 0.2 * height], (num_candidates, 2))
    boxes = np.concatenate([corners, corners + sizes], axis=1)
    scores = rng.uniform(0.05, 1, num_candidates)
    classes = rng.integers(0, num_categories, num_candidates)
    names = [f"category {number}" for number in range(num_categories)]
    per_class = rng.random((BATCH, num_categories), dtype=np.float32)

    def answer(count: int) -> None:
        for start in range(0, count, BATCH):
            related = per_class[: min(BATCH, count - start)][:, classes]
            queries = [""] * len(related)
            rerank(boxes, scores, classes, names, queries, relatedness=related)

    return answer


def _peak_of_answering(num_candidates: int, num_categories: int, count: int) -> float:
    """In MiB, above what is resident before."""
    answer = _answering(num_candidates, num_categories)
    answer(1)  # for the buffers that libraries make once
    return raise_of_peak(lambda: answer(count))
