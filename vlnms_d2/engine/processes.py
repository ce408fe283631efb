"""The same work on several processes, GPUs and machines, through Detectron2's `launch`.

Rank 0 decides what is to be done and puts the parts together; the ranks share the blocks that are
missing and leave shards in one folder, which all machines must see.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from detectron2.data.samplers import InferenceSampler
from detectron2.engine import launch
from detectron2.utils import comm
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from .parallel import GO_ON, watch_parent
from .resumable import OutputFolder
from .shards import Shards

T = TypeVar("T")

# A rank that is done waits for the others, which may have the slower machine or larger images.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Processes:
    """How many processes work, and where.

    Attributes:
        num_gpus: of each machine, a process each; 0 computes on the CPU.
        processes: of each machine, where there is no GPU.
        num_machines, machine_rank, dist_url: as Detectron2's tools take them.

    Raises:
        ValueError: a number that cannot be.
    """

    num_gpus: int = 0
    processes: int = 1
    num_machines: int = 1
    machine_rank: int = 0
    dist_url: str = "auto"

    def __post_init__(self):
        if self.num_gpus < 0 or self.processes < 1 or self.num_machines < 1:
            raise ValueError(
                f"num_gpus is {self.num_gpus}, processes {self.processes}, num_machines "
                f"{self.num_machines}; expected at least 0, 1 and 1"
            )
        if self.num_gpus and self.processes > 1:
            raise ValueError(
                f"num_gpus is {self.num_gpus} and processes {self.processes}: each GPU has one "
                "process; give one of the two"
            )
        if self.num_gpus > torch.cuda.device_count():
            raise ValueError(
                f"num_gpus is {self.num_gpus}, but torch sees {torch.cuda.device_count()} here"
            )
        if not 0 <= self.machine_rank < self.num_machines:
            raise ValueError(
                f"machine_rank is {self.machine_rank}, expected from 0 to "
                f"{self.num_machines - 1} (num_machines is {self.num_machines})"
            )
        if self.num_machines > 1 and self.dist_url == "auto":
            raise ValueError(
                "several machines need a dist_url that all of them reach, as "
                "tcp://<machine of rank 0>:<port>"
            )

    @property
    def device(self) -> str:
        """For `MODEL.DEVICE`."""
        return "cuda" if self.num_gpus else "cpu"

    def run(self, work: Callable[..., object], *args: Any) -> None:
        """Call a function in each process.

        Args:
            work: of a module; with one process it is called here.
            args: can be pickled.

        Raises:
            RuntimeError: one of several processes failed, which the message says, or was killed.
            Exception: what the function raised, where there is one process.
        """
        try:
            with nullcontext() if self.num_gpus else _hidden_gpus():
                launch(
                    _work_in_process,
                    self.num_gpus or self.processes,
                    self.num_machines,
                    self.machine_rank,
                    self.dist_url,
                    (work, args, self.device, os.getpid()),
                    _PATIENCE,
                )
        except ProcessRaisedException as error:
            # The last line of the traceback that is its message.
            raise RuntimeError(str(error).strip().splitlines()[-1]) from error
        except ProcessExitedException as error:
            raise RuntimeError(f"{error}. {GO_ON}") from error


def _work_in_process(
    work: Callable[..., object], args: tuple[Any, ...], device: str, starter: int
) -> None:
    if os.getpid() != starter:
        watch_parent()
    if device != "cpu":
        work(*args)
        return
    with one_thread():
        work(*args)


@contextmanager
def _hidden_gpus() -> Iterator[None]:
    """For the processes that are started meanwhile: where `launch` sees a GPU it has processes
    talk by way of it, also those that compute on the CPU."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        yield
    finally:
        del os.environ["CUDA_VISIBLE_DEVICES"]
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread: sums come out a little different with another number of them, and
    the result shall not depend on how many processes share a machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def from_main(value: T) -> T:
    """The value of rank 0, for all ranks; each has to call it."""
    # Waits with the patience of the process group; the exchange itself has less.
    comm.synchronize()
    return comm.all_gather(value)[0]


def own_missing(shards: Shards, suffix: str) -> list[int]:
    """This rank's share of the blocks that have no file of a kind yet; each rank has to call it."""
    missing = from_main(shards.missing(suffix) if comm.is_main_process() else [])
    return [missing[i] for i in InferenceSampler(len(missing))] if missing else []


@contextmanager
def begun(
    out: Path, identity: Callable[[], Mapping[str, Any]], overwrite: bool
) -> Iterator[OutputFolder | None]:
    """Yields the output folder of a run that all ranks take part in; None where it is finished.
    The ranks leave together, when rank 0 has put the output in its place.

    Args:
        out: the folder.
        identity: makes that of the run; called by rank 0, which holds the folder's lock.
        overwrite: see `OutputFolder.begin`, also for what is raised.
    """
    if not comm.is_main_process():
        yield None if from_main(None) else OutputFolder(out, {})
        comm.synchronize()
        return
    output = OutputFolder(out, identity())
    with output.begin(overwrite) as manifest:
        is_finished = from_main(manifest is not None)
        yield None if is_finished else output
    comm.synchronize()
