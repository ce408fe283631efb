"""What every benchmark is: options in, a dictionary of results out, and those as text."""

from __future__ import annotations

import platform
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import detectron2
import torch
from detectron2.config import CfgNode

from vlnms_d2.config import load_config


@dataclass(frozen=True)
class Options:
    """What the command line gives to every benchmark; each takes what it needs.

    Attributes:
        device: "cpu" or "cuda".
        config_file: None for the benchmark's own.
        opts: KEY VALUE pairs that change the config.
        queries: numbers of queries, each measured; None for the benchmark's own.
        candidates: boxes of the image.
        captions: distinct texts to encode.
        rounds: how often each side is timed.
        lines: of a file of word vectors.
    """

    device: str = "cpu"
    config_file: Path | None = None
    opts: Sequence[str] = ()
    queries: Sequence[int] | None = None
    candidates: int = 300
    captions: int = 5000
    rounds: int = 7
    lines: int = 20_000

    def load_config(self, default: Path | str, changes: Sequence[str] = ()) -> CfgNode:
        """The config of the command line, on the device and without weights.

        Args:
            default: the file where the command line names none.
            changes: KEY VALUE pairs of the benchmark's own; the command line's come after them.

        Raises:
            ValueError: it cannot be read, or has a wrong key or value; names the file.
        """
        path = self.config_file or default
        try:
            cfg = load_config(path, [*changes, *self.opts])
        # Detectron2's configs raise any of these at a wrong key or value.
        except (AssertionError, KeyError, OSError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
        cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "", self.device
        return cfg

    def timed(self, **found: Any) -> dict[str, Any]:
        """What was found in rounds on the image's candidates, and what it was measured on."""
        return found | {
            "candidates": self.candidates,
            "rounds": self.rounds,
            "machine": describe_machine(self.torch_device),
        }

    @property
    def torch_device(self) -> torch.device:
        """The device to put tensors on."""
        return torch.device(self.device)


class Benchmark(ABC):
    """Base class of the benchmarks.

    Attributes:
        name: what the command line calls it.
        help: a sentence on what is measured.
    """

    name: str
    help: str

    @abstractmethod
    def measure(self, options: Options) -> dict[str, Any]:
        """Measure; the results can be written as JSON and hold "machine".

        Raises:
            ValueError: options that do not fit, or that it cannot run with; says what to change.
        """

    @abstractmethod
    def show(self, results: dict[str, Any]) -> str:
        """What `measure` found, as text."""


def show_machine(results: dict[str, Any]) -> str:
    """A line on what the results were measured on."""
    return ", ".join(f"{key} {value}" for key, value in results["machine"].items())


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What a measurement was made on."""
    return {
        "device": device.type,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "detectron2": detectron2.__version__,
    }


def cpu_name() -> str:
    """The processor's name, as Linux knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
