"""Many texts on several processes."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from itertools import chain

import torch

LEAST = 2048
"""Texts; fewer are read sooner than processes are started."""
CHUNK = 1024

Read = Callable[[Iterable[str]], list[list[str]]]


class ManyTexts:
    """Calls a function of texts in several processes, where there are enough of them.

    Processes are forks of this one, as a data loader's are, so none has to load anything. Where the
    system has no forks, and in a data loader's own processes, the function is called here.

    Args:
        read: from texts to something of each; of one text it does not depend on the others.
        processes: that share the texts.

    Raises:
        ValueError: fewer than one process.
    """

    def __init__(self, read: Read, processes: int):
        if processes < 1:
            raise ValueError(f"the number of processes is {processes}, expected at least 1")
        self.read = read
        self.processes = processes

    def __call__(self, texts: Iterable[str]) -> list[list[str]]:
        """What `read` gives.

        Raises:
            RuntimeError: a process was killed.
        """
        texts = list(texts)
        if self.processes == 1 or len(texts) < LEAST or not _may_fork():
            return self.read(texts)
        chunks = [texts[start : start + CHUNK] for start in range(0, len(texts), CHUNK)]
        context = multiprocessing.get_context("fork")
        gc.freeze()  # else the forks' collectors go through, and copy, all that is here
        try:
            with ProcessPoolExecutor(self.processes, context, _begin, (self.read,)) as pool:
                return list(chain.from_iterable(pool.map(_read, chunks)))
        finally:
            gc.unfreeze()


def _may_fork() -> bool:
    forks = "fork" in multiprocessing.get_all_start_methods()
    return forks and not multiprocessing.current_process().daemon


_function: Read | None = None


def _begin(read: Read) -> None:
    global _function
    torch.set_num_threads(1)  # its threads are not in the fork
    _function = read


def _read(texts: list[str]) -> list[list[str]]:
    return _function(texts)
