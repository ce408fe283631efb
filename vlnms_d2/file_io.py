"""Writing files whole or not at all, and how messages show what files hold."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import reprlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

_TEMPORARY = ".vlnms_d2.tmp"
_FULL = "the disk is full. Free some space, or choose another folder, and run again"


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Yields a temporary file beside `path`, open for bytes, that replaces `path` when the block
    ends.

    When the block raises, the temporary file is removed and `path` is left as it was. Temporary
    files that killed processes left in the folder are removed too.

    Raises:
        OSError: the file cannot be written; if the disk is full, with what to do.
    """
    path = Path(path)
    _sweep(path.parent.resolve())
    with explained_full_disk(path):
        file, temporary = _locked_temporary(path)
        with file:
            try:
                yield file
                # Temporary files are private to the user; the final one follows the umask.
                umask = os.umask(0)
                os.umask(umask)
                temporary.chmod(0o666 & ~umask)
                file.flush()
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)


@contextmanager
def explained_full_disk(path: Path) -> Iterator[None]:
    """Errors of a full disk in the block get this path, and what to do."""
    try:
        yield
    except Exception as error:
        # torch raises its own errors while the disk's are handled
        causes: list[BaseException] = [error]
        while causes[-1].__context__ is not None:
            causes.append(causes[-1].__context__)
        is_full = any(getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT) for e in causes)
        if not is_full or getattr(error, "strerror", "") == _FULL:
            raise
        raise OSError(errno.ENOSPC, _FULL, str(path)) from error


def _locked_temporary(path: Path) -> tuple[BinaryIO, Path]:
    """A new file beside `path`, locked until it is closed, so that `_sweep` leaves it alone."""
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_TEMPORARY)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.path.exists(name):  # not swept before it was locked
            return os.fdopen(handle, "wb"), Path(name)
        os.close(handle)


@cache
def _sweep(folder: Path) -> None:
    """Remove the temporary files in a folder that no process has open; once per process."""
    for path in folder.glob(f".*{_TEMPORARY}"):
        with suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Writes an object as JSON with sorted keys, so that equal objects give equal bytes."""
    with atomic_write(path) as file:
        file.write(json.dumps(obj, sort_keys=True, separators=(",", ":")).encode() + b"\n")


class _Shortened(reprlib.Repr):
    def __init__(self):
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 80, 80

    def repr_int(self, x: int, level: int) -> str:
        return (
            super().repr_int(x, level) if abs(x) < 1 << 999 else "an integer of 300 digits or more"
        )


def shown(value: Any) -> str:
    """A value for a message: its repr, shortened whatever its size and nesting."""
    text = _Shortened().repr(value)
    return text if len(text) <= 240 else f"{text[:240]} ..."
