"""Writing files whole or not at all and replacing only files of ours; how messages show values."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import reprlib
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

_TEMPORARY = ".vlnms_d2.tmp"
_WRITTEN = ".vlnms_d2.written"  # in a folder: names and digests of the files that tools wrote
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
                if path.name in _claimed(path.parent):
                    _record(path.parent, [(path.name, file_sha256(temporary))])
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


def refuse_foreign(*paths: Path, inputs: Iterable[Path] = ()) -> None:
    """Check that output at these paths replaces neither an input nor what tools did not write.

    Raises:
        ValueError: a file is there that is not recorded by `claim`, or not as it was written.
    """
    read = {path.resolve() for path in inputs}
    for path in paths:
        place = path.absolute()
        folder = next(each for each in place.parents if each.exists())
        if not folder.is_dir():
            raise ValueError(f"{folder}: is a file, expected the folder of {path.name}")
        digests = _claimed(place.parent).get(place.name)
        is_ours = digests is not None and not place.is_symlink()
        if is_ours and digests and place.is_file():
            is_ours = file_sha256(place) in digests
        if (os.path.lexists(place) and not is_ours) or place.resolve() in read:
            raise ValueError(
                f"{path}: this tool did not write it, or it is an input, and it would be replaced. "
                "Move it away, or name another place for the output."
            )


def claim(*paths: Path) -> None:
    """Record that tools write these files, before they do; creates their folders."""
    for folder in {path.absolute().parent: None for path in paths}:
        folder.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in paths if path.absolute().parent == folder}
        _record(folder, [(name, "") for name in sorted(names - _claimed(folder).keys())])


def _record(folder: Path, written: list[tuple[str, str]]) -> None:
    with (folder / _WRITTEN).open("a", encoding="utf-8") as file:
        file.write("".join(f"{json.dumps(entry)}\n" for entry in written))


def _claimed(folder: Path) -> dict[str, set[str]]:
    """The digests of what tools wrote under each name; none where `atomic_write` was not used."""
    claimed: dict[str, set[str]] = {}
    try:
        for line in (folder / _WRITTEN).read_text("utf-8").splitlines():
            name, digest = json.loads(line)
            claimed.setdefault(name, set()).update([digest] if digest else [])
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / _WRITTEN}: damaged ({error}); remove it") from error
    return claimed


def file_sha256(path: Path) -> str:
    """Of the content of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


class _Shortened(reprlib.Repr):
    def __init__(self):
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 200, 80  # paths are told whole

    def repr_int(self, x: int, level: int) -> str:
        return (
            super().repr_int(x, level) if abs(x) < 1 << 999 else "an integer of 300 digits or more"
        )


def shown(value: Any) -> str:
    """A value for a message: its repr, shortened whatever its size and nesting."""
    text = _Shortened().repr(value)
    return text if len(text) <= 240 else f"{text[:240]} ..."
