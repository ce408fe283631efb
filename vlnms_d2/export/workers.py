"""Work that the processes of a machine share, each with its own GPU or on the CPU, and machines
that work on the same job."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

# A machine that is done waits for the others, which may be slower or have larger images.
_TIMEOUT = timedelta(days=7)
_AHEAD = 3  # tasks submitted per process, which bounds the memory that waiting tasks take


@dataclass(frozen=True)
class Processes:
    """How many processes share a job, and where they run.

    Attributes:
        num_gpus: per machine, with one process each; 0 computes on the CPU.
        processes: per machine, if `num_gpus` is 0; each computes with one thread.
        num_machines, machine_rank, dist_url: as in Detectron2's tools.

    Raises:
        ValueError: an impossible number.
    """

    num_gpus: int = 0
    processes: int = 1
    num_machines: int = 1
    machine_rank: int = 0
    dist_url: str = "auto"

    def __post_init__(self):
        for name, least in (("num_gpus", 0), ("processes", 1), ("num_machines", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least}")
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
                "several machines need a dist_url that all of them reach, such as "
                "tcp://<machine of rank 0>:<port>"
            )

    @property
    def device(self) -> str:
        """For `MODEL.DEVICE`."""
        return "cuda" if self.num_gpus else "cpu"

    @property
    def count(self) -> int:
        """Processes on this machine."""
        return self.num_gpus or self.processes

    @property
    def is_main(self) -> bool:
        """Whether this is the machine that prepares the job and publishes its output."""
        return self.machine_rank == 0

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Connect the machines while the block runs; every machine has to enter it."""
        if self.num_machines == 1:
            yield
            return
        dist.init_process_group(
            "gloo",
            init_method=self.dist_url,
            timeout=_TIMEOUT,
            world_size=self.num_machines,
            rank=self.machine_rank,
        )
        try:
            yield
        finally:
            dist.destroy_process_group()

    def from_main(self, value: T = None) -> T:
        """The value that the main machine passes; every machine has to call it."""
        values = [value]
        if self.num_machines > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def wait(self) -> None:
        """Wait until every machine gets here."""
        if self.num_machines > 1:
            dist.barrier()


class Workers:
    """A worker in each process of this machine, to be used in a `with` statement.

    With a single process that is this one. Otherwise the processes, and the workers in them, start
    with the first tasks.

    Args:
        processes: how many, and on which device.
        make_worker: class or function of a module, called in each process.
        arguments: for it; can be pickled.
    """

    def __init__(self, processes: Processes, make_worker: Callable[..., Any], *arguments: Any):
        self._make_worker, self._arguments = make_worker, arguments
        self._device, self._count = processes.device, processes.count
        self._worker = None
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(
        self, method: str, tasks: Iterable[Any], done: Callable[[Any], object] = lambda task: None
    ) -> None:
        """Call a method of a worker with each task.

        Args:
            method: its name; what it returns is ignored.
            tasks: can be pickled; only a few per process are taken in advance.
            done: called in this process with each finished task, in any order.

        Raises:
            RuntimeError: a process was killed.
            Exception: what a worker raised; tasks that have not started are dropped.
        """
        if self._count > 1:
            self._run_in_pool(method, iter(tasks), done)
            return
        with one_thread() if self._device == "cpu" else nullcontext():
            for task in tasks:
                if self._worker is None:
                    self._worker = self._make_worker(*self._arguments)
                getattr(self._worker, method)(task)
                done(task)

    def _run_in_pool(
        self, method: str, tasks: Iterator[Any], done: Callable[[Any], object]
    ) -> None:
        if self._pool is None:
            self._pool = self._start()
        running = {}
        try:
            while True:
                for task in islice(tasks, self._count * _AHEAD - len(running)):
                    running[self._pool.submit(_call, method, task)] = task
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    future.result()
                    done(running.pop(future))
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a process ended before its work was done, perhaps because memory ran out. Run the "
                "same command again, with fewer processes: it resumes where this one stopped."
            ) from error

    def _start(self) -> ProcessPoolExecutor:
        # Not "fork", which copies this process without its threads; nor "spawn", which spends
        # seconds per process on importing everything.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, self._make_worker.__module__])
        ranks = context.SimpleQueue()
        for rank in range(self._count):
            ranks.put(rank)
        arguments = (self._device, ranks, self._make_worker, *self._arguments)
        return ProcessPoolExecutor(self._count, context, _begin, arguments)


_arguments: tuple[Any, ...] = ()


def _begin(device: str, ranks: Any, *arguments: Any) -> None:
    """Start a process of a pool."""
    global _arguments
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _arguments = (device, ranks.get(), *arguments)


@cache
def _worker() -> Any:
    # Not made by `_begin`, whose errors the pool does not pass on.
    device, rank, make_worker, *arguments = _arguments
    if device == "cpu":
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(rank)
    return make_worker(*arguments)


def _end_with_parent() -> None:
    # A killed parent would leave this process waiting for tasks forever.
    multiprocessing.parent_process().join()
    os._exit(1)


def _call(method: str, task: Any) -> None:
    getattr(_worker(), method)(task)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread: the number of threads changes how sums are rounded, and the output
    must not depend on how many processes share a machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
