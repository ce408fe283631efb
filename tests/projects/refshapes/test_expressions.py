"""Expressions mean their referent and nothing else, follow their style and their seed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from killing import exit_code
from random_scenes import random_scene, read

from refshapes.expressions import write_expressions
from refshapes.lexicon import LOCATION_WORDS, words
from refshapes.phrasing import WORDS_ALLOWED
from refshapes.resolver import context_ids, resolve
from vlnms_d2.data.datasets.refer import load_plain_pickle
from vlnms_d2.data.datasets.refshapes import CATEGORIES, STYLES

SCENES = {
    number: random_scene(number, image_id=number, crowd=None if number % 4 else 16)
    for number in range(1, 201)
}
SEED = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("refshapes")
    write_expressions(list(SCENES.values()), out, SEED)
    return out


@pytest.fixture(scope="module")
def refs(folder) -> dict[str, list[dict]]:
    return {style: load_plain_pickle(folder / f"refs({style}).p") for style in STYLES}


@pytest.fixture(scope="module")
def sidecar(folder) -> dict:
    return json.loads((folder / "contexts.json").read_text())


def sentences(refs: dict[str, list[dict]], style: str) -> list[tuple[dict, dict]]:
    return [(ref, sentence) for ref in refs[style] for sentence in ref["sentences"]]


@pytest.mark.parametrize("style", STYLES)
def test_reading_a_sentence_back_gives_its_referent_and_its_context_alone(style, refs, sidecar):
    for ref, sentence in sentences(refs, style):
        sent_id = str(sentence["sent_id"])
        meaning = read(sidecar["misspelt"].get(sent_id, sentence["sent"]))
        scene = SCENES[ref["image_id"]]
        referent = next(one for one in scene.objects if one.id == ref["ann_id"])
        assert resolve(scene, meaning).is_exactly(referent.id), sentence["sent"]
        assert list(context_ids(scene, meaning, referent)) == sidecar["contexts"][sent_id]


def test_words_of_place_are_true_of_plain_coordinates(refs, sidecar):
    """Without the resolver: centres alone."""
    axis = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}
    directions = {"left_of": "left", "right_of": "right", "above": "top", "below": "bottom"}
    checked = 0
    for style in STYLES:
        for ref, sentence in sentences(refs, style):
            sent_id = str(sentence["sent_id"])
            meaning = read(sidecar["misspelt"].get(sent_id, sentence["sent"]))
            objects = {one.id: one for one in SCENES[ref["image_id"]].objects}
            referent = objects[ref["ann_id"]]
            named = iter(sidecar["contexts"][sent_id])
            for relation in meaning.relations:
                others = [objects[next(named)] for _ in relation.targets]
                if relation.kind in directions:
                    at, sign = axis[directions[relation.kind]]
                    assert sign * (others[0].center[at] - referent.center[at]) > 0
                    checked += 1
            if meaning.pick is not None and meaning.pick.kind in ("side", "extreme"):
                alike = [
                    one
                    for one in objects.values()
                    if one.category == meaning.category
                    and meaning.color in (None, one.color)
                    and meaning.pattern in (None, one.pattern)
                    and meaning.size in (None, one.size)
                ]
                for side in meaning.pick.where.split():
                    if side in axis and " " not in meaning.pick.where:
                        at, sign = axis[side]
                        assert referent == min(alike, key=lambda one: sign * one.center[at])
                        checked += 1
    assert checked > 300


@pytest.mark.parametrize("style", STYLES)
def test_sentences_follow_their_style(style, refs):
    fewest, most = WORDS_ALLOWED[style]
    for _, sentence in sentences(refs, style):
        assert sentence["tokens"] == sentence["sent"].split()
        assert fewest <= len(sentence["tokens"]) <= most
        assert sentence["sent"] == sentence["sent"].lower()
        assert sentence["raw"].lower().rstrip(".") == sentence["sent"]
        if style == "refcoco+":
            assert not LOCATION_WORDS & set(sentence["tokens"]), sentence["sent"]


def test_lengths_and_contexts_differ_by_style_as_in_the_data_sets(refs, sidecar):
    length, context = {}, {}
    for style in STYLES:
        of_style = [sentence for _, sentence in sentences(refs, style)]
        length[style] = sum(len(one["tokens"]) for one in of_style) / len(of_style)
        named = sum(bool(sidecar["contexts"][str(one["sent_id"])]) for one in of_style)
        context[style] = named / len(of_style)
        assert 5 <= len(of_style) / len(SCENES) <= 7
    assert 3 < length["refcoco"] < 4.5 and 3 < length["refcoco+"] < 4.5
    assert 8 < length["refcocog"] < 13
    assert 0.1 < context["refcoco"] < 0.3 and 0.1 < context["refcoco+"] < 0.3
    assert context["refcocog"] > 0.8


def test_a_few_sentences_are_misspelt_in_one_word_that_is_no_other(refs, sidecar):
    written = {
        str(sentence["sent_id"]): sentence["tokens"]
        for style in STYLES
        for _, sentence in sentences(refs, style)
    }
    assert 0.015 < len(sidecar["misspelt"]) / len(written) < 0.05
    for sent_id, meant in sidecar["misspelt"].items():
        wrong = [a for a, b in zip(written[sent_id], meant.split(), strict=True) if a != b]
        assert len(wrong) == 1 and wrong[0] not in words()


def test_refs_have_the_keys_of_refer_and_ids_of_their_own(refs):
    ref_ids, sent_ids = [], []
    for style in STYLES:
        for ref in refs[style]:
            scene = SCENES[ref["image_id"]]
            referent = next(one for one in scene.objects if one.id == ref["ann_id"])
            assert ref["category_id"] == CATEGORIES.index(referent.category) + 1
            assert ref["split"] == scene.split
            assert ref["file_name"] == f"refshapes_{scene.image_id:06d}.jpg"
            assert ref["sent_ids"] == [one["sent_id"] for one in ref["sentences"]]
            texts = [one["sent"] for one in ref["sentences"]]
            assert 1 <= len(texts) <= 3 and len(set(texts)) == len(texts)
            ref_ids.append(ref["ref_id"])
            sent_ids.extend(ref["sent_ids"])
        per_image = [(ref["image_id"], ref["ann_id"]) for ref in refs[style]]
        assert len(set(per_image)) == len(per_image)
    assert len(set(ref_ids)) == len(ref_ids) and len(set(sent_ids)) == len(sent_ids)


def test_what_catches_the_eye_is_a_referent_more_often_but_not_alone(refs):
    objects = {one.id: one for scene in SCENES.values() for one in scene.objects}
    referents = [objects[ref["ann_id"]] for style in STYLES for ref in refs[style]]

    def rate(test) -> float:
        return sum(map(test, referents)) / sum(map(test, objects.values()))

    small, medium, large = (
        rate(lambda one, size=size: one.size == size) for size in ("small", "medium", "large")
    )
    assert 0 < small < medium < large < 6 * small
    hidden, shown = rate(lambda one: one.visible < 0.7), rate(lambda one: one.visible > 0.95)
    assert 0 < hidden < shown / 2


def digest(folder: Path) -> str:
    whole = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        whole.update(path.name.encode() + path.read_bytes())
    return whole.hexdigest()


def test_the_same_seed_gives_the_same_bytes_in_any_process_and_order(tmp_path):
    scenes = [SCENES[number] for number in range(1, 21)]
    write_expressions(scenes, tmp_path / "here", SEED)
    # Another process orders sets differently.
    assert exit_code(write_expressions, scenes[::-1], tmp_path / "there", SEED) == 0
    assert digest(tmp_path / "here") == digest(tmp_path / "there")
    write_expressions(scenes, tmp_path / "other", SEED + 1)
    assert digest(tmp_path / "here") != digest(tmp_path / "other")


def test_the_sentences_of_an_image_do_not_depend_on_the_other_images(refs, tmp_path):
    write_expressions([SCENES[5]], tmp_path, SEED)
    for style in STYLES:
        alone = load_plain_pickle(tmp_path / f"refs({style}).p")
        together = [ref for ref in refs[style] if ref["image_id"] == 5]
        assert [s["sent"] for ref in alone for s in ref["sentences"]] == [
            s["sent"] for ref in together for s in ref["sentences"]
        ]


def test_objects_that_look_and_lie_alike_get_no_expression(tmp_path):
    one = replace(SCENES[1].objects[0], visible=1.0)
    scene = replace(SCENES[1], objects=(one, replace(one, id=999)))
    counts = write_expressions([scene], tmp_path, SEED)
    assert counts == dict.fromkeys(STYLES, 0)
    assert load_plain_pickle(tmp_path / "refs(refcoco).p") == []


def test_two_scenes_of_one_image_id_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Image id 1 belongs to two scenes"):
        write_expressions([SCENES[1], SCENES[1]], tmp_path, SEED)
