"""Reading pickles from strangers: data only, nothing that runs."""

from __future__ import annotations

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any


class RefusedPickle(ValueError):
    """A pickle file holds more than plain data, or is no complete pickle."""


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler without globals. Whatever a pickle can do, from making an array to running a
    command, it does by calling a global; lists, tuples, dicts, sets, strings, bytes and numbers
    need none."""

    def find_class(self, module: str, name: str) -> Any:
        raise _GlobalFound(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise _GlobalFound(f"persistent object {pid!r}")


class _GlobalFound(Exception):
    pass


def load_plain_pickle(path: str | Path) -> Any:
    """Reads a pickle of lists, tuples, dicts, sets, strings, bytes, numbers, booleans and None.

    Byte strings written by Python 2 become text: UTF-8 if the whole file is, else Latin-1.

    Args:
        path: a pickle of any protocol.

    Raises:
        FileNotFoundError: there is no such file.
        RefusedPickle: the file asks for a class, a function or senseless amounts of memory, is
            cut short or is no pickle.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected a pickle. Check the path.")
    data = path.read_bytes()
    if not data:
        raise RefusedPickle(f"{path}: the file is empty, expected a pickle. Fetch it again.")
    try:
        if _asks_for_memory(data):
            raise RefusedPickle(
                f"{path}: refused, as it asks for far more memory than its {len(data)} bytes can "
                "fill; expected plain data. Fetch the file from its original source."
            )
        return _load(data)
    except RefusedPickle:
        raise
    except _GlobalFound as found:
        raise RefusedPickle(
            f"{path}: refused, as it asks for '{found}'; expected plain data only (lists, dicts, "
            "strings, numbers). A pickle that asks for more can run programs: fetch the file from "
            "its original source, or save its content as plain data."
        ) from None
    except Exception as error:  # bytes that are no pickle make the unpickler raise anything
        raise RefusedPickle(
            f"{path}: not a complete pickle ({type(error).__name__}: {error}), after reading its "
            f"{len(data)} bytes. It may have been cut short: fetch the file again."
        ) from error


def _load(data: bytes) -> Any:
    try:
        return _PlainUnpickler(io.BytesIO(data), encoding="utf-8").load()
    except UnicodeDecodeError:
        return _PlainUnpickler(io.BytesIO(data), encoding="latin1").load()


# Size of each instruction's argument: bytes if positive, else one of the module's markers.
_ARGUMENT = {ord(op.code): op.arg.n if op.arg else 0 for op in pickletools.opcodes}
_COUNTED = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
_PUT, _LONG_BINPUT = b"pr"
_STOPS = b".ci"  # the end, or a global, at which loading ends


def _asks_for_memory(data: bytes) -> bool:
    """Whether loading would set aside memory out of proportion, before it reads what fills it.

    The unpickler keeps a table of the objects to refer back to, as long as the largest index that
    the file gives. Real indices count the objects, each of which takes a byte at least.
    """
    at, end = 0, len(data)
    while at < end:
        code = data[at]
        at += 1
        size = _ARGUMENT.get(code)
        if size is None or code in _STOPS:
            return False  # the unpickler stops here, too
        if size >= 0:
            if code == _LONG_BINPUT and int.from_bytes(data[at : at + 4], "little") > end:
                return True
            at += size
        elif size == pickletools.UP_TO_NEWLINE:
            line_end = data.find(b"\n", at)
            if line_end < 0:
                return False
            if code == _PUT and (line_end - at > 18 or _number(data[at:line_end]) > end):
                return True
            at = line_end + 1
        else:
            count = _COUNTED[size]
            length = int.from_bytes(data[at : at + count], "little")
            at += count + length
    return False


def _number(digits: bytes) -> int:
    try:
        return int(digits)
    except ValueError:
        return 0  # the unpickler reports it
