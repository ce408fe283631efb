"""Time and memory of `vlnms_d2.rerank`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from tabulate import tabulate

from vlnms_d2.language.matching import category_matcher
from vlnms_d2.modeling.candidates import Candidates
from vlnms_d2.modeling.relatedness import Portable, PortablePhrases, box_locations
from vlnms_d2.rerank import rerank

from .base import Benchmark, Options, describe_machine, peak_increase, peak_rows, show_machine

CATEGORIES_OF = "coco_2017_val"  # 80 of them
QUERIES = (1000, 10_000, 50_000)
BATCH = 128  # queries per call
IMAGE_SIZE = (480, 640)
ROUNDS = 9  # of timing the cues of an image; the median counts
_WORDS = ("small", "large", "red", "blue", "old", "wooden", "broken", "empty", "open", "standing")


class Rerank(Benchmark):
    """Time of reranking and of encoding captions, and memory, on the CPU. Linux only."""

    def measure(self, options: Options) -> dict[str, Any]:
        """See `Benchmark.measure`.

        "queries_per_second" is the rate with encoded text, including NMS and the selection of the
        best 100; "captions_per_second" is for distinct captions, without loading the model; "rows"
        have the increase of peak resident memory in MiB, each in a fresh process. "portable" has
        the same rates for Portable, and the time of the boxes' cues of an image.
        """
        if options.device != "cpu":
            raise ValueError("rerank is measured on the CPU only; leave --device out")
        names, counts = category_names(), options.queries or QUERIES
        encode = category_matcher(names).best_cosines
        encode(["a first caption, as a warm-up"])
        captions = made_up_captions(options.captions, names)
        start = time.perf_counter()
        encode(captions)
        captions_per_second = len(captions) / (time.perf_counter() - start)
        args = (options.candidates, len(names))
        answer = _answering(*args)
        answer(BATCH)
        start = time.perf_counter()
        answer(max(counts))
        queries_per_second = max(counts) / (time.perf_counter() - start)
        return {
            "candidates": options.candidates,
            "categories": len(names),
            "queries_per_second": round(queries_per_second, 1),
            "captions": options.captions,
            "captions_per_second": round(captions_per_second, 1),
            "portable": _measure_portable(options.candidates, names, captions),
            "rows": peak_rows(_peak_of_answering, args, counts),
            "machine": describe_machine(options.torch_device),
        }

    def show(self, results: dict[str, Any]) -> str:
        """See `Benchmark.show`."""
        return (
            f"{results['candidates']} candidates, {results['categories']} categories:\n"
            f"{results['queries_per_second']:,.0f} queries a second, text encoded\n"
            f"{results['captions_per_second']:,.0f} distinct captions encoded a second "
            f"({results['captions']:,} of them)\n"
            "Portable: {cues_ms:.1f} ms an image for the boxes' cues, {queries_per_second:,.0f} "
            "queries a second, text encoded,\n{captions_per_second:,.0f} distinct captions encoded "
            "a second\n".format(**results["portable"])
            + tabulate(
                [[row["queries"], row["peak_mib"]] for row in results["rows"]],
                headers=["queries", "peak (MiB)"],
                tablefmt="pipe",
                floatfmt=("", ".1f"),
            )
            + f"\n{show_machine(results)}"
        )


def category_names() -> list[str]:
    """The names of COCO's categories."""
    return list(MetadataCatalog.get(CATEGORIES_OF).thing_classes)


def made_up_captions(count: int, names: Sequence[str]) -> list[str]:
    """Distinct captions of about ten words that mention two objects each."""
    rng = np.random.default_rng(0)
    captions = []
    for number in range(count):
        one, other = rng.choice(names, 2, replace=False)
        first, second, third = rng.choice(_WORDS, 3)
        captions.append(
            f"A {first} {one} next to a {second} {other} in the {third} street, number {number}."
        )
    return captions


def _measure_portable(
    num_candidates: int, names: Sequence[str], captions: Sequence[str]
) -> dict[str, float]:
    """Time of Portable's cues in ms, and rates of scoring and of encoding."""
    boxes, scores, classes = map(torch.from_numpy, _made_up_detections(num_candidates, len(names)))
    candidates = Candidates(boxes.float(), scores.float(), classes, classes)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, *IMAGE_SIZE), np.uint8))
    phrases = PortablePhrases(category_names=names)
    module = Portable(visual_dim=len(names), text_dim=phrases.output_dim)
    start = time.perf_counter()
    text = phrases(list(captions))
    captions_per_second = len(captions) / (time.perf_counter() - start)
    locations = box_locations(candidates.boxes, IMAGE_SIZE)
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        visual = module.describe(candidates, len(names), pixels)
        times.append(time.perf_counter() - start)
    start, answered = time.perf_counter(), 0
    for first in range(0, len(text), BATCH):
        module(visual, locations, text[first : first + BATCH])
        answered += len(text.mask[first : first + BATCH])
    return {
        "cues_ms": round(1000 * sorted(times)[ROUNDS // 2], 2),
        "queries_per_second": round(answered / (time.perf_counter() - start), 1),
        "captions_per_second": round(captions_per_second, 1),
    }


def _made_up_detections(num: int, num_categories: int) -> tuple[np.ndarray, ...]:
    """Boxes [N, 4], scores [N] and classes [N]."""
    rng = np.random.default_rng(0)
    height, width = IMAGE_SIZE
    corners = rng.uniform(0, [0.8 * width, 0.8 * height], (num, 2))
    sizes = rng.uniform(10, [0.2 * width, 0.2 * height], (num, 2))
    boxes = np.concatenate([corners, corners + sizes], axis=1)
    return boxes, rng.uniform(0.05, 1, num), rng.integers(0, num_categories, num)


def _answering(num_candidates: int, num_categories: int) -> Callable[[int], None]:
    """A function that answers a given number of queries."""
    boxes, scores, classes = _made_up_detections(num_candidates, num_categories)
    rng = np.random.default_rng(1)
    names = [f"category {number}" for number in range(num_categories)]
    per_class = rng.random((BATCH, num_categories), dtype=np.float32)

    def answer(count: int) -> None:
        for start in range(0, count, BATCH):
            related = per_class[: min(BATCH, count - start)][:, classes]
            queries = [""] * len(related)
            rerank(boxes, scores, classes, names, queries, relatedness=related)

    return answer


def _peak_of_answering(num_candidates: int, num_categories: int, count: int) -> float:
    """The increase of peak memory in MiB."""
    answer = _answering(num_candidates, num_categories)
    answer(1)  # warm-up, for buffers that libraries allocate once
    return peak_increase(lambda: answer(count))
