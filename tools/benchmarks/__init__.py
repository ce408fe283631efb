"""Benchmarks, one file each; `tools/benchmark.py` runs them."""

from .base import Benchmark, Options
from .grounding_dino import GroundingDino
from .masks import Masks
from .memory import Memory
from .nms import Nms
from .overhead import Overhead, Trans
from .pairs import Pairs
from .rerank import Rerank
from .scoring import Scoring
from .text import Text
from .train import Train

# By name, in the order in which "all" runs them.
BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Overhead(),
        Trans(),
        Scoring(),
        Masks(),
        Nms(),
        GroundingDino(),
        Train(),
        Memory(),
        Pairs(),
        Rerank(),
        Text(),
    )
}

__all__ = ["BENCHMARKS", "Benchmark", "Options"]
