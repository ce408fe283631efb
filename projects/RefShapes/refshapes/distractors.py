"""Random shapes that belong to no category: what a detector may confuse with an object."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .raster import (
    Part,
    Role,
    arc,
    ellipse,
    line,
    normalise,
    polygon,
    rectangle,
)


def _blob(rng: np.random.Generator) -> list[Part]:
    angles = np.linspace(0, 2 * np.pi, 60)
    radius = np.ones_like(angles)
    for k in range(2, 6):
        radius += rng.uniform(-0.3, 0.3) / (k - 1) * np.cos(k * angles + rng.uniform(0, 6.28))
    return [Part(Role.BODY, np.stack([radius * np.cos(angles), radius * np.sin(angles)], 1))]


def _triangle(rng: np.random.Generator) -> list[Part]:
    return [polygon(Role.BODY, (-1, 0.8), (rng.uniform(-0.8, 0.8), -1), (1, 0.8))]


def _spiral(rng: np.random.Generator) -> list[Part]:
    angles = np.linspace(0, rng.uniform(3, 6) * np.pi, 120)
    radius = angles / angles[-1]
    points = np.stack([radius * np.cos(angles), radius * np.sin(angles)], 1)
    return [Part(Role.BODY, points, rng.uniform(0.12, 0.22))]


def _cross(rng: np.random.Generator) -> list[Part]:
    half = rng.uniform(0.15, 0.35)
    return [rectangle(Role.BODY, -half, -1, half, 1), rectangle(Role.BODY, -1, -half, 1, half)]


def _squiggle(rng: np.random.Generator) -> list[Part]:
    t = np.linspace(0, 1, 80)
    y = rng.uniform(0.2, 0.6) * np.sin(t * rng.uniform(9, 20) + rng.uniform(0, 6.28))
    return [Part(Role.BODY, np.stack([2 * t - 1, y], 1), rng.uniform(0.15, 0.3))]


def _ring(rng: np.random.Generator) -> list[Part]:
    return [arc(Role.BODY, rng.uniform(0.2, 0.7), 0, 0, 1, rng.uniform(0.6, 1))]


def _scribble(rng: np.random.Generator) -> list[Part]:
    points = rng.uniform(-1, 1, (int(rng.integers(6, 14)), 2))
    return [Part(Role.BODY, points, rng.uniform(0.08, 0.2))]


def _star(rng: np.random.Generator) -> list[Part]:
    spikes, inner = int(rng.integers(4, 8)), rng.uniform(0.35, 0.6)
    angles = np.arange(2 * spikes) * np.pi / spikes
    radius = np.where(np.arange(2 * spikes) % 2, inner, 1.0)
    return [Part(Role.BODY, np.stack([radius * np.cos(angles), radius * np.sin(angles)], 1))]


def _wheel(rng: np.random.Generator) -> list[Part]:
    """A disc with marks: near a ball or a clock, yet neither."""
    marks = [
        ellipse(Role.DARK, *rng.uniform(-0.6, 0.6, 2), *rng.uniform(0.1, 0.3, 2))
        for _ in range(int(rng.integers(1, 4)))
    ]
    return [ellipse(Role.BODY, 0, 0, 1, rng.uniform(0.75, 1)), *marks]


def _box(rng: np.random.Generator) -> list[Part]:
    """A box with a bar or two: near a book, a house or a bottle."""
    height = rng.uniform(0.5, 1)
    bars = [
        rectangle(Role(rng.choice([Role.DARK, Role.PAPER, Role.INK])), -1, y, 1, y + 0.15)
        for y in rng.uniform(-height, height - 0.15, int(rng.integers(0, 3)))
    ]
    return [rectangle(Role.BODY, -1, -height, 1, height, rng.uniform(0, 0.4)), *bars]


def _mushroom(rng: np.random.Generator) -> list[Part]:
    """A dome on a post: near an umbrella, a tree or a hat."""
    width = rng.uniform(0.12, 0.35)
    return [
        rectangle(Role.LIGHT, -width, -0.1, width, rng.uniform(0.5, 1)),
        ellipse(Role.BODY, 0, 0, 1, rng.uniform(0.5, 0.9), 180, 360),
    ]


def _stack(rng: np.random.Generator) -> list[Part]:
    """A few polygons on each other: parts of things, as of a chair, a car or a boat."""
    return [
        Part(
            Role(rng.choice([Role.BODY, Role.BODY, Role.DARK, Role.METAL])),
            rng.uniform(-0.5, 0.5, 2) + rng.uniform(-0.6, 0.6, (int(rng.integers(3, 6)), 2)),
        )
        for _ in range(int(rng.integers(2, 5)))
    ] + [line(Role.INK, 0.1, (-0.6, 0.2), (rng.uniform(-0.3, 0.6), 0.9))]


_SHAPES: tuple[Callable[[np.random.Generator], list[Part]], ...] = (
    _blob,
    _triangle,
    _spiral,
    _cross,
    _squiggle,
    _ring,
    _scribble,
    _star,
    _wheel,
    _box,
    _mushroom,
    _stack,
)


def random_distractor(rng: np.random.Generator) -> tuple[Part, ...]:
    """Normalised parts of a random shape of no category."""
    return normalise(_SHAPES[int(rng.integers(len(_SHAPES)))](rng))
