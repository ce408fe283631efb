"""The words people use for what a RefShapes scene contains.

Every table maps a meaning to its phrases. A phrase stands for one meaning only, so that a
sentence can be read back phrase by phrase; `phrase_meanings` gives that reverse reading.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache

Phrases = tuple[tuple[str, int], ...]
"""Phrases of one meaning, each with how often it is picked relative to the others."""

CATEGORY_WORDS: Mapping[str, Phrases] = {
    "ball": (("ball", 12), ("round ball", 2), ("sphere", 1)),
    "cup": (("cup", 10), ("mug", 4), ("coffee cup", 2)),
    "key": (("key", 12), ("door key", 1)),
    "tree": (("tree", 1),),
    "house": (("house", 10), ("home", 2), ("building", 2), ("cottage", 1)),
    "car": (("car", 12), ("auto", 1), ("automobile", 1)),
    "fish": (("fish", 12), ("fishy", 1)),
    "flower": (("flower", 12), ("blossom", 1)),
    "umbrella": (("umbrella", 12), ("parasol", 2), ("brolly", 1)),
    "chair": (("chair", 12), ("seat", 2)),
    "clock": (("clock", 12), ("watch", 2), ("timepiece", 1)),
    "book": (("book", 14), ("novel", 1), ("notebook", 1)),
    "bird": (("bird", 12), ("birdie", 2), ("birdy", 1)),
    "boat": (("boat", 10), ("ship", 3), ("sailboat", 2)),
    "hat": (("hat", 10), ("cap", 3)),
    "bottle": (("bottle", 12), ("flask", 1)),
}

COLOR_WORDS: Mapping[str, Phrases] = {
    "red": (("red", 1),),
    "orange": (("orange", 1),),
    "yellow": (("yellow", 1),),
    "green": (("green", 1),),
    "blue": (("blue", 1),),
    "purple": (("purple", 5), ("violet", 1)),
    "pink": (("pink", 1),),
    "brown": (("brown", 1),),
    "white": (("white", 1),),
    "black": (("black", 1),),
}

PATTERN_BEFORE: Mapping[str, Phrases] = {
    "plain": (("plain", 1),),
    "striped": (("striped", 6), ("stripy", 2), ("stripey", 1)),
    "dotted": (("dotted", 3), ("spotted", 3), ("polka dot", 3), ("spotty", 1)),
    "checked": (("checkered", 5), ("checked", 3), ("checkerboard", 1)),
}
PATTERN_AFTER: Mapping[str, Phrases] = {
    "plain": (("with no pattern", 2), ("without a pattern", 1)),
    "striped": (("with stripes", 5), ("with the stripes", 1), ("that has stripes", 1)),
    "dotted": (("with dots", 3), ("with spots", 3), ("with polka dots", 2)),
    "checked": (("with checks", 2), ("with squares", 2), ("with a checkered pattern", 2)),
}

SIZE_WORDS: Mapping[str, Phrases] = {
    "small": (("small", 6), ("little", 4), ("tiny", 2)),
    "large": (("big", 6), ("large", 4), ("huge", 1)),
}
SIZE_SUPERLATIVES: Mapping[str, Phrases] = {
    "small": (("smallest", 5), ("tiniest", 1), ("littlest", 1)),
    "large": (("biggest", 5), ("largest", 3)),
}

HIDDEN_BEFORE: Phrases = (("half hidden", 3), ("partly hidden", 2), ("hidden", 2), ("covered", 1))
HIDDEN_AFTER: Phrases = (
    ("that is partly hidden", 3),
    ("that is half covered", 2),
    ("that is partially blocked", 1),
)

SIDE_BEFORE: Mapping[str, Phrases] = {
    "left": (("left", 1),),
    "right": (("right", 1),),
    "top": (("top", 4), ("upper", 1)),
    "bottom": (("bottom", 4), ("lower", 1)),
    "top left": (("top left", 4), ("upper left", 2)),
    "top right": (("top right", 4), ("upper right", 2)),
    "bottom left": (("bottom left", 4), ("lower left", 2)),
    "bottom right": (("bottom right", 4), ("lower right", 2)),
    "middle": (("center", 2), ("middle", 1)),
}
SIDE_AFTER: Mapping[str, Phrases] = {
    "left": (("on left", 4), ("on the left", 4), ("left", 4), ("left side", 1), ("to the left", 1)),
    "right": (
        ("on right", 4),
        ("on the right", 4),
        ("right", 4),
        ("right side", 1),
        ("to the right", 1),
    ),
    "top": (("at top", 3), ("at the top", 3), ("up top", 2), ("top", 1), ("top of pic", 1)),
    "bottom": (("at bottom", 3), ("at the bottom", 3), ("bottom", 3), ("bottom of pic", 1)),
    "top left": (("top left", 4), ("upper left", 3), ("in the top left", 2), ("at top left", 1)),
    "top right": (
        ("top right", 4),
        ("upper right", 3),
        ("in the top right", 2),
        ("at top right", 1),
    ),
    "bottom left": (
        ("bottom left", 4),
        ("lower left", 3),
        ("in the bottom left", 2),
        ("at bottom left", 1),
    ),
    "bottom right": (
        ("bottom right", 4),
        ("lower right", 3),
        ("in the bottom right", 2),
        ("at bottom right", 1),
    ),
    "middle": (("in the middle", 4), ("in middle", 3), ("center", 2), ("in the center", 2)),
}
SIDE_SENTENCE: Mapping[str, Phrases] = {
    "left": (("on the left side of the picture", 3), ("on the left of the image", 2)),
    "right": (("on the right side of the picture", 3), ("on the right of the image", 2)),
    "top": (("at the top of the picture", 3), ("in the upper part of the image", 1)),
    "bottom": (("at the bottom of the picture", 3), ("in the lower part of the image", 1)),
    "top left": (("in the upper left of the picture", 2), ("in the top left of the image", 2)),
    "top right": (("in the upper right of the picture", 2), ("in the top right of the image", 2)),
    "bottom left": (
        ("in the lower left of the picture", 2),
        ("in the bottom left of the image", 2),
    ),
    "bottom right": (
        ("in the lower right of the picture", 2),
        ("in the bottom right of the image", 2),
    ),
    "middle": (("in the middle of the picture", 3), ("in the center of the image", 2)),
}

EXTREME_BEFORE: Mapping[str, Phrases] = {
    "left": (("far left", 3), ("leftmost", 2), ("furthest left", 1)),
    "right": (("far right", 3), ("rightmost", 2), ("furthest right", 1)),
    "top": (("highest", 2), ("topmost", 2)),
    "bottom": (("lowest", 2), ("bottommost", 1)),
}
EXTREME_AFTER: Mapping[str, Phrases] = {
    "left": (("on far left", 2), ("on the far left", 3), ("far left", 3), ("furthest left", 1)),
    "right": (
        ("on far right", 2),
        ("on the far right", 3),
        ("far right", 3),
        ("furthest right", 1),
    ),
    "top": (("at the very top", 2), ("nearest the top", 1)),
    "bottom": (("at the very bottom", 2), ("nearest the bottom", 1)),
}

ORDINAL_WORDS: Mapping[int, Phrases] = {
    2: (("second", 3), ("2nd", 3)),
    3: (("third", 3), ("3rd", 3)),
}
ORDINAL_SIDES: Mapping[str, Phrases] = {
    "left": (("from left", 3), ("from the left", 3)),
    "right": (("from right", 3), ("from the right", 3)),
    "top": (("from top", 3), ("from the top", 3)),
    "bottom": (("from bottom", 3), ("from the bottom", 3)),
}

RELATION_WORDS: Mapping[str, Phrases] = {
    "left_of": (("left of", 3), ("to the left of", 3), ("to left of", 1)),
    "right_of": (("right of", 3), ("to the right of", 3), ("to right of", 1)),
    "above": (("above", 6), ("over", 2)),
    "below": (("below", 3), ("under", 4), ("beneath", 1), ("underneath", 1)),
    "beside": (("next to", 6), ("beside", 2)),
    "near": (("near", 3), ("by", 2), ("close to", 2)),
    "behind": (("behind", 1),),
    "in_front_of": (("in front of", 1),),
    "between": (("between", 3), ("in between", 1)),
}

POSES: Mapping[str, tuple[str, ...]] = {
    "ball": ("lying", "resting"),
    "cup": ("standing", "sitting"),
    "key": ("lying",),
    "tree": ("growing", "standing"),
    "house": ("standing", "located"),
    "car": ("parked", "driving"),
    "fish": ("swimming",),
    "flower": ("growing", "blooming"),
    "umbrella": ("standing", "placed"),
    "chair": ("standing", "placed"),
    "clock": ("hanging", "placed"),
    "book": ("lying", "placed"),
    "bird": ("flying", "sitting"),
    "boat": ("floating", "sailing"),
    "hat": ("lying", "placed"),
    "bottle": ("standing", "placed"),
}
"""Verbs that a sentence adds to an object; they do not change which object is meant."""

FILLERS = (
    "a", "an", "the", "another", "that is", "which is", "located", "in the picture",
    "in the image",
)  # fmt: skip
"""Phrases without meaning."""

LOCATION_WORDS = frozenset(
    {
        "left", "right", "top", "bottom", "middle", "center", "upper", "lower", "leftmost",
        "rightmost", "topmost", "bottommost", "front", "side", "corner", "far", "furthest",
        "highest", "lowest", "above", "below", "over", "under", "beneath", "underneath",
        "between", "second", "2nd", "third", "3rd",
    }
)  # fmt: skip
"""Words that the RefCOCO+ style, which describes objects by appearance, never uses."""


OTHER_WORDS = frozenset(
    {
        "back", "bat", "bid", "bot", "char", "cock", "doted", "flak", "hoe", "hose", "hue", "noel",
        "pain", "plan", "sat", "set", "sip", "sotted", "stripped", "strippy", "tee", "tinny",
    }
)  # fmt: skip
"""English words that are one misspelling away from a word of the lexicon, and are excluded."""


def phrase_meanings() -> dict[str, tuple[str, object]]:
    """Each phrase with its meaning, a pair (slot, value).

    The slots are "category", "color", "pattern", "size", "biggest" (superlative of
    size), "hidden", "side", "extreme", "rank", "rank_side", "relation" and "filler".

    Raises:
        ValueError: a phrase is listed with two meanings.
    """
    meanings: dict[str, tuple[str, object]] = {}

    def add(slot: str, value: object, phrases: Iterable[str]) -> None:
        for phrase in phrases:
            if meanings.setdefault(phrase, (slot, value)) != (slot, value):
                raise ValueError(
                    f"The phrase '{phrase}' means both {meanings[phrase]} and {(slot, value)} in "
                    "the lexicon: keep one of them."
                )

    for slot, table in (
        ("category", CATEGORY_WORDS),
        ("color", COLOR_WORDS),
        ("pattern", PATTERN_BEFORE),
        ("pattern", PATTERN_AFTER),
        ("size", SIZE_WORDS),
        ("biggest", SIZE_SUPERLATIVES),
        ("side", SIDE_BEFORE),
        ("side", SIDE_AFTER),
        ("side", SIDE_SENTENCE),
        ("extreme", EXTREME_BEFORE),
        ("extreme", EXTREME_AFTER),
        ("rank", ORDINAL_WORDS),
        ("rank_side", ORDINAL_SIDES),
        ("relation", RELATION_WORDS),
    ):
        for value, phrases in table.items():
            add(slot, value, dict(phrases))
    add("hidden", True, dict(HIDDEN_BEFORE + HIDDEN_AFTER))
    add("filler", None, FILLERS)
    for poses in POSES.values():
        add("filler", None, poses)
    return meanings


CONTENT_SLOTS = ("category", "color", "pattern", "size", "biggest")


@cache
def words() -> frozenset[str]:
    """Every single word a correctly spelt expression can contain."""
    return frozenset(word for phrase in phrase_meanings() for word in phrase.split()) | {"and"}


@cache
def content_words() -> frozenset[str]:
    """The words that name categories and looks and stand alone for their meaning."""
    return frozenset(
        phrase
        for phrase, (slot, _) in phrase_meanings().items()
        if slot in CONTENT_SLOTS and " " not in phrase
    )
