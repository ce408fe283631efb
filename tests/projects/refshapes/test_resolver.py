"""The resolver keeps its margins: what is close to a boundary is ambiguous."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_scenes import random_scene

from refshapes.resolver import (
    CORNERS,
    RELATION_KINDS,
    SIDES,
    Description,
    Pick,
    Relation,
    Resolution,
    context_ids,
    relation_holds,
    resolve,
)
from refshapes.scene import COLORS, Scene, SceneObject
from vlnms_d2.data.datasets.refshapes import CATEGORIES


def thing(number, x, y, half=20, category="cup", **looks) -> SceneObject:
    """An object around (x, y) in an image of 400 x 300 pixels."""
    known = {"color": "red", "pattern": "plain", "size": "medium", "visible": 1.0} | looks
    box = (x - half, y - half, x + half, y + half)
    return SceneObject(number, category, box=box, segmentation=(), area=4.0 * half**2, **known)


def scene(*objects: SceneObject) -> Scene:
    return Scene(1, "train", 400, 300, objects)


def meant(objects, pick=None, **looks) -> tuple[set[int], set[int]]:
    found = resolve(scene(*objects), Description("cup", pick=pick, **looks))
    return set(found.sure), set(found.possible)


def test_looks_select():
    objects = [thing(1, 50, 50), thing(2, 150, 50, color="blue"), thing(3, 250, 50, category="key")]
    assert meant(objects) == ({1, 2}, {1, 2})
    assert meant(objects, color="blue") == ({2}, {2})
    assert meant(objects, pattern="striped") == (set(), set())


def test_the_size_of_a_mostly_covered_object_cannot_be_told():
    objects = [thing(1, 50, 50, size="small"), thing(2, 150, 50, size="large", visible=0.4)]
    assert meant(objects, size="small") == ({1}, {1, 2})
    assert meant(objects, pick=Pick("size", "small")) == (set(), {1, 2})


def test_hidden_needs_a_clear_share_covered():
    objects = [thing(1, 50, 50, visible=0.6), thing(2, 150, 50, visible=0.8), thing(3, 250, 50)]
    assert meant(objects, hidden=True) == ({1}, {1, 2})


@pytest.mark.parametrize(
    ("xs", "sure", "possible"),
    [
        ((100, 300), {1}, {1}),  # one on each side
        ((100, 195, 300), {1}, {1, 2}),  # the second is about in the middle
        ((100, 120, 300), {1, 2}, {1, 2}),  # two on the left
        ((100, 160), {1}, {1}),  # of two, the one further left
        ((100, 130), set(), {1, 2}),  # too close to compare
        ((260, 360), set(), {1}),  # neither is on the left
        ((100,), {1}, {1}),
        ((300,), set(), set()),
    ],
)
def test_left(xs, sure, possible):
    objects = [thing(number, x, 150) for number, x in enumerate(xs, 1)]
    assert meant(objects, pick=Pick("side", "left")) == (sure, possible)


def test_corners_and_the_middle_are_parts_of_the_image():
    objects = [thing(1, 60, 60), thing(2, 340, 60), thing(3, 200, 150), thing(4, 60, 140)]
    assert meant(objects, pick=Pick("side", "top left")) == ({1}, {1, 3, 4})
    assert meant(objects, pick=Pick("side", "bottom right")) == (set(), {3})
    assert meant(objects, pick=Pick("side", "middle")) == ({3}, {3})


def test_extreme_needs_a_lead():
    far, near = thing(1, 40, 150), thing(2, 60, 50)
    assert meant([far, thing(3, 200, 50)], pick=Pick("extreme", "left")) == ({1}, {1})
    assert meant([far, near], pick=Pick("extreme", "left")) == (set(), {1, 2})
    assert meant([far], pick=Pick("extreme", "left")) == (set(), {1})
    assert meant([], pick=Pick("extreme", "left")) == (set(), set())


def test_ordinals_count_from_their_side_along_clear_gaps():
    row = [thing(number, x, 150) for number, x in enumerate((40, 120, 200, 280), 1)]
    assert meant(row, pick=Pick("ordinal", "left", 2)) == ({2}, {2})
    assert meant(row, pick=Pick("ordinal", "right", 2)) == ({3}, {3})
    assert meant(row, pick=Pick("ordinal", "left", 3)) == ({3}, {3})
    blurred = [thing(5, 50, 50), *row]
    assert meant(blurred, pick=Pick("ordinal", "left", 2)) == (set(), {1, 2, 3, 4, 5})
    assert meant(row[:2], pick=Pick("ordinal", "left", 2)) == (set(), {1, 2})


def test_the_biggest_is_of_another_class_and_takes_more_room():
    small, large = thing(1, 50, 50, 10, size="small"), thing(2, 150, 50, 30, size="large")
    assert meant([small, large], pick=Pick("size", "large")) == ({2}, {2})
    assert meant([small, large], pick=Pick("size", "small")) == ({1}, {1})
    narrow = replace(large, box=(140, 40, 160, 61))
    assert meant([small, narrow], pick=Pick("size", "large")) == (set(), {1, 2})


@pytest.mark.parametrize(
    ("kind", "x", "y", "sure", "possible"),
    [
        ("left_of", 100, 150, True, True),
        ("left_of", 150, 250, False, True),  # rather below than left
        ("left_of", 190, 20, False, False),
        ("left_of", 300, 150, False, False),
        ("right_of", 300, 150, True, True),
        ("above", 200, 60, True, True),
        ("below", 200, 240, True, True),
        ("below", 200, 60, False, False),
        ("beside", 250, 150, True, True),
        ("beside", 200, 200, False, True),  # near, but below
        ("near", 200, 200, True, True),
        ("near", 310, 150, False, True),
        ("near", 390, 150, False, False),
    ],
)
def test_relations_to_an_object_in_the_middle(kind, x, y, sure, possible):
    one, other = thing(1, x, y), thing(2, 200, 150, category="key")
    assert relation_holds(scene(one, other), kind, one, [other]) == (sure, possible)


def test_behind_needs_one_later_object_that_covers():
    one, other = thing(1, 100, 100, visible=0.7), thing(2, 120, 100, category="key")
    assert relation_holds(scene(one, other), "behind", one, [other]) == (True, True)
    assert relation_holds(scene(one, other), "in_front_of", other, [one]) == (True, True)
    assert relation_holds(scene(other, one), "behind", one, [other]) == (False, False)
    third = thing(3, 110, 110, category="hat")
    assert relation_holds(scene(one, other, third), "behind", one, [other]) == (False, True)
    whole = replace(one, visible=1.0)
    assert relation_holds(scene(whole, other), "behind", whole, [other]) == (False, True)


def test_between_is_about_halfway():
    ends = [thing(2, 60, 150, category="key"), thing(3, 340, 150, category="hat")]
    for x, y, sure, possible in (
        (200, 150, True, True),
        (110, 150, False, True),
        (200, 250, False, True),
        (200, 299, False, False),
        (20, 150, False, False),
    ):
        one = thing(1, x, y)
        assert relation_holds(scene(one, *ends), "between", one, ends) == (sure, possible)


def test_a_contextual_object_is_told_apart_or_refused():
    cups = [thing(1, 100, 150), thing(2, 300, 250)]
    keys = [thing(3, 160, 150, category="key"), thing(4, 380, 20, category="key")]
    left = Description("cup", relations=(Relation("left_of", (Description("key"),)),))
    assert resolve(scene(*cups, *keys[:1]), left) == Resolution(frozenset({1}), frozenset({1}))
    assert context_ids(scene(*cups, *keys[:1]), left, cups[0]) == (3,)
    # Left of two keys: which one is meant?
    row = scene(*cups, keys[0], replace(keys[1], box=(360, 130, 400, 170)))
    assert context_ids(row, left, cups[0]) is None
    near = Description("cup", relations=(Relation("near", (Description("key"),)),))
    assert context_ids(scene(cups[0], *keys), near, cups[0]) == (3,)
    twice = Description("cup", relations=near.relations * 2)
    assert context_ids(scene(cups[0], *keys), twice, cups[0]) is None


def test_meanings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="either a pick or relations"):
        near_key = Relation("near", (Description("key"),))
        Description("cup", pick=Pick("side", "left"), relations=(near_key,))
    with pytest.raises(ValueError, match="expected one of"):
        Relation("between", (Description("key"),))
    with pytest.raises(ValueError, match="Pick kind 'nearest'"):
        resolve(scene(thing(1, 50, 50)), Description("cup", pick=Pick("nearest", "left")))
    with pytest.raises(ValueError, match="Relation 'inside'"):
        relation_holds(scene(), "inside", thing(1, 50, 50), [thing(2, 60, 50)])


MIRRORED = {"left": "right", "right": "left", "left_of": "right_of", "right_of": "left_of"}


def picks():
    return st.one_of(
        st.builds(Pick, st.just("side"), st.sampled_from((*SIDES, *CORNERS, "middle"))),
        st.builds(Pick, st.just("extreme"), st.sampled_from(SIDES)),
        st.builds(Pick, st.just("ordinal"), st.sampled_from(SIDES), st.integers(2, 3)),
        st.builds(Pick, st.just("size"), st.sampled_from(("small", "large"))),
    )


def descriptions():
    looks = {
        "category": st.sampled_from(CATEGORIES),
        "color": st.none() | st.sampled_from(COLORS),
        "size": st.none() | st.sampled_from(("small", "large")),
        "hidden": st.booleans(),
    }
    plain = st.builds(Description, category=looks["category"], color=looks["color"])
    relation = st.builds(
        Relation,
        st.sampled_from([kind for kind in RELATION_KINDS if kind != "between"]),
        st.tuples(plain),
    )
    between = st.builds(Relation, st.just("between"), st.tuples(plain, plain))
    return st.one_of(
        st.builds(Description, **looks, pick=st.none() | picks()),
        st.builds(Description, **looks, relations=st.tuples(relation | between)),
    )


def mirror_scene(one: Scene) -> Scene:
    def flip(each: SceneObject) -> SceneObject:
        x1, y1, x2, y2 = each.box
        return replace(each, box=(one.width - x2, y1, one.width - x1, y2))

    return replace(one, objects=tuple(map(flip, one.objects)))


def mirror(meaning: Description) -> Description:
    pick = meaning.pick
    if pick is not None:
        where = " ".join(MIRRORED.get(word, word) for word in pick.where.split())
        pick = replace(pick, where=where)
    relations = tuple(
        replace(relation, kind=MIRRORED.get(relation.kind, relation.kind))
        for relation in meaning.relations
    )
    return replace(meaning, pick=pick, relations=relations)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), descriptions())
def test_what_is_sure_is_possible_and_a_mirror_swaps_left_and_right(seed, meaning):
    one = random_scene(seed)
    # Few categories occur: keep those of the scene, so that the sets are seldom empty.
    here = [each.category for each in one.objects]
    meaning = replace(meaning, category=here[seed % len(here)])
    found = resolve(one, meaning)
    assert found.sure <= found.possible <= {each.id for each in one.objects}
    assert resolve(mirror_scene(one), mirror(meaning)) == found
