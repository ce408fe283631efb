"""Benchmarks of the costs of queries, run by `tools/benchmark.py`."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

from .base import Benchmark, Options


@dataclass(frozen=True)
class Entry:
    """A benchmark that is imported on use, so that the command line can list it quickly.

    Attributes:
        target: "module:class" of the `Benchmark`.
        help: a sentence on what is measured.
    """

    target: str
    help: str

    def load(self) -> Benchmark:
        """Import the benchmark."""
        module, _, name = self.target.partition(":")
        return getattr(import_module(f".{module}", __name__), name)()


# By name, in the order in which "all" runs them.
BENCHMARKS: dict[str, Entry] = {
    "overhead": Entry(
        "overhead:Overhead",
        "time of the detector with FC and queries over that of stock Detectron2 on the same "
        "weights, with VISUAL_ENCODER finetune and shared; masks off on both sides",
    ),
    "trans": Entry("overhead:Trans", "the same with each fusion of Trans, with box refinement"),
    "scoring": Entry(
        "scoring:Scoring", "time of each part of a forward pass with queries; masks off"
    ),
    "masks": Entry(
        "overhead:Masks",
        "time of the detector with queries and masks over that of stock Detectron2 with masks, and "
        "on the CPU the increase of peak resident memory in a forward pass",
    ),
    "nms": Entry(
        "nms:Nms",
        "multi_query_nms of --candidates boxes over a loop of torchvision's batched_nms, with "
        "scattered and clustered boxes, shared by the queries and different for each; no config",
    ),
    "grounding_dino": Entry(
        "grounding_dino:GroundingDino",
        "100 queries (or --queries) about one image by FC, detector included, over as many forward "
        "passes of Grounding DINO-T (transformers, random weights) on the same image",
    ),
    "train": Entry(
        "train:Train",
        "expressions per second in training (FC, frozen detector) if the expressions of an image "
        "share a forward pass, over one pass for each; 7 of them, or --queries",
    ),
    "memory": Entry(
        "memory:Memory",
        "increase of peak resident memory for answering queries about the candidates of one image "
        "(encoding, scoring, box refinement, NMS), compared with MODEL.VLNMS.CHUNK_MEMORY_MB",
    ),
    "pairs": Entry(
        "pairs:Pairs",
        "(image, caption) pairs per second of two processes once the candidates of the images are "
        "stored, projected to 1,000 images x 5,000 captions, and the disk space that they need",
    ),
    "pair_scoring": Entry(
        "pair_scoring:PairScoring",
        "comparing stored (image, caption) pairs by stacked cross-attention as large as SCAN's: "
        "pairs per second of one process, projected to 1,000 images x 5,000 captions, and memory; "
        "no config",
    ),
    "rerank": Entry(
        "rerank:Rerank",
        "vlnms_d2.rerank: queries per second with encoded text, distinct captions encoded per "
        "second, and the increase of memory for answering many queries of an image; no config",
    ),
    "text": Entry(
        "text:Text",
        "reading --lines word vectors, the first time and from the cache; nouns and pseudo ground "
        "truth of --captions distinct expressions, compared with a loop over sentences, boxes and "
        "words; no config",
    ),
}

__all__ = ["BENCHMARKS", "Benchmark", "Entry", "Options"]
