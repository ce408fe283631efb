"""Reading entries of annotation files with errors that say where, what was expected and what to
do."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_KINDS = {int: "an integer", str: "a string", list: "a list", dict: "a dictionary"}


def read_json(path: Path, source: str) -> dict[str, Any]:
    """The JSON object that a file holds.

    Args:
        path: the file.
        source: a sentence for the user on where to get the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not JSON, or no JSON object.
    """
    content = load_json(path, source)
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: expected a JSON object, found {type(content).__name__}. {source}"
        )
    return content


def load_json(path: Path, source: str) -> Any:
    """What a JSON file holds, of any kind.

    Args:
        path: the file.
        source: a sentence for the user on where to get the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not JSON.
    """
    check_exists(path, source)
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{path}: not valid JSON ({error}). The file may have been cut short: fetch it again. "
            f"{source}"
        ) from error


def check_exists(path: Path, source: str) -> None:
    """Raises FileNotFoundError, with the sentence on the source, if there is no such file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. Check the path. {source}")


def check_images(dataset_dicts: Sequence[dict[str, Any]], source: str) -> None:
    """Raises FileNotFoundError, with the sentence on the source, if image files are missing.

    Each folder is listed once, which is much faster than to look for its files one by one.
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
    """The value of a key of an entry.

    Args:
        entry: what should be a dict with the key.
        key: its name.
        kind: int, str, list or dict.
        where: file and entry, for the message.

    Raises:
        ValueError: the entry is no dict, lacks the key or holds another kind of value.
    """
    if not isinstance(entry, dict):
        raise ValueError(
            f"{where} is {type(entry).__name__}, expected a dictionary with '{key}'. Repair the "
            "entry or fetch the file again."
        )
    if key not in entry:
        raise ValueError(
            f"{where} has no '{key}', expected {_KINDS[kind]}. Repair the entry or fetch the file "
            "again."
        )
    value = entry[key]
    if not (is_integer(value) if kind is int else isinstance(value, kind)):
        raise ValueError(
            f"{where}: '{key}' is {value!r}, expected {_KINDS[kind]}. Repair the entry or fetch "
            "the file again."
        )
    return value


def is_integer(value: Any) -> bool:
    """Whether a value is an integer and not a truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Whether a value is a number other than infinity and NaN."""
    return is_integer(value) or (isinstance(value, float) and math.isfinite(value))
