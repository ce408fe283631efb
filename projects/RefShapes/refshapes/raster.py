"""Vector parts and their rasterisation: an icon is a tuple of `Part`, a stamp is that icon at one
size, rotation and aspect, kept as a map of roles so that colours can be chosen afterwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import cv2
import numpy as np

SUPERSAMPLE = 4
"""Sub-pixels per pixel and axis at which parts are drawn, for smooth edges."""

_MARGIN = 2
_SHIFT = 4  # fractional bits of the fixed-point coordinates cv2 takes


class Role(IntEnum):
    """What a part is made of; the painter maps each role to a colour."""

    HOLE = 0
    BODY = 1
    DARK = 2
    LIGHT = 3
    INK = 4
    METAL = 5
    WOOD = 6
    GLASS = 7
    PAPER = 8
    LEAF = 9
    BEAK = 10
    OUTLINE = 11


@dataclass(frozen=True, eq=False)
class Part:
    """One polygon or line of an icon.

    Attributes:
        role: material of the part; `Role.HOLE` removes what lies below it.
        points: float64 (N, 2), x to the right and y down, in icon units.
        width: line width in icon units, or None for a filled polygon.
    """

    role: Role
    points: np.ndarray
    width: float | None = None


def polygon(role: Role, *points: tuple[float, float]) -> Part:
    return Part(role, np.array(points, float))


def rectangle(role: Role, x1: float, y1: float, x2: float, y2: float, corner: float = 0.0) -> Part:
    """A rectangle with corners rounded by the radius `corner`."""
    if corner <= 0:
        return polygon(role, (x1, y1), (x2, y1), (x2, y2), (x1, y2))
    quarters = (
        (x1 + corner, y1 + corner, 180),
        (x2 - corner, y1 + corner, 270),
        (x2 - corner, y2 - corner, 0),
        (x1 + corner, y2 - corner, 90),
    )
    arcs = [arc_points(cx, cy, corner, corner, start, start + 90, 7) for cx, cy, start in quarters]
    return Part(role, np.concatenate(arcs))


def ellipse(
    role: Role, cx: float, cy: float, rx: float, ry: float, start: float = 0, stop: float = 360
) -> Part:
    """A filled ellipse, or its segment between two angles in degrees (clockwise from +x)."""
    return Part(role, arc_points(cx, cy, rx, ry, start, stop))


def line(role: Role, width: float, *points: tuple[float, float]) -> Part:
    return Part(role, np.array(points, float), width)


def arc(
    role: Role,
    width: float,
    cx: float,
    cy: float,
    rx: float,
    ry: float,
    start: float = 0,
    stop: float = 360,
) -> Part:
    """A line along an ellipse between two angles in degrees (clockwise from +x)."""
    return Part(role, arc_points(cx, cy, rx, ry, start, stop), width)


def arc_points(
    cx: float, cy: float, rx: float, ry: float, start: float, stop: float, count: int = 48
) -> np.ndarray:
    """float64 (count, 2) points of an elliptic arc, both ends included."""
    angles = np.radians(np.linspace(start, stop, count))
    return np.stack([cx + rx * np.cos(angles), cy + ry * np.sin(angles)], axis=1)


def normalise(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Shift and scale parts so that their extent is centred and its long side is 1."""
    low = np.min([p.points.min(0) - (p.width or 0) / 2 for p in parts], axis=0)
    high = np.max([p.points.max(0) + (p.width or 0) / 2 for p in parts], axis=0)
    scale = 1 / (high - low).max()
    middle = (low + high) / 2
    return tuple(
        replace(
            p,
            points=(p.points - middle) * scale,
            width=None if p.width is None else p.width * scale,
        )
        for p in parts
    )


@dataclass(frozen=True, eq=False)
class Stamp:
    """A rasterised icon.

    Attributes:
        labels: uint8 (h * SUPERSAMPLE, w * SUPERSAMPLE), the `Role` of each sub-pixel, 0 outside.
        alpha: float32 (h, w) in [0, 1], the share of each pixel that is covered.
        mask: bool (h, w), the pixels at least half covered.
        angle: rotation in degrees, clockwise on screen.
    """

    labels: np.ndarray
    alpha: np.ndarray
    mask: np.ndarray
    angle: float


def rasterise(
    parts: Sequence[Part],
    long_side: float,
    angle: float = 0.0,
    aspect: float = 1.0,
    flip: bool = False,
    outline: float = 0.0,
) -> Stamp:
    """Draw normalised parts.

    Args:
        parts: parts of long side 1, see `normalise`.
        long_side: their long side in pixels, before rotation.
        angle: rotation in degrees, clockwise on screen.
        aspect: width over height relative to the parts' own; the greater side shrinks.
        flip: mirror left to right before rotating.
        outline: width in pixels of a line along the silhouette's inner edge, 0 for none.
    """
    turn = math.radians(angle)
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    stretch = np.array([min(1.0, aspect) * (-1 if flip else 1), min(1.0, 1 / aspect)])
    matrix = rotation @ np.diag(stretch * long_side)

    placed = [p.points @ matrix.T for p in parts]
    # A thin seam would vanish in a small icon, so that no line is thinner than about a pixel.
    widths = [None if p.width is None else max(0.9, p.width * long_side) for p in parts]
    low = np.min([q.min(0) - (w or 0) / 2 for q, w in zip(placed, widths, strict=True)], axis=0)
    high = np.max([q.max(0) + (w or 0) / 2 for q, w in zip(placed, widths, strict=True)], axis=0)
    cols, rows = (np.ceil(high - low).astype(int) + 2 * _MARGIN).tolist()
    offset = np.array([cols, rows]) / 2 - (low + high) / 2

    labels = np.zeros((rows * SUPERSAMPLE, cols * SUPERSAMPLE), np.uint8)
    for part, points, width in zip(parts, placed, widths, strict=True):
        fixed = np.rint((points + offset) * SUPERSAMPLE * (1 << _SHIFT)).astype(np.int32)
        if width is None:
            cv2.fillPoly(labels, [fixed], int(part.role), cv2.LINE_8, _SHIFT)
        else:
            thickness = max(1, round(width * SUPERSAMPLE))
            cv2.polylines(labels, [fixed], False, int(part.role), thickness, cv2.LINE_8, _SHIFT)
    inside = (labels > 0).astype(np.uint8)
    if outline > 0:
        reach = 2 * round(outline * SUPERSAMPLE) + 1
        kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (reach, reach))
        edge = inside - cv2.erode(inside, kernel)
        labels[edge > 0] = Role.OUTLINE
    alpha = cv2.resize(inside.astype(np.float32), (cols, rows), interpolation=cv2.INTER_AREA)
    return Stamp(labels, alpha, alpha >= 0.5, angle)
