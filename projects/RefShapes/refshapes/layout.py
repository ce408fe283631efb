"""Sampling of the shapes of an image and their positions, before anything is painted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from vlnms_d2.data.datasets.refshapes import CATEGORIES, SPLITS

from .icons import ICONS, random_distractor
from .raster import Stamp, rasterise
from .scene import COLORS, MIN_HEIGHT, MIN_WIDTH, PATTERNS, SIZES

MIN_VISIBLE = 0.45
"""Minimum share of an object's pixels that are visible."""
MIN_PIXELS = 120
"""Minimum number of an object's pixels that are visible."""
CROWD_SHARE = 0.6
"""Minimum share of a crowd's objects with the same category."""

MIN_CONTRAST = {
    "red": 0.66,
    "orange": 0.72,
    "yellow": 0.7,
    "green": 0.5,
    "blue": 0.48,
    "purple": 0.56,
    "pink": 0.65,
    "brown": 0.62,
    "white": 0.68,
    "black": 0.65,
}
"""Minimum opacity at which a color word is right over a gray surface: a paler orange would look
brown, a paler white or black gray."""

_LONG_SIDE = {"small": (20, 30), "medium": (34, 50), "large": (56, 84)}
_SIZE_ODDS = (0.33, 0.42, 0.25)
_PATTERN_ODDS = (0.4, 0.2, 0.2, 0.2)
_TRAIN_CROWDS = 0.2
_CLUSTERING = 0.3
_TRIES_PER_SHAPE = 60
_TRIES_PER_LAYOUT = 100


@dataclass(frozen=True, eq=False)
class PlacedShape:
    """One shape to paint, an object or a distractor.

    Attributes:
        category: entry of `CATEGORIES`, or None for a distractor.
        color, pattern, size: entries of `COLORS`, `PATTERNS`, `SIZES`.
        stamp: the shape's raster.
        long_side: long side in pixels before rotation.
        left, top: pixel of the image under the stamp's first pixel.
        contrast: opacity in (0, 1] over the mean of what lies below.
        blur: standard deviation in pixels of the blur of the shape, 0 for none.
        shadow: opacity in [0, 1) of its drop shadow, 0 for none.
    """

    category: str | None
    color: str
    pattern: str
    size: str
    stamp: Stamp
    long_side: float
    left: int
    top: int
    contrast: float
    blur: float
    shadow: float

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns of the image under the stamp."""
        rows, cols = self.stamp.mask.shape
        return slice(self.top, self.top + rows), slice(self.left, self.left + cols)


def sample_layout(
    rng: np.random.Generator, split: str, width: int, height: int
) -> list[PlacedShape]:
    """Objects and distractors of one image, in the order in which to paint them.

    At least `MIN_VISIBLE` of the pixels of every object, and `MIN_PIXELS`, are visible.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}, expected one of {', '.join(SPLITS)}")
    if width < MIN_WIDTH or height < MIN_HEIGHT:
        raise ValueError(
            f"an image of {width}x{height} pixels is too small, "
            f"expected at least {MIN_WIDTH}x{MIN_HEIGHT}"
        )
    crowd = split == "testA" or (split == "train" and rng.random() < _TRAIN_CROWDS)
    total = int(rng.integers(8, 21))
    groups = _crowd_groups(rng, total) if crowd else _mixed_groups(rng, total)
    words = _sample_words(rng, groups)
    distractors = int(rng.integers(3, 9))
    for _ in range(_TRIES_PER_LAYOUT):
        layout = _place_all(rng, words, distractors, width, height)
        if layout is not None:
            return layout
    raise RuntimeError(f"could not place {total} objects in {width}x{height} pixels")


def visible_masks(
    layout: list[PlacedShape], width: int, height: int
) -> list[tuple[PlacedShape, np.ndarray]]:
    """Each object of the layout with its uncovered pixels, bool (height, width)."""
    owner = np.full((height, width), -1, np.int32)
    for index, shape in enumerate(layout):
        owner[shape.window][shape.stamp.mask] = index
    return [(s, owner == i) for i, s in enumerate(layout) if s.category is not None]


def _mixed_groups(rng: np.random.Generator, total: int) -> list[tuple[str, int]]:
    """Categories with their counts, mostly 2 to 4, so that the category alone is rarely unique."""
    names = [CATEGORIES[i] for i in rng.permutation(len(CATEGORIES))]
    groups: list[tuple[str, int]] = []
    while total > 0:
        count = min(total, int(rng.choice([1, 2, 3, 4], p=[0.15, 0.3, 0.35, 0.2])))
        groups.append((names[len(groups) % len(names)], count))
        total -= count
    return groups


def _crowd_groups(rng: np.random.Generator, total: int) -> list[tuple[str, int]]:
    names = [CATEGORIES[i] for i in rng.permutation(len(CATEGORIES))[:4]]
    main = math.ceil(total * rng.uniform(CROWD_SHARE, 0.9))
    others = rng.multinomial(total - main, [1 / 3] * 3).tolist()
    return [(names[0], main), *((n, c) for n, c in zip(names[1:], others, strict=True) if c)]


def _sample_words(
    rng: np.random.Generator, groups: list[tuple[str, int]]
) -> list[tuple[str, str, str, str]]:
    """(category, colour, pattern, size) of each object, no two alike, in random order."""
    words: list[tuple[str, str, str, str]] = []
    for category, count in groups:
        used: list[tuple[str, str, str, str]] = []
        while len(used) < count:
            color = str(rng.choice(COLORS))
            if used and rng.random() < 0.3:
                # Sometimes repeat a color of the group, so that the color alone is not unique.
                color = used[int(rng.integers(len(used)))][1]
            pattern = str(rng.choice(PATTERNS, p=_PATTERN_ODDS))
            word = (category, color, pattern, str(rng.choice(SIZES, p=_SIZE_ODDS)))
            if word not in used:
                used.append(word)
        words += used
    return [words[i] for i in rng.permutation(len(words))]


def _place_all(
    rng: np.random.Generator,
    words: list[tuple[str, str, str, str]],
    distractors: int,
    width: int,
    height: int,
) -> list[PlacedShape] | None:
    # Each distractor comes before a random object; none comes last of all.
    before = np.bincount(rng.integers(0, len(words), distractors), minlength=len(words)).tolist()
    owner = np.full((height, width), -1, np.int32)
    layout: list[PlacedShape] = []
    full: list[int] = []
    for word, extra in zip(words, before, strict=True):
        for shape in [*(_sample_distractor(rng) for _ in range(extra)), _sample_object(rng, *word)]:
            spot = _find_spot(rng, shape.stamp.mask, owner, layout, full)
            if spot is None:
                return None
            placed = PlacedShape(**{**vars(shape), "left": spot[0], "top": spot[1]})
            owner[placed.window][placed.stamp.mask] = len(layout)
            layout.append(placed)
            full.append(int(placed.stamp.mask.sum()))
    return layout


def _find_spot(
    rng: np.random.Generator,
    mask: np.ndarray,
    owner: np.ndarray,
    layout: list[PlacedShape],
    full: list[int],
) -> tuple[int, int] | None:
    """Left and top of a position that leaves enough of every object below visible, or None."""
    rows, cols = mask.shape
    height, width = owner.shape
    if rows > height or cols > width:
        return None
    visible = np.bincount(owner[owner >= 0], minlength=len(layout))
    for _ in range(_TRIES_PER_SHAPE):
        left = rng.uniform(0, width - cols)
        top = rng.uniform(0, height - rows)
        if layout and rng.random() < _CLUSTERING:
            # Beside or over an earlier shape, as things in photographs stand together.
            near = layout[int(rng.integers(len(layout)))]
            far = 0.4 * (near.long_side + max(rows, cols))
            left = near.left + near.stamp.mask.shape[1] / 2 - cols / 2 + rng.uniform(-far, far)
            top = near.top + near.stamp.mask.shape[0] / 2 - rows / 2 + rng.uniform(-far, far)
        left, top = round(left), round(top)
        if not (0 <= left <= width - cols and 0 <= top <= height - rows):
            continue
        below = owner[top : top + rows, left : left + cols][mask]
        lost = np.bincount(below[below >= 0], minlength=len(layout))
        if all(
            layout[i].category is None
            or visible[i] - lost[i] >= max(MIN_PIXELS, MIN_VISIBLE * full[i])
            for i in np.flatnonzero(lost)
        ):
            return left, top
    return None


def _sample_object(
    rng: np.random.Generator, category: str, color: str, pattern: str, size: str
) -> PlacedShape:
    long_side = rng.uniform(*_LONG_SIDE[size])
    tilt = rng.uniform(-70, 70) if rng.random() < 0.1 else np.clip(rng.normal(0, 13), -25, 25)
    look = {
        "angle": float(tilt),
        "aspect": float(np.exp(rng.uniform(-0.18, 0.18))),
        "flip": bool(rng.random() < 0.5),
        "outline": max(1.0, 0.03 * long_side) if rng.random() < 0.6 else 0.0,
    }
    stamp = rasterise(ICONS[category], long_side, **look)
    while stamp.mask.sum() < 1.2 * MIN_PIXELS:  # thin icons, such as keys, at the least size
        long_side *= 1.06
        stamp = rasterise(ICONS[category], long_side, **look)
    least = MIN_CONTRAST[color]
    contrast = 1.0 if rng.random() < 0.4 else rng.uniform(least, 1.0)
    blur = rng.choice([0.0, 0.6, 1.0, 1.5], p=[0.5, 0.25, 0.15, 0.1])
    if blur:
        blur = min(blur * rng.uniform(0.8, 1.2), 0.045 * long_side)
    shadow = rng.uniform(0.25, 0.5) if rng.random() < 0.4 else 0.0
    return PlacedShape(
        category, color, pattern, size, stamp, float(long_side), 0, 0, contrast, float(blur), shadow
    )


def _sample_distractor(rng: np.random.Generator) -> PlacedShape:
    long_side = float(rng.uniform(16, 64))
    stamp = rasterise(
        random_distractor(rng),
        long_side,
        angle=float(rng.uniform(-180, 180)),
        aspect=float(np.exp(rng.uniform(-0.4, 0.4))),
        outline=max(1.0, 0.03 * long_side) if rng.random() < 0.5 else 0.0,
    )
    return PlacedShape(
        category=None,
        color=str(rng.choice(COLORS)),
        pattern=str(rng.choice(PATTERNS, p=_PATTERN_ODDS)),
        size=SIZES[1],
        stamp=stamp,
        long_side=long_side,
        left=0,
        top=0,
        contrast=float(rng.uniform(0.45, 1.0)),
        blur=float(rng.uniform(0, 1.5)),
        shadow=0.35 if rng.random() < 0.4 else 0.0,
    )
