"""Maps nouns to categories: "chef" to person, "SUV" to car, "hot dog" to hot dog.

Word vectors place "dog" close to "cat", and "hot dog" close to both; a table of synonyms does not.
`synonyms.json` covers the eighty categories of COCO; every category matches its own name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).parent / "synonyms.json"

_SEPARATORS = re.compile(r"[\W_]+")
_PARENTHESES = re.compile(r"\(.*?\)")
_IRREGULAR = {
    "brownies": "brownie", "buses": "bus", "busses": "bus", "calves": "calf", "canoes": "canoe",
    "children": "child", "cookies": "cookie", "feet": "foot", "geese": "goose", "knives": "knife",
    "leaves": "leaf", "loaves": "loaf", "mice": "mouse", "movies": "movie", "oxen": "ox",
    "people": "person", "shelves": "shelf", "shoes": "shoe", "skis": "ski", "taxis": "taxi",
    "teeth": "tooth", "toes": "toe", "wives": "wife", "wolves": "wolf",
}  # fmt: skip


class Mention(NamedTuple):
    """Consecutive words that name one thing."""

    start: int
    end: int  # exclusive
    classes: tuple[int, ...]  # indices of the categories that the words are a synonym of


class Synonyms:
    """Finds synonyms of the given categories, in the order of the detector's classes, in texts."""

    def __init__(self, category_names: Sequence[str]):
        table = _read_table()
        self._classes: dict[tuple[str, ...], set[int]] = {}
        for index, words in enumerate(words_of_names(category_names)):
            self._classes.setdefault(_singular(words), set()).add(index)
        names = set(self._classes)  # a mug is a cup, unless there is a category of mugs
        for index, name in enumerate(category_names):
            synonyms = table.get(" ".join(words_of(name)), ())
            for key in {_singular(words_of(synonym)) for synonym in synonyms} - names:
                self._classes.setdefault(key, set()).add(index)
        self._max_words = max(map(len, self._classes), default=0)

    def find(self, words: Sequence[str]) -> list[Mention]:
        """The synonyms among words, from left to right, the longest one at each position."""
        words, mentions, start = [word.lower() for word in words], [], 0
        while start < len(words):
            for length in range(min(self._max_words, len(words) - start), 0, -1):
                classes = self._classes.get(_singular(words[start : start + length]))
                if classes:
                    mentions.append(Mention(start, start + length, tuple(sorted(classes))))
                    start += length
                    break
            else:
                start += 1
        return mentions

    def knows(self, word: str) -> bool:
        """Whether the word names some category, of the given ones or of the table's."""
        return word in _table_words() or bool(self.classes_of(word))

    def classes_of(self, mention: str) -> tuple[int, ...]:
        """Indices of the categories that the whole mention is a synonym of; empty if unknown."""
        words = mention.split()
        return tuple(sorted(self._classes.get(_singular(words), ()))) if words else ()


def words_of(name: str) -> list[str]:
    """The lower-case words of a category name; "dining_table" has those of "dining table". Text in
    parentheses, as in "cup_(drink)", is dropped."""
    name = name.lower()
    without = _PARENTHESES.sub(" ", name)
    return _SEPARATORS.sub(" ", without).split() or _SEPARATORS.sub(" ", name).split()


def words_of_names(names: Sequence[str]) -> list[list[str]]:
    """The words of each category name; a ValueError names one that has none."""
    for name in names:
        if not isinstance(name, str) or not words_of(name):
            raise ValueError(f"the category name {name!r} has no words; give it a name")
    return [words_of(name) for name in names]


def _singular(words: Sequence[str]) -> tuple[str, ...]:
    """The words with the last one in the singular."""
    return (*words[:-1], singular(words[-1]))


@cache
def singular(word: str) -> str:
    """The singular of a lower-case noun, by rule; for other words an arbitrary fixed form."""
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
def _table_words() -> frozenset[str]:
    table = _read_table()
    return frozenset(w for names in (table, *table.values()) for n in names for w in n.split())


@cache
def _read_table() -> dict[str, list[str]]:
    return json.loads(TABLE.read_text(encoding="utf-8"))
