"""Maps nouns to categories: "chef" to person, "SUV" to car, "hot dog" to hot dog.

Word vectors place "dog" close to "cat", and "hot dog" close to both; a table of synonyms does not.
`synonyms.json`, made from WordNet by tools/make_synonyms.py, has the categories of COCO and LVIS;
any other category matches its own name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from ..file_io import shown

TABLE = Path(__file__).parent / "synonyms.json"

_SEPARATORS = re.compile(r"[\W_]+")
_PARENTHESES = re.compile(r"\(.*?\)")
_IRREGULAR = {
    "brownies": "brownie", "buses": "bus", "busses": "bus", "calves": "calf", "canoes": "canoe",
    "children": "child", "cookies": "cookie", "feet": "foot", "geese": "goose", "knives": "knife",
    "leaves": "leaf", "loaves": "loaf", "mice": "mouse", "movies": "movie", "oxen": "ox",
    "people": "person", "shelves": "shelf", "shoes": "shoe", "skis": "ski", "taxis": "taxi",
    "teeth": "tooth", "toes": "toe", "wives": "wife", "wolves": "wolf",
    "glasses": "glasses",  # spectacles
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
        classes_of: dict[int, set[int]] = {}  # by the table's index of the category
        homonyms, specific = set(), set()
        for index, (name, name_words) in enumerate(
            zip(category_names, words_of_names(category_names), strict=True)
        ):
            key = _singular(name_words)
            self._classes.setdefault(key, set()).add(index)
            if "(" in name:
                homonyms.add(key)
            for words in (_SEPARATORS.sub(" ", name.lower()).strip(), " ".join(name_words)):
                if words in table.index_of:
                    classes_of.setdefault(table.index_of[words], set()).add(index)
                    break
        # A mug is a cup, unless there is a category of mugs.
        self._names = names = set(self._classes)
        phrases = []
        for above, below, keys in table.meanings:
            kinds = set().union(*(classes_of.get(category, ()) for category in below))
            classes = next((classes_of[c] for c in above if c in classes_of), kinds)
            for key in keys:
                added = kinds if key in names and key not in homonyms else classes
                if added:
                    self._classes[key] = self._classes.get(key, set()) | added
                    if added != kinds:
                        specific.add(key)
                elif len(key) > 1:
                    phrases.append(key)
        self._general = self._classes.keys() - specific - names
        for key in [key for key in self._classes if len(key) == 2]:  # "schoolbus"
            self._classes.setdefault((singular("".join(key)),), self._classes[key])
        for key in phrases:  # "hot dog" is no dog, also without a category of hot dogs
            if key[-1:] in self._classes:
                self._classes.setdefault(key, set())
        self._max_words = max(map(len, self._classes), default=0)

    def find(self, words: Sequence[str]) -> list[Mention]:
        """The synonyms among words, from left to right, the longest one at each position; and,
        without classes, phrases that name something else than their last word does."""
        words, mentions, start = [word.lower() for word in words], [], 0
        while start < len(words):
            for length in range(min(self._max_words, len(words) - start), 0, -1):
                classes = self._classes.get(_singular(words[start : start + length]))
                if classes is not None:
                    mentions.append(Mention(start, start + length, tuple(sorted(classes))))
                    start += length
                    break
            else:
                start += 1
        return mentions

    def is_name(self, word: str) -> bool:
        """Whether the word is the name of a category."""
        return _singular([word]) in self._names

    def is_never(self, word: str, pos: str) -> bool:
        """Whether the word, a synonym of some category, cannot be that part of speech."""
        marks = _read_table().marks.get(_singular([word]), "")
        mark = {"VERB": "*", "ADJ": "+"}.get(pos)
        return mark not in marks if mark else not marks

    def is_collective(self, word: str) -> bool:
        """Whether the word means a group of things, as "herd" does."""
        return singular(word) in _read_table().collective

    def is_general(self, mention: str) -> bool:
        """Whether the categories of a mention are kinds of it, as of "animal"."""
        return _singular(mention.split()) in self._general

    def knows(self, word: str) -> bool:
        """Whether the word is part of a synonym of some category, of these or of the table's."""
        return singular(word) in _table_words() or bool(self.classes_of(word))

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
            raise ValueError(f"the category name {shown(name)} has no words; give it a name")
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


class _Table(NamedTuple):
    """`synonyms.json`, as projects/Category/category_study/wordnet.py describes it."""

    index_of: dict[str, int]  # of the categories, by name
    # Of words with the same meaning: the categories of which it is a kind, the nearest first; those
    # that are kinds of it; and the words.
    meanings: list[tuple[list[int], list[int], list[tuple[str, ...]]]]
    marks: dict[tuple[str, ...], str]  # of words that are verbs ("*") or adjectives ("+") too
    collective: set[str]  # words that mean a group, as "herd" does


@cache
def _read_table() -> _Table:
    content = json.loads(TABLE.read_text(encoding="utf-8"))
    names = enumerate(content["names"])
    index_of = {name: index for index, of_index in names for name in of_index.split("|")}
    meanings, marks = [], {}
    for key, joined in content["words"].items():
        above, _, below = key.partition("<")
        keys: list[tuple[str, ...]] = []
        for word in joined.split("|"):
            plain = word.rstrip("*+")
            keys.append(_singular(plain.split()))
            marks[keys[-1]] = word[len(plain) :]
        meanings.append((_integers(above, ">"), _integers(below, ","), keys))
    return _Table(index_of, meanings, marks, set(content["collective"].split("|")))


def _integers(text: str, separator: str) -> list[int]:
    return [int(number) for number in text.split(separator) if number]


@cache
def _table_words() -> frozenset[str]:
    table = _read_table()
    keys = [key for *_, keys in table.meanings for key in keys]
    keys += [tuple(name.split()) for name in table.index_of]
    return frozenset(word for key in keys for word in key)
