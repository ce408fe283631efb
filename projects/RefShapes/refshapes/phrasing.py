"""From descriptions to text, in the style of RefCOCO, RefCOCO+ or RefCOCOg."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from . import lexicon
from .resolver import Description

WORDS_ALLOWED = {"refcoco": (1, 8), "refcoco+": (1, 9), "refcocog": (6, 16)}
"""Fewest and most words of an expression in each style."""

PATTERN_AFTER_SHARE = {"refcoco": 0.15, "refcoco+": 0.25, "refcocog": 0.4}
DEFINITE_SHARE = 0.45  # sentences that start with "the" where "a" would do
CLIPPED_ARTICLE_SHARE = 0.08  # "the red cup" rather than "red cup" in the short styles
CLIPPED_CONTEXT_SHARE = 0.6  # "next to blue chair" rather than "next to the blue chair"
MISSPELT_LETTERS_MIN = 4


def phrase(description: Description, style: str, rng: Random, unique: Sequence[bool] = ()) -> str:
    """An expression with the meaning of a description, in lower case.

    Args:
        description: the meaning.
        style: one of `vlnms_d2.data.datasets.refshapes.STYLES`.
        rng: chooses among the phrases.
        unique: for each contextual object, in order, whether its description fits no other
            object of the scene; such an object gets "the", any other one "a".
    """
    sentence = style == "refcocog"
    before, after = _place(description, sentence, *_looks(description, style, rng), rng)
    nouns: dict[str, str] = {}
    before.append(_noun(description, nouns, rng))
    definite = description.pick is not None or rng.random() < DEFINITE_SHARE
    if sentence:
        lead = "the " if definite else _article(" ".join(before))
    else:
        lead = "the " if rng.random() < CLIPPED_ARTICLE_SHARE else ""
    flags = iter(unique)
    related = []
    for position, relation in enumerate(description.relations):
        words = _choose(lexicon.RELATION_WORDS[relation.kind], rng)
        # A second relation drops the "that is" of the first, which holds for both.
        link = _link(description, rng) if sentence and position == 0 else ""
        names = [
            _context(target, description, sentence, next(flags), nouns, rng)
            for target in relation.targets
        ]
        related.append(f"{link}{words} {' and '.join(names)}")
    return lead + " ".join([*before, *after, " and ".join(related)]).strip()


def misspell(text: str, rng: Random) -> str | None:
    """The text with two letters swapped, a letter dropped or one doubled in one content word.

    Returns None if no word is suitable. The misspelt word is not another word of the lexicon.
    """
    parts = text.split()
    slips = [(at, wrong) for at, word in enumerate(parts) for wrong in _slips(word)]
    if not slips:
        return None
    at, wrong = rng.choice(slips)
    return " ".join([*parts[:at], wrong, *parts[at + 1 :]])


def _slips(word: str) -> list[str]:
    """Misspellings of a content word, none for any other word or a short one."""
    if word not in lexicon.content_words() or len(word) < MISSPELT_LETTERS_MIN:
        return []
    slips: dict[str, None] = {}
    for at in range(1, len(word) - 1):  # people get the first letter right
        swapped = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
        dropped = word[:at] + word[at + 1 :]
        doubled = word[:at] + word[at] + word[at:]
        slips.update(dict.fromkeys((swapped, dropped, doubled)))
    return [slip for slip in slips if slip not in lexicon.words() | lexicon.OTHER_WORDS]


def _choose(phrases: lexicon.Phrases, rng: Random) -> str:
    return rng.choices([text for text, _ in phrases], [weight for _, weight in phrases])[0]


def _article(following: str) -> str:
    return "an " if following[0] in "aeiou" else "a "


def _noun(description: Description, nouns: dict[str, str], rng: Random) -> str:
    """The head noun; `nouns` keeps those of the sentence, so that a house next to another one is
    not called a home."""
    category = description.category
    if category not in nouns:
        nouns[category] = _choose(lexicon.CATEGORY_WORDS[category], rng)
    return nouns[category]


def _looks(description: Description, style: str, rng: Random) -> tuple[list[str], list[str]]:
    """Phrases of size, colour, pattern and covering: those before the noun and those after."""
    before, after = [], []
    if description.color is not None:
        before.append(_choose(lexicon.COLOR_WORDS[description.color], rng))
    if description.pattern is not None:
        if rng.random() < PATTERN_AFTER_SHARE[style]:
            after.append(_choose(lexicon.PATTERN_AFTER[description.pattern], rng))
        else:
            # "striped red cup" and "red striped cup" are about as common.
            at = rng.randrange(len(before) + 1)
            before.insert(at, _choose(lexicon.PATTERN_BEFORE[description.pattern], rng))
    if description.size is not None:
        before.insert(0, _choose(lexicon.SIZE_WORDS[description.size], rng))
    if description.hidden:
        if after or description.relations or rng.random() < 0.4:
            before.insert(0, _choose(lexicon.HIDDEN_BEFORE, rng))
        else:
            after.append(_choose(lexicon.HIDDEN_AFTER, rng))
    return before, after


def _place(
    description: Description, sentence: bool, before: list[str], after: list[str], rng: Random
) -> tuple[list[str], list[str]]:
    """Adds the words of the pick to those before and after the noun."""
    pick = description.pick
    if pick is None:
        return before, after
    if pick.kind == "size":
        before = [_choose(lexicon.SIZE_SUPERLATIVES[pick.where], rng), *before]
    elif pick.kind == "ordinal":
        before = [_choose(lexicon.ORDINAL_WORDS[pick.rank], rng), *before]
        after = [*after, _choose(lexicon.ORDINAL_SIDES[pick.where], rng)]
    elif pick.kind == "extreme":
        # "at the very top in the picture" would say it twice.
        if sentence or rng.random() < 0.5:
            before = [_choose(lexicon.EXTREME_BEFORE[pick.where], rng), *before]
        else:
            after = [*after, _choose(lexicon.EXTREME_AFTER[pick.where], rng)]
    elif sentence:
        link = rng.choice(("", "", "that is ", "which is "))
        after = [*after, link + _choose(lexicon.SIDE_SENTENCE[pick.where], rng)]
    elif rng.random() < 0.5:
        word = _choose(lexicon.SIDE_BEFORE[pick.where], rng)
        if word == "top" and description.category == "hat" and not before:
            word = "upper"  # a top hat is a kind of hat
        before = [word, *before]
    else:
        after = [*after, _choose(lexicon.SIDE_AFTER[pick.where], rng)]
    if sentence and pick.kind != "side":
        after = [*after, rng.choice(("in the picture", "in the image"))]
    return before, after


def _link(description: Description, rng: Random) -> str:
    """Words between the referent and its first relation, empty or with a space at the end."""
    pose = rng.choice((*lexicon.POSES[description.category], "located"))
    return rng.choice(("", "", "that is ", "which is ", f"{pose} ", f"that is {pose} "))


def _context(
    target: Description,
    referent: Description,
    sentence: bool,
    unique: bool,
    nouns: dict[str, str],
    rng: Random,
) -> str:
    """The noun phrase of a contextual object, with its looks before the noun."""
    parts = []
    if target.size is not None:
        parts.append(_choose(lexicon.SIZE_WORDS[target.size], rng))
    if target.pattern is not None:
        parts.append(_choose(lexicon.PATTERN_BEFORE[target.pattern], rng))
    if target.color is not None:
        parts.append(_choose(lexicon.COLOR_WORDS[target.color], rng))
    name = " ".join([*parts, _noun(target, nouns, rng)])
    if _covers(target, referent):
        return f"another {name}"
    if not sentence and rng.random() < CLIPPED_CONTEXT_SHARE:
        return name
    return ("the " if unique else _article(name)) + name


def _covers(target: Description, referent: Description) -> bool:
    """Whether all that is said about the contextual object is said about the referent too."""
    return target.category == referent.category and all(
        getattr(target, name) in (None, getattr(referent, name))
        for name in ("color", "pattern", "size")
    )
