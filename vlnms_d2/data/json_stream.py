"""Reading long JSON lists entry by entry, in memory that does not grow with the file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from .entries import check_exists

CHUNK = 1 << 20
MAX_ENTRY = 1 << 26
"""Characters of one entry; where there is no end to it within these, the file is damaged."""

_SPACE = re.compile(r"[ \t\n\r]*")


def iter_json_list(path: Path, source: str) -> Iterator[dict[str, Any]]:
    """The objects of a file that is one JSON list of objects, one after the other.

    Args:
        path: in UTF-8.
        source: a sentence for the user on what the file is.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not such a list, or was cut short.
    """
    check_exists(path, source)
    with path.open(encoding="utf-8-sig") as file:
        reader = _Reader(path, file, source)
        try:
            yield from reader.entries()
        except UnicodeDecodeError as error:
            raise reader.error(str(error)) from error


class _Reader:
    def __init__(self, path: Path, file: TextIO, source: str):
        self.path = path
        self.file = file
        self.source = source
        self._decoder = json.JSONDecoder()
        self._text, self._at = "", 0

    def entries(self) -> Iterator[dict[str, Any]]:
        if self._peek() != "[":
            raise ValueError(f"{self.path}: expected a list. {self.source}")
        self._at += 1
        number = 0
        while not (number == 0 and self._peek() == "]"):
            yield self._object(number)
            number += 1
            following = self._peek()
            if following == "]":
                break
            if following != ",":
                raise self.error(f"after entry number {number - 1}")
            self._at += 1
        self._at += 1
        if self._peek():
            raise self.error("there is more after the end of the list")

    def error(self, what: str) -> ValueError:
        return ValueError(
            f"{self.path}: not valid JSON ({what}). The file may have been cut short: make it "
            f"again. {self.source}"
        )

    def _object(self, number: int) -> dict[str, Any]:
        start = self._peek()
        if start and start not in "{":
            raise ValueError(
                f"{self.path}: entry number {number} begins with {start!r}, expected an object. "
                f"{self.source}"
            )
        while True:
            try:
                entry, self._at = self._decoder.raw_decode(self._text, self._at)
                return entry
            except json.JSONDecodeError as error:
                # Most often it goes on in the next chunk.
                if len(self._text) - self._at > MAX_ENTRY or not self._more():
                    raise self.error(f"entry number {number}: {error.msg}") from error

    def _peek(self) -> str:
        """The next character that is no space; empty at the end of the file."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def _more(self) -> bool:
        rest = self._text[self._at :]
        # Twice as much each time, or one long entry would be read in quadratic time.
        chunk = self.file.read(max(CHUNK, len(rest)))
        self._text, self._at = rest + chunk, 0
        return bool(chunk)
