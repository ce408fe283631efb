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
_NOT_IN_CAPTIONS = {"left", "right", "on_left", "on_right", *ORDINALS}
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
    right or an order, or is no sentence and begins with "the" ("the cup that ...") or speaks of
    clothes ("a boy in a blue shirt holding ...").

    Args:
        text: as people write it.
        synonyms: words of a category's name, such as "hot dog", are no cues.
    """
    plain = re.sub(r"\bt ?- ?shirt", "tshirt", text.lower()).replace("'s ", " ")
    tokens = _WORD.findall(plain.replace("'", ""))
    names = synonyms.find(tokens)
    name_at = {name.start: name.end - name.start for name in names if name.end - name.start > 1}
    tokens = [token if synonyms.knows(token) else _respelled(token) for token in tokens]
    phrases, colours, start, before = [Phrase()], [], 0, frozenset()
    order, ordered = 0, phrases[0]
    has_clause, is_sentence, is_one = False, False, tokens[:1] == ["the"]
    is_caption = len(tokens) >= _CAPTION
    while start < len(tokens):
        phrase, word = phrases[-1], tokens[start]
        tags, length = _tags(tokens, start, name_at.get(start, 0))
        is_caption &= tags.isdisjoint(_NOT_IN_CAPTIONS)
        is_last = start + length == len(tokens)
        is_name = start in name_at  # "parking meter"
        is_verb = word.endswith("ing") and len(word) > 4 and not is_name and "noun_ing" not in tags
        is_new = not (phrase.words or phrase.cues or phrase.is_person or colours)
        relation = next((name for name in RELATIONS if name in tags), "")
        begins = "begins_clause" in tags or "pronoun" in tags
        has_noun = bool(phrase.words) or "noun_ing" in before  # "thing"
        is_clause = begins and has_noun and tokens[start - 1] not in _LINKS
        is_part = word == "of" and any(
            synonyms.classes_of(w) and not synonyms.is_collective(w) for w in phrase.words
        )
        has_clause |= is_clause or word in ("that", "who", "which", "whose")
        is_sentence |= word in _VERBS and not has_clause
        if not relation and ((is_verb and not is_new) or is_clause or is_part):
            relation = "touching_it"  # "bat the man swings", "rider of the horse"
        if word == "and" and not phrase.words:  # "a black and white dog"
            relation = ""
        is_without = "without" in tags and not (is_new and len(phrases) == 1)
        if (relation or is_without) and not is_last:
            _add_colours(phrase, colours, "whole")
            if is_new and len(phrases) > 1:
                phrase.relation = relation
            else:
                phrases.append(Phrase(relation))
            phrase = phrases[-1]
            phrase.is_absent = is_without
        # "the lady in the white top"; elsewhere the top is a place.
        is_clothing = word == "top" and not before.isdisjoint(COLOURS)
        parts = ["upper"] if is_clothing else [p for p in PARTS if p in tags]
        named_colours = [colour for colour in COLOURS if colour in tags]
        if not parts or not colours:  # jeans are blue unless they are black
            colours += named_colours
        for part in parts:
            _add_colours(phrase, colours, part)
        is_limb = "limb" in tags and len(phrases) == 1  # not "thing in hand"
        phrase.is_person |= bool(parts) or "person" in tags or is_limb
        is_one |= not {"upper", "lower"}.isdisjoint(parts)
        phrase.of_scene |= "scene" in tags
        if not tags.isdisjoint(ORDINALS):
            order, ordered = next(ORDINALS[tag] for tag in tags if tag in ORDINALS), phrase
        for axis in (*AXES, "middle"):
            if axis not in tags or parts or (relation and not is_last and axis in PLACES):
                continue
            cues = phrase.later if phrase.relation and phrase.words else phrase.cues
            if order and axis in PLACES:
                cues[f"{axis}_order"], order = order, 0
            else:
                cues[axis] = _WEAK if "weak" in tags else 1.0
                if "outermost" in tags and axis in PLACES:
                    cues[f"{axis}_order"] = 1
        following = _tags(tokens, start + 1, 0)[0] if not is_last else frozenset()
        is_fruit = word == "orange" and tokens[max(0, start - 1)] != "in"
        is_fruit &= following.isdisjoint(PARTS)  # "orange sleeves"
        is_pronoun = "pronoun" in tags
        is_cue = bool(named_colours) or "nothing" in tags or is_pronoun or word == "little"
        if is_pronoun:
            phrase.words.append("person")
        is_name |= not is_cue and bool(synonyms.classes_of(word))
        if is_name or ((not tags or "weak" in tags or is_fruit) and not is_verb):
            phrase.words += tokens[start : start + length]
        start, before = start + length, tags
    _add_colours(phrases[-1], colours, "whole")
    if is_caption and (is_sentence or not is_one):
        return [Phrase(words=[text], cues={"caption": 1.0})]
    if order:  # "the second man"
        ordered.cues["right_order" if "last" in tokens else "left_order"] = order
    return [phrase for phrase in phrases if not phrase.is_absent]


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
        place = RELATIONS[phrase.relation]
        if phrase.of_scene and phrase.relation == "near_it":
            place = "front"
        if place and not phrase.cues and not phrase.is_person:
            meant.cues.setdefault(place, 1.0 if phrase.of_scene else _WEAK)
    return [meant, *others]


def _add_colours(phrase: Phrase, colours: list[str], part: str) -> None:
    """Add cues of a part and empty the list of its colours."""
    phrase.cues |= {f"{colour}_{part}": 1.0 for colour in colours}
    colours.clear()


def _tags(tokens: Sequence[str], start: int, name_length: int) -> tuple[frozenset[str], int]:
    """The entries of the table for the longest known run of words, and its length."""
    if name_length:
        return frozenset(), name_length
    table = _read_table()
    for length in range(min(6, len(tokens) - start), 0, -1):
        words = " ".join(tokens[start : start + length])
        if words in table:
            return table[words], length
    return frozenset(), 1


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
