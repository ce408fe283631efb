"""Independent tasks on several processes."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any

import torch

GO_ON = "Run the same command again, with fewer processes: it goes on where this one stopped."

_AHEAD = 3  # tasks per process that wait: their input is held twice


def run_tasks(
    make_worker: Callable[[Any], Any],
    settings: Any,
    method: str,
    tasks: Iterable[Any],
    processes: int,
    done: Callable[[Any], object],
) -> None:
    """Call a method of a worker with each task.

    With one process that is this one; otherwise each process makes a worker of its own.

    Args:
        make_worker: a module's function or class; called with `settings`, which can be pickled.
        settings: see there.
        method: name of the method; what it returns is not looked at.
        tasks: can be pickled; taken as they are needed.
        processes: how many, at least 1.
        done: called here with each task that is done, in any order.

    Raises:
        RuntimeError: a process was killed from outside.
        Exception: what the method raised; what is not yet begun is then left.
    """
    if processes == 1:
        call = getattr(make_worker(settings), method)
        for task in tasks:
            call(task)
            done(task)
        return
    # Not a fork of this process, whose threads would not be in it; and not a fresh interpreter
    # for each, which takes seconds to import everything.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, make_worker.__module__])
    pool = ProcessPoolExecutor(processes, context, _begin, (make_worker, settings, method))
    try:
        tasks = iter(tasks)
        waiting = {}
        while True:
            for task in islice(tasks, processes * _AHEAD - len(waiting)):
                waiting[pool.submit(_work, task)] = task
            if not waiting:
                return
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                future.result()
                done(waiting.pop(future))
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"a process ended before its work was done, perhaps for want of memory. {GO_ON}"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_call: Callable[[Any], Any] | None = None


def _begin(make_worker: Callable[[Any], Any], settings: Any, method: str) -> None:
    global _call
    torch.set_num_threads(1)
    watch_parent()
    _call = getattr(make_worker(settings), method)


def watch_parent() -> None:
    """Let this process, which another one of Python's started, end when that one does."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A killed parent leaves its processes at work, or waiting for tasks for ever.
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(task: Any) -> None:
    _call(task)
