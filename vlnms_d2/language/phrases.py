"""Splits what people say of an object into phrases with cues, by the words in `cue_words.json`.

"second man from the left in a red shirt next to the bus" is a man, the second from the left, red in
the upper part, and near a bus.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import NamedTuple

from .synonyms import Synonyms

TABLE = Path(__file__).parent / "cue_words.json"

PLACES = ("left", "right", "top", "bottom", "front", "back")
AXES = (*PLACES, "big", "small", "tall", "short", "wide", "thin", "cut")  # by the border
COLOURS = (
    "black", "blue", "brown", "grey", "green", "orange", "pink", "purple", "red", "white", "yellow",
    "light", "dark",
)  # fmt: skip
PARTS = ("whole", "upper", "lower", "head")
# Of the object that is meant to another one, with the place that remains if no category is named:
# "dude behind everyone" is in the back.
RELATIONS = {
    "on_left": "left", "on_right": "right", "above_it": "top", "below_it": "bottom",
    "before_it": "front", "behind_it": "back", "near_it": "", "touching_it": "",
}  # fmt: skip
ORDINALS = {"first": 1, "second": 2, "third": 3, "fourth": 4, "fifth": 5, "sixth": 6, "last": 1}
CUES = (
    *AXES,
    "middle",
    *(f"{place}_order" for place in PLACES),
    *(f"{colour}_{part}" for part in PARTS for colour in COLOURS),
    "caption",
    *RELATIONS,
)
"""The columns of a phrase's cues: weights from 0 to 1; `<place>_order` is 1 for the first box from
there, 2 for the second, and so on, 0 for none. "caption" is 1 for a whole caption, which tells of
several objects."""

_WEAK = 0.5  # "baby" and "sitting" do not say much about the size
_CAPTION = 8  # words that COCO's captions have at least
_NOT_IN_CAPTIONS = {"left", "right", "on_left", "on_right", "refers", *ORDINALS}
_VERBS = ("is", "are", "has", "have")  # that make a sentence
_LINKS = ("of", "from", "to", "at", "is", "are")  # after these, "the" begins no clause
_WORD = re.compile(r"[a-z0-9]+")
_LEAST_LETTERS, _LEAST_RATIO = 5, 0.84  # of a misspelled word, and of its likeness to the right one


@dataclass
class Phrase:
    """What an expression says of one object, or a segment of the expression, up to the next
    preposition or verb.

    Attributes:
        relation: in `RELATIONS`, of the object that is meant to this one; "" for the former.
        words: those that may name its category.
        cues: by name, see `CUES`.
        later: cues after the noun, which in "behind the bus on the left" are those of the object
            that is meant.
        is_person: whether it has clothes or hair.
        of_scene: whether it is the picture, the camera or everyone else.
        is_absent: whether it is what the object is said not to have.
    """

    relation: str = ""
    words: list[str] = field(default_factory=list)
    cues: dict[str, float] = field(default_factory=dict)
    later: dict[str, float] = field(default_factory=dict)
    is_person: bool = False
    of_scene: bool = False
    is_absent: bool = False


def split_phrases(text: str, synonyms: Synonyms) -> list[Phrase]:
    """The segments of an expression; `join_phrases` decides which are objects of their own.

    A text as long as a caption is one segment, unless it means one object: if it speaks of left,
    right, an order or the closest, or is no sentence and begins with "the" ("the cup that ...") or
    speaks of clothes ("a boy in a blue shirt holding ...").

    Args:
        text: as people write it.
        synonyms: words of a category's name, such as "hot dog", are no cues.
    """
    runs = _find_runs(text, synonyms)
    splitter = _Splitter(synonyms)
    for before, run, after in zip([_NO_RUN, *runs], runs, [*runs[1:], _NO_RUN], strict=False):
        splitter.read(run, before, after)
    splitter.colour("whole")
    tokens = [word for run in runs for word in run.words]
    is_long = len(tokens) >= _CAPTION
    is_one = not splitter.is_sentence and (splitter.has_clothes or tokens[:1] == ["the"])
    if is_long and not is_one and all(run.tags.isdisjoint(_NOT_IN_CAPTIONS) for run in runs):
        return [Phrase(words=[text], cues={"caption": 1.0})]
    if splitter.order:  # "the second man"
        splitter.ordered.cues["right_order" if "last" in tokens else "left_order"] = splitter.order
    return [phrase for phrase in splitter.phrases if not phrase.is_absent]


class _Run(NamedTuple):
    """An entry of the table, which has tags; the name of a category, "parking meter"; or a word."""

    words: list[str]
    tags: frozenset[str] = frozenset()

    @property
    def is_name(self) -> bool:
        return len(self.words) > 1 and not self.tags

    @property
    def is_participle(self) -> bool:
        is_ing = self.words[0].endswith("ing") and len(self.words[0]) > 4
        return is_ing and not self.is_name and "noun_ing" not in self.tags


_NO_RUN = _Run([""])


def _find_runs(text: str, synonyms: Synonyms) -> list[_Run]:
    """The runs of a text, from left to right; at each place the longest."""
    plain = re.sub(r"\bt ?- ?shirt", "tshirt", text.lower()).replace("'s ", " ")
    tokens = _WORD.findall(plain.replace("'", ""))
    name_at = {name.start: name for name in synonyms.find(tokens) if name.end - name.start > 1}
    tokens = [token if synonyms.knows(token) else _respelled(token) for token in tokens]
    table, runs, start = _read_table(), [], 0
    while start < len(tokens):
        if start in name_at:
            run = _Run(tokens[start : name_at[start].end])
        else:
            longest = (tokens[start : start + length] for length in range(6, 1, -1))
            words = next((w for w in longest if " ".join(w) in table), tokens[start : start + 1])
            run = _Run(words, table.get(" ".join(words), frozenset()))
        runs.append(run)
        start += len(run.words)
    return runs


class _Splitter:
    """Reads runs from left to right.

    Attributes:
        phrases: so far; the last one grows.
        colours: said, but not yet of what.
        order, ordered: an ordinal that awaits its place ("second from the left"), and its phrase.
        has_clothes, has_clause, is_sentence: whether there were clothes, a relative clause, a
            finite verb outside one.
    """

    def __init__(self, synonyms: Synonyms):
        self.synonyms = synonyms
        self.phrases = [Phrase()]
        self.colours: list[str] = []
        self.order, self.ordered = 0, self.phrases[0]
        self.has_clothes = self.has_clause = self.is_sentence = False

    def read(self, run: _Run, before: _Run, after: _Run) -> None:
        """Read one run; the runs before and after it are `_NO_RUN` at the ends."""
        relation = self._relation(run, before)
        is_without = "without" in run.tags and not (self._is_new() and len(self.phrases) == 1)
        begins = bool(relation or is_without) and after is not _NO_RUN
        if begins:
            if not self._is_new() or len(self.phrases) == 1:
                self.colour("whole")
                self.phrases.append(Phrase())
            self.phrases[-1].relation, self.phrases[-1].is_absent = relation, is_without
        for tag in run.tags.intersection(ORDINALS):
            self.order, self.ordered = ORDINALS[tag], self.phrases[-1]
        if not self._add_looks(run, before):
            # The left of "left of" is the relation's, not the object's.
            self._add_places(run, AXES[len(PLACES) :] if relation and begins else AXES)
        self._add_words(run, before, after)

    def _is_new(self) -> bool:
        last = self.phrases[-1]
        return not (last.words or last.cues or last.is_person or self.colours)

    def colour(self, part: str) -> None:
        """The colours that were said are those of a part of the last phrase."""
        self.phrases[-1].cues |= {f"{colour}_{part}": 1.0 for colour in self.colours}
        self.colours = []

    def _relation(self, run: _Run, before: _Run) -> str:
        """The relation that the run says or, as "bat the man swings", implies; "" for none."""
        phrase, word = self.phrases[-1], run.words[0]
        has_noun = bool(phrase.words) or "noun_ing" in before.tags  # "thing"
        is_clause = has_noun and not run.tags.isdisjoint(("begins_clause", "pronoun"))
        is_clause &= before.words[-1] not in _LINKS
        is_part = word == "of" and any(
            self.synonyms.classes_of(w) and not self.synonyms.is_collective(w) for w in phrase.words
        )
        self.has_clause |= is_clause or word in ("that", "who", "which", "whose")
        self.is_sentence |= word in _VERBS and not self.has_clause
        if word == "and" and not phrase.words:  # "a black and white dog"
            return ""
        relation = next((name for name in RELATIONS if name in run.tags), "")
        if not relation and ((run.is_participle and not self._is_new()) or is_clause or is_part):
            relation = "touching_it"  # "bat the man swings", "rider of the horse"
        return relation

    def _add_looks(self, run: _Run, before: _Run) -> bool:
        """Add colours, clothes and what else makes a person; whether there are clothes or hair."""
        phrase, tags = self.phrases[-1], run.tags
        # "the lady in the white top"; elsewhere the top is a place.
        is_clothing = run.words[0] == "top" and not before.tags.isdisjoint(COLOURS)
        parts = ["upper"] if is_clothing else [part for part in PARTS if part in tags]
        if not parts or not self.colours:  # jeans are blue unless they are black
            self.colours += [colour for colour in COLOURS if colour in tags]
        for part in parts:
            self.colour(part)
        is_limb = "limb" in tags and len(self.phrases) == 1  # not "thing in hand"
        phrase.is_person |= bool(parts) or "person" in tags or is_limb
        phrase.of_scene |= "scene" in tags
        self.has_clothes |= not {"upper", "lower"}.isdisjoint(parts)
        return bool(parts)

    def _add_places(self, run: _Run, axes: Sequence[str]) -> None:
        """Add places, orders and sizes."""
        phrase = self.phrases[-1]
        cues = phrase.later if phrase.relation and phrase.words else phrase.cues
        for axis in (axis for axis in (*axes, "middle") if axis in run.tags):
            if self.order and axis in PLACES:
                cues[f"{axis}_order"], self.order = self.order, 0
            else:
                cues[axis] = _WEAK if "weak" in run.tags else 1.0
                if "outermost" in run.tags and axis in PLACES:
                    cues[f"{axis}_order"] = 1

    def _add_words(self, run: _Run, before: _Run, after: _Run) -> None:
        """Add what may name a category."""
        words, word, tags = self.phrases[-1].words, run.words[0], run.tags
        if "pronoun" in tags:
            words.append("person")
        is_cue = not tags.isdisjoint((*COLOURS, "nothing", "pronoun")) or word == "little"
        is_name = run.is_name or (not is_cue and self.synonyms.classes_of(word))
        # "orange on the left", but not "person in orange" and "orange sleeves"
        is_fruit = word == "orange" and before.words[-1] != "in" and after.tags.isdisjoint(PARTS)
        if is_name or ((not tags or "weak" in tags or is_fruit) and not run.is_participle):
            words += run.words


def join_phrases(phrases: Sequence[Phrase], names_category: Sequence[bool]) -> list[Phrase]:
    """The objects of an expression, the one that is meant first.

    Args:
        phrases: from `split_phrases`.
        names_category: whether the words of each name a category. If not, a phrase describes the
            object that is meant: "in red", "on the left", "behind everyone".
    """
    meant, others = phrases[0], []
    for phrase, is_named in zip(phrases[1:], names_category[1:], strict=True):
        meant.cues |= phrase.later
        if is_named:
            others.append(phrase)
            if not phrase.is_person:
                continue
        # "next to the man in red shorts": the shorts of the man; "on a horse in red shorts": not.
        wears = phrase.is_person and not is_named and others
        owner = others[-1] if wears and others[-1].relation != "touching_it" else meant
        owner.cues |= phrase.cues
        owner.is_person |= phrase.is_person
        near_scene = phrase.of_scene and phrase.relation == "near_it"
        place = "front" if near_scene else RELATIONS[phrase.relation]
        if place and not phrase.cues and not phrase.is_person:
            meant.cues.setdefault(place, 1.0 if phrase.of_scene else _WEAK)
    return [meant, *others]


@cache
def _respelled(word: str) -> str:
    """The word of the table that a misspelled word stands for; itself if there is none."""
    if len(word) < _LEAST_LETTERS or word in _read_table():
        return word
    # "closed" is no misspelled "close".
    alike = [entry for entry in _read_table() if entry[0] == word[0] and entry + "d" != word]
    return (get_close_matches(word, alike, 1, _LEAST_RATIO) or [word])[0]


@cache
def _read_table() -> dict[str, frozenset[str]]:
    tags: dict[str, frozenset[str]] = {}
    for tag, entries in json.loads(TABLE.read_text(encoding="utf-8")).items():
        for words in entries:
            tags[words] = tags.get(words, frozenset()) | {tag}
    return tags
