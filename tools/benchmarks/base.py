"""What the benchmarks share: options, results, interleaved timing and peak memory."""

from __future__ import annotations

import platform
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

# torch and Detectron2 are imported on use: the command line reads the defaults of `Options`.
if TYPE_CHECKING:
    import torch
    from detectron2.config import CfgNode


@dataclass(frozen=True)
class Options:
    """The options of the command line; each benchmark uses those that it needs.

    Attributes:
        device: "cpu" or "cuda".
        config_file: config in place of the benchmark's default.
        opts: KEY VALUE pairs that change the config.
        queries: numbers of queries to measure, in place of the benchmark's default.
        candidates: number of boxes of the image.
        captions: number of distinct texts to encode.
        rounds: number of timings of each side.
        lines: number of lines of a file of word vectors.
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
        """Load the config, with the device of the command line and without weights.

        Args:
            default: the config file if the command line names none.
            changes: KEY VALUE pairs of the benchmark, applied before those of the command line.

        Raises:
            ValueError: it cannot be read, or has a wrong key or value; names the file.
        """
        from vlnms_d2.config import load_config

        path = self.config_file or default
        try:
            cfg = load_config(path, [*changes, *self.opts])
        # Detectron2's configs raise any of these at a wrong key or value.
        except (AssertionError, KeyError, OSError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
        cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "", self.device
        return cfg

    def timed(self, **results: Any) -> dict[str, Any]:
        """Results of timing, with the options and the machine."""
        return results | {
            "candidates": self.candidates,
            "rounds": self.rounds,
            "machine": describe_machine(self.torch_device),
        }

    @property
    def torch_device(self) -> torch.device:
        """The device of the tensors."""
        import torch

        return torch.device(self.device)


class Benchmark(ABC):
    """Base class of the benchmarks."""

    @abstractmethod
    def measure(self, options: Options) -> dict[str, Any]:
        """Run the benchmark; the results are serializable as JSON and include "machine".

        Raises:
            ValueError: the benchmark cannot run with these options.
        """

    @abstractmethod
    def show(self, results: dict[str, Any]) -> str:
        """The results of `measure` as text."""


def show_machine(results: dict[str, Any]) -> str:
    """The machine of the results, as one line."""
    return ", ".join(f"{key} {value}" for key, value in results["machine"].items())


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The machine and the library versions of a measurement."""
    import detectron2
    import torch

    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return {
        "device": device.type,
        **gpu,
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


def time_interleaved(
    sides: Mapping[Hashable, Callable[[], object]],
    rounds: int,
    device: torch.device,
    warm_up: int = 1,
) -> dict[Hashable, float]:
    """Time several sides in turn, so that other load on the machine affects all of them alike.

    Args:
        sides: the functions to time, by name.
        rounds: number of timed rounds, in each of which every side runs once.
        device: synchronized before the clock is read.
        warm_up: number of earlier rounds that are not timed.

    Returns:
        The median time of a run in seconds, by name.
    """
    times: dict[Hashable, list[float]] = {name: [] for name in sides}
    for number in range(warm_up + rounds):
        for name, run in sides.items():
            seconds = _time(run, device)
            if number >= warm_up:
                times[name].append(seconds)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def _time(run: Callable[[], object], device: torch.device) -> float:
    wait_for(device)
    start = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - start


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has finished its work."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def peak_rows(
    measure: Callable[..., float], args: tuple[Any, ...], counts: Sequence[int]
) -> list[dict[str, Any]]:
    """The increase of peak memory for each number of queries, each in a fresh process.

    Args:
        measure: a module's function from `args` and a count to the increase in MiB.
        args: picklable arguments.
        counts: numbers of queries.
    """
    rows = []
    for count in counts:
        increase = in_fresh_process(measure, *args, count)
        rows.append({"queries": count, "peak_mib": round(increase, 1)})
    return rows


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """The result of a module's function in a new process: one keeps memory that it has freed, which
    would hide the next peak."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    # Its server has imported these and computed nothing. Python 3.11's does not find tools/.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vlnms_d2.modeling", function.__module__])
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *args).result()


def peak_increase(action: Callable[[], object]) -> float:
    """The increase of this process's peak resident memory by an action, in MiB. Linux only."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _peak()
    action()
    return (_peak() - before) / 2**20


def _peak() -> int:
    """The peak resident memory since the last reset, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [kib] = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(kib) * 1024
