"""Template expressions for annotated boxes: place, order, size, depth, colour and neighbours.

An expression is made only where it tells the box from all others of its category. The words are
this file's own, so that they test those of vlnms_d2/language/cue_words.json a little.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vlnms_d2.language.phrases import COLOURS, PARTS
from vlnms_d2.language.synonyms import TABLE
from vlnms_d2.modeling.relatedness.portable import box_colours

from .photos import Photo

MIN_AREA = 0.004  # of the image, of boxes that are asked for
_FRAMES = json.loads((Path(__file__).parent / "frames.json").read_text(encoding="utf-8"))
_ORDINALS = ("first", "second", "third", "fourth")


@dataclass(frozen=True)
class Expression:
    """An expression for an annotated box, by its number in the photo; `kind` tells its cues."""

    image_id: int
    target: int
    query: str
    kind: str


def expressions(photo: Photo, per_box: int, seed: int = 0) -> list[Expression]:
    """At most `per_box` expressions for each annotated box of a photo that can be told apart."""
    rng = random.Random(f"{seed}/{photo.image_id}")
    synonyms = json.loads(TABLE.read_text(encoding="utf-8"))
    boxes = photo.boxes / np.tile(photo.size[::-1], 2).astype(np.float32)
    colours = box_colours(
        torch.from_numpy(photo.pixels()).permute(2, 0, 1), torch.from_numpy(photo.boxes)
    ).numpy()
    made = []
    for target in range(len(boxes)):
        x1, y1, x2, y2 = boxes[target]
        if (x2 - x1) * (y2 - y1) < MIN_AREA:
            continue
        facts = list(_facts(photo, boxes, colours, target))
        rng.shuffle(facts)
        for number in range(min(per_box, len(facts))):
            kind, slots = facts[number]
            noun = _noun(photo.names[photo.classes[target]], synonyms, rng)
            frame = rng.choice(_FRAMES[kind])
            if "y" in slots:
                slots = slots | {"y": _noun(slots["y"], synonyms, rng)}
            query = frame.format(x=noun, **slots)
            second = [
                f for f in facts if f[0] in ("left", "right", "front", "back") and f[0] != kind
            ]
            if (
                second
                and rng.random() < 0.25
                and kind in ("colour", "upper", "lower", "near", "big")
            ):
                query = rng.choice(_FRAMES[second[0][0]]).format(x=query)
                kind = f"{kind}+{second[0][0]}"
            if rng.random() < 0.08:
                query = misspelled(query, rng)
            made.append(Expression(photo.image_id, target, query, kind))
    return made


def misspelled(query: str, rng: random.Random) -> str:
    """The query with a letter of a longer word left out, doubled or exchanged with the next."""
    words = query.split()
    long = [i for i, word in enumerate(words) if len(word) > 4]
    if not long:
        return query
    i = rng.choice(long)
    at = rng.randrange(1, len(words[i]) - 1)
    word = words[i]
    words[i] = rng.choice(
        (
            word[:at] + word[at + 1 :],
            word[:at] + word[at] + word[at:],
            word[:at] + word[at + 1] + word[at] + word[at + 2 :],
        )
    )
    return " ".join(words)


def _noun(name: str, synonyms: dict[str, list[str]], rng: random.Random) -> str:
    if name == "person":
        return rng.choice(_FRAMES["people"])
    if rng.random() < 0.15:
        return "one"
    return rng.choice([name] * 3 + list(synonyms.get(name, []))[:6])


def _facts(
    photo: Photo, boxes: np.ndarray, colours: np.ndarray, target: int
) -> Iterator[tuple[str, dict[str, str]]]:
    """What tells the box from the others of its category: (kind of frame, slots)."""
    same = np.flatnonzero(photo.classes == photo.classes[target])
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    same = same[(area[same] > 0.15 * area[target]) | (same == target)]
    center = (boxes[:, :2] + boxes[:, 2:]) / 2
    height = boxes[:, 3] - boxes[:, 1]
    others = same[same != target]

    def leads(value: np.ndarray, margin: float) -> bool:
        return bool((value[target] - value[others] > margin).all())

    if not len(others):
        yield "only", {}
    else:
        for kind, value, margin in (
            ("left", -center[:, 0], 0.04),
            ("right", center[:, 0], 0.04),
            ("top", -center[:, 1], 0.08),
            ("bottom", center[:, 1], 0.08),
            ("big", np.log(area), 0.5),
            ("small", -np.log(area), 0.5),
            ("tall", np.log(height), 0.3),
            ("short", -np.log(height), 0.3),
        ):
            if leads(value, margin):
                yield kind, {}
        if leads(boxes[:, 3], 0.03) and leads(np.log(area), 0.2):
            yield "front", {}
        if leads(-boxes[:, 3], 0.03) and leads(-np.log(area), 0.2):
            yield "back", {}
        order = same[np.argsort(center[same, 0])]
        at = int(np.flatnonzero(order == target)[0])
        gaps = np.diff(center[order, 0])
        if len(gaps) and gaps.min() > 0.03:
            if len(order) % 2 and at == len(order) // 2 and len(order) > 1:
                yield "middle", {}
            for direction, number in (("left", at), ("right", len(order) - 1 - at)):
                if 1 <= number < len(_ORDINALS) or (number == 0 and len(order) > 2):
                    yield "order", {"n": _ORDINALS[number], "d": direction}
    is_person = photo.names[photo.classes[target]] == "person"
    table = colours.reshape(len(boxes), len(PARTS), len(COLOURS))
    for part, kind in enumerate(("upper", "lower") if is_person else ("colour",)):
        shares = table[:, part + 1 if is_person else 0, :11]
        best = int(shares[target].argmax())
        if shares[target, best] > 0.4 and not (shares[others, best] > 0.2).any():
            yield kind, {"c": COLOURS[best]}
    yield from _neighbours(photo, boxes, target, others)


def _gap(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(np.maximum(0, np.maximum(b[:2] - a[2:], a[:2] - b[2:]))))


def _neighbours(
    photo: Photo, boxes: np.ndarray, target: int, others: np.ndarray
) -> Iterator[tuple[str, dict[str, str]]]:
    for j in range(len(boxes)):
        alone = (photo.classes == photo.classes[j]).sum() == 1
        if not alone or photo.classes[j] == photo.classes[target]:
            continue
        gap = _gap(boxes[target], boxes[j])
        if gap < 0.1 and all(_gap(boxes[k], boxes[j]) > gap + 0.08 for k in others):
            kind = "touching" if gap == 0 else "near"
            yield kind, {"y": photo.names[photo.classes[j]]}
