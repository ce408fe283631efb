"""Writing files whole or not at all, and how messages show what files hold."""

from __future__ import annotations

import json
import os
import reprlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Yields a temporary file beside `path`, open for bytes, that replaces `path` when the block
    ends.

    When the block raises, the temporary file is removed and `path` is left as it was.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        # Temporary files are private to the user; the final one follows the umask, as others do.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
