"""Reads JSON files and their entries; errors tell the place, what was expected and what to do."""

from __future__ import annotations

import codecs
import json
import math
import os
import re
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ..file_io import shown

_SURROGATE = re.compile("[\ud800-\udfff]")  # alone it is no character
_TYPES = {int: "an integer", str: "a string", list: "a list", dict: "a dictionary"}


def read_json(path: Path, source: str) -> dict[str, Any]:
    """Reads a file that holds a JSON object; `source` tells the user where to get the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not JSON, or not a JSON object.
    """
    check_exists(path, source)
    try:
        content = json.loads(path.read_bytes())
    except (RecursionError, ValueError) as error:
        raise ValueError(
            f"{path}: not valid JSON ({error}). The file may have been cut short: fetch it again. "
            f"{source}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: expected a JSON object, found {type(content).__name__}. {source}"
        )
    return content


_DEEPEST = 5000  # brackets open at once; those within texts count too


def iter_json_list(path: Path, source: str) -> Iterator[dict[str, Any]]:
    """Reads a file that holds a JSON list of objects, one object at a time, in memory that does not
    grow with the file. The file is in UTF-8; `source` tells the user what it is.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not such a list, or was cut short.
    """
    import ijson

    check_exists(path, source)
    with path.open("rb") as file:
        if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            file.seek(0)
        while (start := file.read(1)).isspace():
            pass
        if start != b"[":
            raise ValueError(f"{path}: expected a list. {source}")
        file.seek(-1, os.SEEK_CUR)
        number = 0
        try:
            for entry in ijson.items(_Shallow(file, path), "item", use_float=True):
                if not isinstance(entry, dict):
                    raise ValueError(
                        f"{path}: entry number {number} is {shown(entry)}, expected an object. "
                        f"{source}"
                    )
                yield entry
                number += 1
        except ijson.JSONError as error:
            reason = error.args[0]
            reason = reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)
            reason = reason.partition("\n")[0]  # without the drawing below it
            raise ValueError(
                f"{path}: not valid JSON after {number} entries ({reason}). The file may "
                f"have been cut short: make it again. {source}"
            ) from error


class _Shallow:
    """A JSON file. Reading raises ValueError where it nests so deeply that ijson would hang."""

    def __init__(self, file: BinaryIO, path: Path):
        self._file, self._path, self._depth = file, path, 0

    def read(self, size: int = -1) -> bytes:
        content = self._file.read(size)
        self._depth += sum(map(content.count, (b"[", b"{"))) - sum(map(content.count, (b"]", b"}")))
        if self._depth > _DEEPEST:
            raise ValueError(f"{self._path}: nested too deeply to be read")
        return content


def check_exists(path: Path, source: str) -> None:
    """Raises FileNotFoundError, with the sentence on the source, if there is no such file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. Check the path. {source}")


def check_images(dataset_dicts: Sequence[dict[str, Any]], source: str) -> None:
    """Raises FileNotFoundError, with the sentence on the source, if image files are missing.

    Each folder is listed once, which is much faster than checking its files one by one.
    """
    names: dict[str, set[str]] = {}
    missing = []
    for one in dataset_dicts:
        folder, name = os.path.split(one["file_name"])
        if folder not in names:
            names[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in names[folder]:
            missing.append(one["file_name"])
    if missing:
        raise FileNotFoundError(
            f"{missing[0]}: no such image, and {len(missing)} of the {len(dataset_dicts)} images "
            f"of the data set are missing. Check the path. {source}".rstrip()
        )


def require(entry: Any, key: str, kind: type, where: str) -> Any:
    """The value of a key of an entry, of type `kind` (int, str, list or dict).

    `where` names file and entry in the message.

    Raises:
        ValueError: the entry is not a dict, lacks the key or has a value of another type.
    """
    if not isinstance(entry, dict):
        problem = f"{where} is {type(entry).__name__}, expected a dictionary with '{key}'"
    elif key not in entry:
        problem = f"{where} has no '{key}', expected {_TYPES[kind]}"
    elif not (is_integer(entry[key]) if kind is int else isinstance(entry[key], kind)) or (
        kind is str and _SURROGATE.search(entry[key])
    ):
        problem = f"{where}: '{key}' is {shown(entry[key])}, expected {_TYPES[kind]}"
    else:
        return entry[key]
    raise ValueError(f"{problem}. Repair the entry or fetch the file again.")


def check_new(value: Any, seen: Container[Any], key: str, where: str) -> None:
    """Raises ValueError if an id is among those seen; `key` and `where` are for the message."""
    if value in seen:
        raise ValueError(
            f"{where}: {key} {shown(value)} is used twice, expected distinct ids. Number the "
            "entries anew or fetch the file again."
        )


CATEGORIES_SOURCE = (
    "It needs 'categories' with 'id' and 'name', as COCO's annotations (instances_val2017.json) "
    "have them."
)


def category_names(content: dict[str, Any], path: Path) -> dict[int, str]:
    """Category id -> name, in ascending order of ids, of the content of a file in COCO's format.

    Raises:
        ValueError: there is no category, or an entry is damaged or repeats an id.
    """
    names: dict[int, str] = {}
    for number, entry in enumerate(require(content, "categories", list, str(path))):
        where = f"{path}: category number {number}"
        category_id = require(entry, "id", int, where)
        check_new(category_id, names, "'id'", where)
        names[category_id] = require(entry, "name", str, where)
        if not names[category_id].strip():
            raise ValueError(
                f"{where}: 'name' is blank, expected the category's name. {CATEGORIES_SOURCE}"
            )
    if not names:
        raise ValueError(f"{path}: 'categories' is empty. {CATEGORIES_SOURCE}")
    return dict(sorted(names.items()))


def single_spaces(text: str) -> str:
    """The text without white space at its ends, and with single spaces inside."""
    return " ".join(text.split())


def is_integer(value: Any) -> bool:
    """Whether a value is an integer of 64 bits and not a boolean."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def is_finite(value: Any) -> bool:
    """Whether a value is a number other than infinity and NaN."""
    return is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def is_box(value: Any) -> bool:
    """Whether a value is a list of four finite numbers."""
    return isinstance(value, list) and len(value) == 4 and all(map(is_finite, value))
