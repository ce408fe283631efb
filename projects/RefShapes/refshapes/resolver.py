"""Which objects of a scene a description means.

A description is the structured meaning of an expression. Resolving it gives two sets: the
objects that match beyond doubt and those that a generous reader might accept as well. An
expression is accepted when both sets contain only the referent, so that everything close to a
boundary (a cup slightly left of the middle, a half-covered tree of unknown size) is ambiguous.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations
from math import hypot
from typing import NamedTuple

from .scene import SIZES, Scene, SceneObject

SIDES = ("left", "right", "top", "bottom")
CORNERS = ("top left", "top right", "bottom left", "bottom right")

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

# Shares of the image width (left, right) or height (top, bottom).
SIDE_BAND = 0.08  # centres this close to the middle line are on neither side beyond doubt
PAIR_GAP = 0.12  # "the left cup" of two: the centres are this far apart
EXTREME_GAP = 0.08  # "the leftmost cup": lead over the next one
ORDINAL_GAP = 0.06  # "second from left": distance between neighbours in the row
MIDDLE_SURE = 0.15
MIDDLE_POSSIBLE = 0.28

# Visible shares of an object's pixels.
SIZE_VISIBLE = 0.5  # below it the size of an object cannot be told
HIDDEN_SURE = 0.7
HIDDEN_POSSIBLE = 0.9

SUPERLATIVE_RATIO = 1.2  # box area of the biggest object over that of any other


@dataclass(frozen=True)
class Pick:
    """Choice of one object among those that a description fits, by place or by size.

    Attributes:
        kind: "side" (where: a side, a corner or "middle"), "extreme" (where: a side),
            "ordinal" (where: the side counted from, rank 2 or more) or "size" (where: "small"
            for the smallest, "large" for the biggest).
        where: see kind.
        rank: 1 for the first; used by "ordinal" only.
    """

    kind: str
    where: str
    rank: int = 1


@dataclass(frozen=True)
class Relation:
    """A spatial relation (one of `RELATION_KINDS`) to one contextual object, or to two for
    "between"."""

    kind: str
    targets: tuple[Description, ...]

    def __post_init__(self) -> None:
        num_targets = 2 if self.kind == "between" else 1
        if self.kind not in RELATION_KINDS or len(self.targets) != num_targets:
            raise ValueError(
                f"Relation '{self.kind}' to {len(self.targets)} objects: expected one of "
                f"{', '.join(RELATION_KINDS)} with 1 object (2 for 'between')."
            )


@dataclass(frozen=True)
class Description:
    """Meaning of a noun phrase; None or an empty tuple leaves a property open.

    The category is always named: a "red thing" could be one of the painted shapes that are no
    objects and that a scene does not list.
    A pick goes with no relation: "the left cup next to a key" leaves open which comes first.
    """

    category: str
    color: str | None = None
    pattern: str | None = None
    size: str | None = None
    hidden: bool = False
    pick: Pick | None = None
    relations: tuple[Relation, ...] = ()

    def __post_init__(self) -> None:
        if self.pick is not None and self.relations:
            raise ValueError(
                "A description has either a pick or relations, got both: split it in two."
            )


@dataclass(frozen=True)
class Resolution:
    """Ids of the objects meant: those beyond doubt, and those a generous reader would accept.

    `sure` is a subset of `possible`.
    """

    sure: frozenset[int]
    possible: frozenset[int]

    def is_exactly(self, object_id: int) -> bool:
        """True if the object is meant beyond doubt and no other one could be."""
        return self.sure == self.possible == {object_id}


def resolve(scene: Scene, description: Description) -> Resolution:
    """The objects of the scene that the description means."""
    sure: list[SceneObject] = []
    possible: list[SceneObject] = []
    for candidate in scene.objects:
        fits_surely, fits_possibly = _fits(candidate, description)
        for relation in description.relations:
            if not fits_possibly:
                break
            choices = related(scene, candidate, relation)
            fits_possibly = bool(choices)
            fits_surely = fits_surely and any(certain for _, certain in choices)
        if fits_possibly:
            possible.append(candidate)
        if fits_surely:
            sure.append(candidate)
    if description.pick is not None:
        picked = _pick(scene, possible, description.pick)
        return Resolution(picked.sure & _ids(sure), picked.possible)
    return Resolution(_ids(sure), _ids(possible))


def related(
    scene: Scene, candidate: SceneObject, relation: Relation
) -> list[tuple[tuple[int, ...], bool]]:
    """Contextual objects to which a candidate stands in a relation.

    Returns one entry for each choice of contextual objects that a generous reader would accept:
    their ids, in the order of the relation's targets, and whether the choice is beyond doubt.
    """
    targets = [resolve(scene, target) for target in relation.targets]
    pool = [
        other
        for other in scene.objects
        if other.id != candidate.id and any(other.id in t.possible for t in targets)
    ]
    choices = []
    for others in permutations(pool, len(targets)):
        named = list(zip(others, targets, strict=True))
        if not all(other.id in target.possible for other, target in named):
            continue
        holds = relation_holds(scene, relation.kind, candidate, others)
        if holds.possible:
            certain = holds.sure and all(other.id in target.sure for other, target in named)
            choices.append((tuple(other.id for other in others), certain))
    return choices


def context_ids(
    scene: Scene, description: Description, referent: SceneObject
) -> tuple[int, ...] | None:
    """Ids of the contextual objects that a description of the referent names, in its order.

    Returns None if one of them could be mistaken for another object, or is named twice.
    """
    named: list[int] = []
    for relation in description.relations:
        choices = related(scene, referent, relation)
        if len(choices) != 1 or not choices[0][1]:
            return None
        named.extend(choices[0][0])
    return tuple(named) if len(set(named)) == len(named) else None


def _ids(objects: Iterable[SceneObject]) -> frozenset[int]:
    return frozenset(one.id for one in objects)


def _fits(candidate: SceneObject, description: Description) -> tuple[bool, bool]:
    """Whether the candidate's properties match: (beyond doubt, possibly)."""
    for described, actual in (
        (description.category, candidate.category),
        (description.color, candidate.color),
        (description.pattern, candidate.pattern),
    ):
        if described is not None and described != actual:
            return False, False
    sure = possible = True
    if description.size is not None:
        same, readable = candidate.size == description.size, candidate.visible >= SIZE_VISIBLE
        sure, possible = same and readable, same or not readable
    if description.hidden:
        sure = sure and candidate.visible <= HIDDEN_SURE
        possible = possible and candidate.visible < HIDDEN_POSSIBLE
    return sure, possible


def _pick(scene: Scene, candidates: list[SceneObject], pick: Pick) -> Resolution:
    if pick.kind == "size":
        return _pick_size(candidates, pick.where)
    if pick.kind == "ordinal":
        return _pick_ordinal(scene, candidates, pick)
    if pick.kind == "extreme":
        return _pick_extreme(scene, candidates, pick.where)
    if pick.kind == "side" and pick.where in SIDES and len(candidates) == 2:
        return _pick_of_two(scene, candidates, pick.where)
    if pick.kind == "side":
        return _pick_region(scene, candidates, pick.where)
    raise ValueError(f"Pick kind '{pick.kind}': expected side, extreme, ordinal or size.")


def depth(scene: Scene, one: SceneObject, side: str) -> float:
    """Distance of an object's centre from a side, as a share of the image's width or height."""
    x, y = one.center[0] / scene.width, one.center[1] / scene.height
    return {"left": x, "right": 1 - x, "top": y, "bottom": 1 - y}[side]


def _pick_region(scene: Scene, candidates: list[SceneObject], where: str) -> Resolution:
    """Objects in a part of the image: a side, a corner or the middle."""
    sure, possible = [], []
    for one in candidates:
        if where == "middle":
            off = max(abs(depth(scene, one, "left") - 0.5), abs(depth(scene, one, "top") - 0.5))
            inside, perhaps = off <= MIDDLE_SURE, off <= MIDDLE_POSSIBLE
        else:
            off = max(depth(scene, one, side) for side in where.split()) - 0.5
            inside, perhaps = off <= -SIDE_BAND, off < SIDE_BAND
        if inside:
            sure.append(one)
        if perhaps:
            possible.append(one)
    return Resolution(_ids(sure), _ids(possible))


def _pick_of_two(scene: Scene, candidates: list[SceneObject], where: str) -> Resolution:
    """The one of two objects on a side: people compare the two, wherever they are."""
    first, second = sorted(candidates, key=lambda one: depth(scene, one, where))
    lead = depth(scene, second, where) - depth(scene, first, where)
    if lead < PAIR_GAP:
        return Resolution(frozenset(), _ids(candidates))
    on_side = depth(scene, first, where) < 0.5 + SIDE_BAND
    return Resolution(_ids([first] if on_side else []), _ids([first]))


def _pick_extreme(scene: Scene, candidates: list[SceneObject], where: str) -> Resolution:
    """The object furthest to a side, at least as far as the middle of the image."""
    if not candidates:
        return Resolution(frozenset(), frozenset())
    nearest = min(depth(scene, one, where) for one in candidates)
    close = [one for one in candidates if depth(scene, one, where) < nearest + EXTREME_GAP]
    clear = len(close) == 1 and len(candidates) > 1 and nearest < 0.5
    return Resolution(_ids(close if clear else []), _ids(close))


def _pick_ordinal(scene: Scene, candidates: list[SceneObject], pick: Pick) -> Resolution:
    """The rank-th of at least three objects, counted from a side."""
    row = sorted(candidates, key=lambda one: depth(scene, one, pick.where))
    depths = [depth(scene, one, pick.where) for one in row]
    counted = depths[: pick.rank + 1]
    apart = all(b - a >= ORDINAL_GAP for a, b in pairwise(counted))
    if len(row) < max(3, pick.rank) or not apart:
        return Resolution(frozenset(), _ids(row))
    chosen = _ids([row[pick.rank - 1]])
    return Resolution(chosen, chosen)


def _pick_size(candidates: list[SceneObject], where: str) -> Resolution:
    """The biggest or smallest of several objects: another size class and another box area."""
    sign = 1 if where == "large" else -1

    def leads(one: SceneObject, other: SceneObject) -> bool:
        further = sign * (SIZES.index(one.size) - SIZES.index(other.size)) > 0
        big, small = (one, other) if sign > 0 else (other, one)
        return further and _box_area(big) >= SUPERLATIVE_RATIO * _box_area(small)

    for one in candidates:
        others = [other for other in candidates if other.id != one.id]
        readable = all(other.visible >= SIZE_VISIBLE for other in candidates)
        if others and readable and all(leads(one, other) for other in others):
            return Resolution(_ids([one]), _ids([one]))
    return Resolution(frozenset(), _ids(candidates))


def _box_area(one: SceneObject) -> float:
    x1, y1, x2, y2 = one.box
    return (x2 - x1) * (y2 - y1)


# --- relations ---------------------------------------------------------------------------------


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
    # People would not say "left of" an object that covers half of this one.
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
