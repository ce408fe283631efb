"""The icon of each category, as vector parts. `Role.BODY` carries the object's colour and pattern;
the other roles are kept small, so that the colour word describes the whole icon."""

from __future__ import annotations

import math
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

BODY, DARK, LIGHT, INK = Role.BODY, Role.DARK, Role.LIGHT, Role.INK
METAL, WOOD, GLASS, PAPER = Role.METAL, Role.WOOD, Role.GLASS, Role.PAPER


def _ball() -> list[Part]:
    return [
        ellipse(BODY, 0, 0, 1, 1),
        line(DARK, 0.08, (0, -0.93), (0, 0.93)),
        line(DARK, 0.08, (-0.93, 0), (0.93, 0)),
        arc(DARK, 0.08, -1.15, 0, 0.72, 0.85, -56, 56),
        arc(DARK, 0.08, 1.15, 0, 0.72, 0.85, 124, 236),
    ]


def _cup() -> list[Part]:
    return [
        arc(DARK, 0.2, 0.5, 0.05, 0.42, 0.4, -110, 110),
        polygon(
            BODY, (-0.85, -0.7), (0.55, -0.7), (0.42, 0.8), (0.3, 0.9), (-0.6, 0.9), (-0.72, 0.8)
        ),
        ellipse(LIGHT, -0.15, -0.7, 0.7, 0.2),
        ellipse(INK, -0.15, -0.68, 0.56, 0.12),
    ]


def _key() -> list[Part]:
    return [
        rectangle(BODY, -0.35, -0.15, 1.0, 0.15, 0.08),
        rectangle(BODY, 0.42, 0.1, 0.6, 0.46),
        rectangle(BODY, 0.78, 0.1, 0.97, 0.56),
        ellipse(BODY, -0.55, 0, 0.52, 0.52),
        ellipse(Role.HOLE, -0.66, 0, 0.2, 0.2),
    ]


def _tree() -> list[Part]:
    return [
        polygon(
            WOOD, (-0.13, 0.0), (0.13, 0.0), (0.17, 0.85), (0.32, 1.0), (-0.32, 1.0), (-0.17, 0.85)
        ),
        ellipse(BODY, -0.42, 0.02, 0.4, 0.38),
        ellipse(BODY, 0.42, 0.02, 0.4, 0.38),
        ellipse(BODY, 0, -0.55, 0.52, 0.48),
        ellipse(BODY, 0, -0.1, 0.55, 0.42),
        arc(DARK, 0.06, -0.42, 0.02, 0.25, 0.22, 40, 150),
        arc(DARK, 0.06, 0.38, -0.02, 0.25, 0.22, 20, 130),
        arc(DARK, 0.06, 0.02, -0.5, 0.3, 0.26, 200, 300),
    ]


def _house() -> list[Part]:
    return [
        rectangle(DARK, 0.4, -0.9, 0.62, -0.3),
        rectangle(BODY, -0.72, -0.2, 0.72, 0.9),
        polygon(DARK, (-1.0, -0.12), (0, -0.98), (1.0, -0.12)),
        rectangle(WOOD, 0.12, 0.3, 0.46, 0.9),
        rectangle(GLASS, -0.5, 0.12, -0.08, 0.5),
        line(INK, 0.05, (-0.29, 0.12), (-0.29, 0.5)),
        line(INK, 0.05, (-0.5, 0.31), (-0.08, 0.31)),
    ]


def _car() -> list[Part]:
    body = ((-1.0, -0.02), (-0.68, -0.1), (-0.42, -0.55), (0.32, -0.55), (0.62, -0.1), (0.95, 0.0))
    return [
        polygon(BODY, *body, (1.0, 0.36), (-1.0, 0.36)),
        polygon(GLASS, (-0.52, -0.1), (-0.34, -0.42), (-0.08, -0.42), (-0.08, -0.1)),
        polygon(GLASS, (0.04, -0.1), (0.04, -0.42), (0.24, -0.42), (0.45, -0.1)),
        line(DARK, 0.06, (-0.95, 0.22), (0.95, 0.22)),
        ellipse(INK, -0.55, 0.36, 0.25, 0.25),
        ellipse(INK, 0.55, 0.36, 0.25, 0.25),
        ellipse(METAL, -0.55, 0.36, 0.1, 0.1),
        ellipse(METAL, 0.55, 0.36, 0.1, 0.1),
        ellipse(PAPER, 0.9, 0.07, 0.08, 0.08),
    ]


def _fish() -> list[Part]:
    return [
        polygon(BODY, (0.45, 0), (1.0, -0.5), (0.86, 0), (1.0, 0.5)),
        polygon(DARK, (-0.3, -0.4), (0.05, -0.66), (0.35, -0.3)),
        polygon(DARK, (-0.15, 0.4), (0.15, 0.62), (0.3, 0.25)),
        ellipse(BODY, -0.2, 0, 0.78, 0.47),
        arc(DARK, 0.08, -0.72, 0, 0.3, 0.4, -55, 55),
        ellipse(PAPER, -0.68, -0.1, 0.13, 0.13),
        ellipse(INK, -0.69, -0.1, 0.07, 0.07),
        polygon(DARK, (-0.08, -0.02), (0.26, -0.17), (0.26, 0.17)),
    ]


def _flower() -> list[Part]:
    cy, ring = -0.36, 0.4
    spots = [math.radians(-90 + 60 * k) for k in range(6)]
    petals = [ellipse(BODY, ring * math.cos(a), cy + ring * math.sin(a), 0.27, 0.27) for a in spots]
    edges = [
        line(DARK, 0.05, (0, cy), (0.6 * math.cos(a + 0.524), cy + 0.6 * math.sin(a + 0.524)))
        for a in spots
    ]
    return [
        line(Role.LEAF, 0.12, (0, 0.0), (0.03, 0.6), (0, 1.0)),
        polygon(Role.LEAF, (0.02, 0.85), (0.2, 0.5), (0.58, 0.4), (0.42, 0.75)),
        polygon(Role.LEAF, (0.0, 0.95), (-0.2, 0.6), (-0.58, 0.5), (-0.42, 0.85)),
        *petals,
        *edges,
        ellipse(INK, 0, cy, 0.24, 0.24),
        ellipse(Role.BEAK, 0, cy, 0.17, 0.17),
    ]


def _umbrella() -> list[Part]:
    scallops = [ellipse(Role.HOLE, x, 0.06, 0.25, 0.17) for x in (-0.75, -0.25, 0.25, 0.75)]
    return [
        ellipse(BODY, 0, 0.06, 1.0, 0.98, 180, 360),
        *scallops,
        line(DARK, 0.06, (0, -0.9), (0, -0.1)),
        arc(DARK, 0.06, 0, 0.0, 0.5, 0.92, 180, 360),
        line(INK, 0.12, (0, -0.02), (0, 0.8)),
        arc(INK, 0.12, 0.18, 0.8, 0.18, 0.18, 0, 180),
        line(INK, 0.1, (0, -1.05), (0, -0.9)),
    ]


def _chair() -> list[Part]:
    return [
        line(DARK, 0.13, (-0.38, 0.3), (-0.36, 0.72)),
        line(DARK, 0.13, (0.52, 0.3), (0.54, 0.72)),
        line(DARK, 0.13, (-0.42, -0.9), (-0.42, 0.2)),
        line(DARK, 0.13, (0.42, -0.9), (0.42, 0.2)),
        rectangle(BODY, -0.52, -1.0, 0.52, -0.28, 0.12),
        polygon(BODY, (-0.5, 0.02), (0.5, 0.02), (0.68, 0.4), (-0.68, 0.4)),
        polygon(DARK, (-0.68, 0.4), (0.68, 0.4), (0.68, 0.52), (-0.68, 0.52)),
        line(DARK, 0.15, (-0.6, 0.5), (-0.6, 1.0)),
        line(DARK, 0.15, (0.6, 0.5), (0.6, 1.0)),
    ]


def _clock() -> list[Part]:
    ticks = [
        line(INK, 0.07, (0.4 * math.cos(a), 0.1 + 0.4 * math.sin(a)),
             (0.46 * math.cos(a), 0.1 + 0.46 * math.sin(a)))
        for a in (0, math.pi / 2, math.pi, 3 * math.pi / 2)
    ]  # fmt: skip
    return [
        line(INK, 0.16, (-0.45, 0.75), (-0.62, 0.98)),
        line(INK, 0.16, (0.45, 0.75), (0.62, 0.98)),
        line(INK, 0.1, (0, -0.95), (0, -0.6)),
        ellipse(DARK, -0.52, -0.66, 0.3, 0.26),
        ellipse(DARK, 0.52, -0.66, 0.3, 0.26),
        ellipse(BODY, 0, 0.1, 0.84, 0.84),
        ellipse(INK, 0, 0.1, 0.56, 0.56),
        ellipse(PAPER, 0, 0.1, 0.51, 0.51),
        *ticks,
        line(INK, 0.1, (0, -0.27), (0, 0.1), (0.24, 0.22)),
    ]


def _book() -> list[Part]:
    return [
        polygon(DARK, (-0.72, 0.62), (-0.72, 0.86), (-0.6, 0.98), (0.75, 0.98), (0.75, 0.9)),
        rectangle(PAPER, -0.62, 0.66, 0.7, 0.88),
        line(METAL, 0.04, (-0.6, 0.78), (0.7, 0.78)),
        rectangle(BODY, -0.72, -1.0, 0.75, 0.7, 0.06),
        rectangle(DARK, -0.72, -1.0, -0.48, 0.72, 0.06),
        rectangle(PAPER, -0.26, -0.68, 0.52, -0.22),
        line(INK, 0.07, (-0.12, -0.52), (0.38, -0.52)),
        line(INK, 0.07, (-0.12, -0.37), (0.24, -0.37)),
    ]


def _bird() -> list[Part]:
    return [
        line(INK, 0.08, (-0.1, 0.5), (-0.16, 0.92), (-0.34, 0.92)),
        line(INK, 0.08, (0.14, 0.5), (0.1, 0.92), (-0.08, 0.92)),
        polygon(Role.BEAK, (-0.72, -0.5), (-1.05, -0.3), (-0.7, -0.24)),
        polygon(DARK, (0.35, 0.0), (1.0, -0.3), (1.0, 0.0), (0.5, 0.4)),
        ellipse(BODY, 0.05, 0.1, 0.6, 0.5),
        polygon(BODY, (-0.78, -0.3), (-0.22, -0.55), (0.3, -0.2), (-0.4, 0.4)),
        ellipse(BODY, -0.45, -0.42, 0.36, 0.34),
        polygon(DARK, (-0.2, -0.08), (0.12, -0.2), (0.6, 0.12), (0.62, 0.3), (0.15, 0.36)),
        ellipse(PAPER, -0.54, -0.46, 0.11, 0.11),
        ellipse(INK, -0.56, -0.46, 0.07, 0.07),
    ]


def _boat() -> list[Part]:
    return [
        polygon(BODY, (-0.02, -0.92), (0.82, 0.26), (-0.02, 0.26)),
        polygon(LIGHT, (-0.06, -0.74), (-0.06, 0.26), (-0.72, 0.26)),
        line(INK, 0.08, (-0.04, -0.95), (-0.04, 0.4)),
        polygon(BODY, (-1.0, 0.4), (1.0, 0.4), (0.68, 0.92), (-0.66, 0.92)),
        polygon(DARK, (-1.0, 0.4), (1.0, 0.4), (0.92, 0.54), (-0.9, 0.54)),
    ]


def _hat() -> list[Part]:
    return [
        ellipse(DARK, 0, 0.5, 1.0, 0.27),
        ellipse(BODY, 0, 0.42, 1.0, 0.25),
        polygon(
            BODY,
            (-0.62, -0.8),
            (0.62, -0.8),
            (0.52, 0.42),
            (0.3, 0.52),
            (-0.3, 0.52),
            (-0.52, 0.42),
        ),
        polygon(
            INK,
            (-0.56, 0.08),
            (0.56, 0.08),
            (0.52, 0.42),
            (0.28, 0.52),
            (-0.28, 0.52),
            (-0.52, 0.42),
        ),
        ellipse(LIGHT, 0, -0.8, 0.62, 0.15),
    ]


def _bottle() -> list[Part]:
    return [
        rectangle(BODY, -0.15, -0.85, 0.15, -0.2),
        rectangle(INK, -0.19, -1.0, 0.19, -0.76, 0.04),
        polygon(BODY, (-0.15, -0.45), (0.15, -0.45), (0.22, -0.3), (0.4, -0.12), (0.4, 0.0),
                (-0.4, 0.0), (-0.4, -0.12), (-0.22, -0.3)),
        rectangle(BODY, -0.4, -0.1, 0.4, 1.0, 0.1),
        rectangle(PAPER, -0.4, 0.24, 0.4, 0.58),
        line(INK, 0.06, (-0.2, 0.41), (0.2, 0.41)),
    ]  # fmt: skip


ICONS: dict[str, tuple[Part, ...]] = {
    "ball": normalise(_ball()),
    "cup": normalise(_cup()),
    "key": normalise(_key()),
    "tree": normalise(_tree()),
    "house": normalise(_house()),
    "car": normalise(_car()),
    "fish": normalise(_fish()),
    "flower": normalise(_flower()),
    "umbrella": normalise(_umbrella()),
    "chair": normalise(_chair()),
    "clock": normalise(_clock()),
    "book": normalise(_book()),
    "bird": normalise(_bird()),
    "boat": normalise(_boat()),
    "hat": normalise(_hat()),
    "bottle": normalise(_bottle()),
}
"""Normalised parts of each entry of `scene.CATEGORIES`."""


# --- distractors -------------------------------------------------------------------------------


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
