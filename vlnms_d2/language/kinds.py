"""Which category a noun is a kind of: "chef" of person, "SUV" of car, "hot dog" of hot dog.

Word vectors put "dog" near "cat" and "hot dog" near both; a table of kinds does not. It has the
eighty categories of COCO; any category is a kind of itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).parent / "kinds.json"

_SEPARATORS = re.compile(r"[\W_]+")
_ASIDE = re.compile(r"\(.*?\)")
_IRREGULAR = {
    "brownies": "brownie",
    "buses": "bus",
    "busses": "bus",
    "calves": "calf",
    "canoes": "canoe",
    "children": "child",
    "cookies": "cookie",
    "feet": "foot",
    "geese": "goose",
    "knives": "knife",
    "leaves": "leaf",
    "loaves": "loaf",
    "mice": "mouse",
    "movies": "movie",
    "oxen": "ox",
    "people": "person",
    "shelves": "shelf",
    "shoes": "shoe",
    "skis": "ski",
    "taxis": "taxi",
    "teeth": "tooth",
    "toes": "toe",
    "wives": "wife",
    "wolves": "wolf",
}


class Mention(NamedTuple):
    """Words of a text that stand for one thing.

    Attributes:
        start, end: the words' positions, end exclusive.
        classes: indices of the categories that they are a kind of; empty where none is known.
    """

    start: int
    end: int
    classes: tuple[int, ...]


class Kinds:
    """Finds the kinds of given categories among words.

    Args:
        category_names: C names, in the order of the detector's classes.
    """

    def __init__(self, category_names: Sequence[str]):
        table = _read_table()
        self._classes: dict[tuple[str, ...], set[int]] = {}
        for index, name in enumerate(category_names):
            self._classes.setdefault(_singular(words_of(name)), set()).add(index)
        named = set(self._classes)  # a mug is a cup, unless there is a category of mugs
        for index, name in enumerate(category_names):
            kinds = table.get(" ".join(words_of(name)), ())
            for key in {_singular(words_of(kind)) for kind in kinds} - named:
                self._classes.setdefault(key, set()).add(index)
        self._longest = max(map(len, self._classes), default=0)

    def find(self, words: Sequence[str]) -> list[Mention]:
        """The kinds among lower-case words, the longest at each place, from left to right."""
        return list(self._scan([word.lower() for word in words]))

    def classes_of(self, mention: str) -> tuple[int, ...]:
        """The categories that a mention as a whole is a kind of; empty where none is known."""
        key = mention.split()
        return tuple(sorted(self._classes.get(_singular(key), ()))) if key else ()

    def _scan(self, words: list[str]) -> Iterator[Mention]:
        start = 0
        while start < len(words):
            for length in range(min(self._longest, len(words) - start), 0, -1):
                classes = self._classes.get(_singular(words[start : start + length]))
                if classes:
                    yield Mention(start, start + length, tuple(sorted(classes)))
                    start += length
                    break
            else:
                start += 1


def words_of(name: str) -> list[str]:
    """The lower-case words of a name; "dining_table" and "dining table" have the same, and of
    "cup_(drink)" what stands in parentheses is left out."""
    without = _ASIDE.sub(" ", name.lower())
    return _SEPARATORS.sub(" ", without).split() or _SEPARATORS.sub(" ", name.lower()).split()


def _singular(words: Sequence[str]) -> tuple[str, ...]:
    """The words with the last one in singular; both numbers of a noun give the same."""
    return (*words[:-1], singular(words[-1]))


@cache
def singular(word: str) -> str:
    """The singular of a lower-case noun by rule; of others anything, always the same."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith("men"):
        return word[:-3] + "man"
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "sses", "xes", "zzes", "oes")):
        return word[:-2]
    if word.endswith("s") and not word.endswith(("ss", "us", "is")) and len(word) > 2:
        return word[:-1]
    return word


@cache
def _read_table() -> dict[str, list[str]]:
    return json.loads(TABLE.read_text(encoding="utf-8"))
