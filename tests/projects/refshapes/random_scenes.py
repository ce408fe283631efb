"""For tests: random scenes, made without painting anything; and what an expression means, read
phrase by phrase without the code that wrote it."""

from __future__ import annotations

from random import Random
from typing import Any

from refshapes.lexicon import phrase_meanings
from refshapes.resolver import Description, Pick, Relation
from refshapes.scene import COLORS, PATTERNS, SIZES, Scene, SceneObject
from vlnms_d2.data.datasets.refshapes import CATEGORIES

WIDTH, HEIGHT = 400, 300
SIDE = {"small": 32, "medium": 55, "large": 90}  # pixels


def random_scene(seed: int, image_id: int = 1, crowd: int | None = None) -> Scene:
    """A scene of 5 to 12 objects (or `crowd`), of few categories so that they must be told
    apart; some cover others."""
    rng = Random(seed)
    categories = rng.sample(CATEGORIES, rng.randint(3, 7))
    objects = []
    for number in range(crowd or rng.randint(5, 12)):
        size = rng.choice(SIZES)
        width, height = (SIDE[size] * rng.uniform(0.9, 1.1) for _ in range(2))
        x, y = rng.uniform(0, WIDTH - width), rng.uniform(0, HEIGHT - height)
        objects.append(
            SceneObject(
                id=image_id * 100 + number,
                category=rng.choice(categories),
                color=rng.choice(COLORS),
                pattern=rng.choice(PATTERNS),
                size=size,
                box=(x, y, x + width, y + height),
                visible=rng.choice((1.0, 1.0, 1.0, 0.8, 0.6, 0.4)),
                segmentation=((x, y, x + width, y, x + width, y + height, x, y + height),),
                area=width * height,
            )
        )
    return Scene(image_id, rng.choice(("train", "val", "testA")), WIDTH, HEIGHT, tuple(objects))


_MEANINGS = phrase_meanings()
_LONGEST = max(len(phrase.split()) for phrase in _MEANINGS)


def read(text: str) -> Description:
    """The meaning of a correctly spelt expression; a word without one raises ValueError."""
    referent: dict[str, Any] = {}
    relations: list[tuple[str, list[dict[str, Any]]]] = []
    noun_phrase = referent
    found = _phrases(text)
    for at, (slot, value) in enumerate(found):
        if slot == "relation":
            noun_phrase = {}
            relations.append((value, [noun_phrase]))
        elif slot == "and":
            if found[at + 1][0] != "relation":  # "between a cup and a key"
                noun_phrase = {}
                relations[-1][1].append(noun_phrase)
        elif slot != "filler":
            if slot in noun_phrase:
                raise ValueError(f"'{text}' gives {slot} twice")
            noun_phrase[slot] = value
    told = tuple(Relation(kind, tuple(map(_description, targets))) for kind, targets in relations)
    return _description(referent, told)


def _phrases(text: str) -> list[tuple[str, Any]]:
    words, found, at = text.split(), [], 0
    while at < len(words):
        if words[at] == "and":
            found.append(("and", None))
            at += 1
            continue
        for length in range(min(_LONGEST, len(words) - at), 0, -1):
            phrase = " ".join(words[at : at + length])
            if phrase in _MEANINGS:
                found.append(_MEANINGS[phrase])
                at += length
                break
        else:
            raise ValueError(f"'{text}': no meaning for '{words[at]}'")
    return found


def _description(slots: dict[str, Any], relations: tuple[Relation, ...] = ()) -> Description:
    slots = dict(slots)
    pick = None
    if "rank" in slots:
        pick = Pick("ordinal", slots.pop("rank_side"), slots.pop("rank"))
    for slot, kind in (("side", "side"), ("extreme", "extreme"), ("biggest", "size")):
        if slot in slots:
            assert pick is None
            pick = Pick(kind, slots.pop(slot))
    return Description(**slots, pick=pick, relations=relations)
