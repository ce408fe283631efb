"""Spatial relations between the objects of a scene, with the margins that make them clear."""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot
from typing import NamedTuple

from .scene import Scene, SceneObject

DIRECTIONS = ("left_of", "right_of", "above", "below")
NEARBY = ("beside", "near")
COVERING = ("behind", "in_front_of")
RELATION_KINDS = (*DIRECTIONS, *NEARBY, *COVERING, "between")

DIRECTION_OFFSET = 0.08  # share of the image side between the centres
DIRECTION_OFFSET_POSSIBLE = 0.02
DIRECTION_SLANT = 0.7  # across over along: about 35 degrees
DIRECTION_SLANT_POSSIBLE = 2.5  # about 68 degrees
NEAR_GAP = 0.08  # share of the image diagonal between the boxes
NEAR_GAP_POSSIBLE = 0.16
NEAR_OVERLAP = 0.3  # share of the smaller box: more than that is no longer side by side
COVERED_VISIBLE = 0.85  # an object "behind" another shows at most this share of its pixels
COVERED_OVERLAP = 0.2  # share of the covered object's box
BETWEEN_ALONG = (0.25, 0.75)  # where the object stands on the way from one target to the other
BETWEEN_ALONG_POSSIBLE = (0.1, 0.9)
BETWEEN_ACROSS = 0.2  # distance from that line, share of its length
BETWEEN_ACROSS_POSSIBLE = 0.5


class Holds(NamedTuple):
    """Whether a relation holds beyond doubt, and whether a generous reader would accept it."""

    sure: bool
    possible: bool


def relation_holds(
    scene: Scene, kind: str, one: SceneObject, others: Sequence[SceneObject]
) -> Holds:
    """Whether `one` stands in the relation to the others (one object, two for "between").

    Distances are taken between centres and boxes (x1, y1, x2, y2), in pixels.
    """
    if kind == "between":
        return _between(one, *others)
    (other,) = others
    if kind in DIRECTIONS:
        return _direction(scene, kind, one, other)
    if kind in NEARBY:
        return _nearby(scene, kind, one, other)
    if kind == "behind":
        return _behind(scene, one, other)
    if kind == "in_front_of":
        return _behind(scene, other, one)
    raise ValueError(f"Relation '{kind}': expected one of {', '.join(RELATION_KINDS)}.")


def overlap_area(one: SceneObject, other: SceneObject) -> float:
    """Area of the intersection of two boxes, in pixels."""
    width = min(one.box[2], other.box[2]) - max(one.box[0], other.box[0])
    height = min(one.box[3], other.box[3]) - max(one.box[1], other.box[1])
    return max(width, 0.0) * max(height, 0.0)


def _box_area(one: SceneObject) -> float:
    return (one.box[2] - one.box[0]) * (one.box[3] - one.box[1])


def _direction(scene: Scene, kind: str, one: SceneObject, other: SceneObject) -> Holds:
    dx, dy = other.center[0] - one.center[0], other.center[1] - one.center[1]
    along, across, side = {
        "left_of": (dx, dy, scene.width),
        "right_of": (-dx, dy, scene.width),
        "above": (dy, dx, scene.height),
        "below": (-dy, dx, scene.height),
    }[kind]
    # "Left of" an object that covers half of this one would be said differently.
    apart = overlap_area(one, other) <= NEAR_OVERLAP * min(_box_area(one), _box_area(other))
    clear = along >= DIRECTION_OFFSET * side and abs(across) <= DIRECTION_SLANT * along
    possible = (
        along > DIRECTION_OFFSET_POSSIBLE * side and abs(across) <= DIRECTION_SLANT_POSSIBLE * along
    )
    return Holds(clear and apart, possible)


def _nearby(scene: Scene, kind: str, one: SceneObject, other: SceneObject) -> Holds:
    gap_x = max(one.box[0] - other.box[2], other.box[0] - one.box[2], 0.0)
    gap_y = max(one.box[1] - other.box[3], other.box[1] - one.box[3], 0.0)
    gap = hypot(gap_x, gap_y) / hypot(scene.width, scene.height)
    dx, dy = other.center[0] - one.center[0], other.center[1] - one.center[1]
    apart = overlap_area(one, other) <= NEAR_OVERLAP * min(_box_area(one), _box_area(other))
    level = kind == "near" or abs(dy) <= DIRECTION_SLANT * abs(dx)
    return Holds(gap <= NEAR_GAP and apart and level, gap <= NEAR_GAP_POSSIBLE)


def _behind(scene: Scene, one: SceneObject, other: SceneObject) -> Holds:
    """`one` is behind `other`, which was drawn later and covers a part of it."""
    order = [each.id for each in scene.objects]
    later = scene.objects[order.index(one.id) + 1 :]
    covering = [each for each in later if overlap_area(one, each) > 0]
    possible = other in covering
    # With a second object on top, which of the two hides this one cannot be told from boxes.
    sure = (
        covering == [other]
        and one.visible <= COVERED_VISIBLE
        and overlap_area(one, other) >= COVERED_OVERLAP * _box_area(one)
    )
    return Holds(sure, possible)


def _between(one: SceneObject, first: SceneObject, second: SceneObject) -> Holds:
    (x0, y0), (x1, y1), (x2, y2) = one.center, first.center, second.center
    length = hypot(x2 - x1, y2 - y1)
    if length == 0:
        return Holds(False, False)
    along = ((x0 - x1) * (x2 - x1) + (y0 - y1) * (y2 - y1)) / length**2
    across = abs((x0 - x1) * (y2 - y1) - (y0 - y1) * (x2 - x1)) / length**2
    apart = overlap_area(one, first) == overlap_area(one, second) == 0
    sure = BETWEEN_ALONG[0] <= along <= BETWEEN_ALONG[1] and across <= BETWEEN_ACROSS
    possible = (
        BETWEEN_ALONG_POSSIBLE[0] <= along <= BETWEEN_ALONG_POSSIBLE[1]
        and across <= BETWEEN_ACROSS_POSSIBLE
    )
    return Holds(sure and apart, possible)
