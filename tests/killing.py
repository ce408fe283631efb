"""Ends processes at a place in their work, so that the machine's speed and load do not matter."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path


def exit_code(target: Callable[..., object], *arguments: object) -> int | None:
    """Call a module's function in another process and give the code with which that ends. It has
    imported what `conftest.server_of_processes` names, and that module."""
    process = multiprocessing.get_context("forkserver").Process(target=target, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def kill_at_move(path: Path, number: int) -> None:
    """Kill this process just before its `number`-th move of a file to `path`, or into it where it
    is a folder. Finished files are moved to their places (`vlnms_d2.file_io.atomic_write`)."""
    moves = itertools.count(1)

    def audit(event: str, arguments: tuple) -> None:
        # Python reports each rename before it happens, whichever function asks for it.
        if event == "os.rename":
            target = Path(os.fspath(arguments[1]))
            if path in (target, target.parent) and next(moves) == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
