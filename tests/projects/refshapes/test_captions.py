"""Captions name what they say, mean one object each, and read back as Flickr30k Entities."""

from __future__ import annotations

import pytest
from detectron2.data import DatasetCatalog
from random_scenes import random_scene, read

from refshapes.captions import (
    CAPTIONS,
    OBJECTS,
    PHRASE_TYPES,
    captions,
    read_scenes,
    write_captions,
)
from refshapes.resolver import resolve
from vlnms_d2.data.datasets.flickr30k import load_flickr30k_entities
from vlnms_d2.data.datasets.refshapes import CATEGORIES

SCENES = [random_scene(seed, image_id=seed + 1) for seed in range(25)]


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: str(scene.image_id))
def test_each_phrase_means_its_object_and_no_other(scene):
    made = captions(scene, seed=0)
    assert len(made) <= CAPTIONS
    for caption in made:
        assert 1 <= len(caption.mentions) <= max(OBJECTS)
        assert len({m.object_id for m in caption.mentions}) == len(caption.mentions)
        for mention in caption.mentions:
            assert resolve(scene, read(mention.text)).is_exactly(mention.object_id)
            assert mention.text.split()[0] in ("a", "an")


def test_they_follow_from_scene_and_seed_alone():
    assert captions(SCENES[0], 0) == captions(SCENES[0], 0)
    assert captions(SCENES[0], 0) != captions(SCENES[0], 1)


@pytest.fixture(scope="module")
def folder(tiny_refshapes, tmp_path_factory):
    root = DatasetCatalog.get(f"{tiny_refshapes}_val")[0]["file_name"].rsplit("/images/", 1)[0]
    out = tmp_path_factory.mktemp("entities")
    return root, out, write_captions(root, out, seed=0)


def test_the_files_read_back(folder):
    root, out, counts = folder
    scenes = {scene.image_id: scene for scene in read_scenes(root)}
    assert {"train", "val", "testA", "testB"} == set(counts)
    for split, count in counts.items():
        sentences = load_flickr30k_entities(out, out / "images", split, captions=True)
        phrases = load_flickr30k_entities(out, out / "images", split)
        assert sum(len(one["expressions"]) for one in sentences) == count
        for said, parts in zip(sentences, phrases, strict=True):
            scene = scenes[said["image_id"]]
            assert scene.split == split
            made = captions(scene, seed=0)
            assert [e["query"] for e in said["expressions"]] == [c.text for c in made]
            by_id = {a["id"]: a["bbox"] for a in parts["annotations"]}
            mentions = [m for caption in made for m in caption.mentions]
            objects = {one.id: one for one in scene.objects}
            for expression, mention in zip(parts["expressions"], mentions, strict=True):
                one = objects[mention.object_id]
                x1, y1, x2, y2 = one.box
                assert expression["query"] == mention.text
                assert by_id[expression["ann_id"]] == [x1, y1, x2 - x1, y2 - y1]
                assert expression["phrase_type"] == [PHRASE_TYPES.get(one.category, "other")]


def test_the_scenes_are_those_that_were_drawn(folder, tiny_refshapes):
    root, _, _ = folder
    scenes = {scene.image_id: scene for scene in read_scenes(root)}
    for one in DatasetCatalog.get(f"{tiny_refshapes}_val"):
        objects = scenes[one["image_id"]].objects
        assert [o.id for o in objects] == [a["id"] for a in one["annotations"]]
        assert [CATEGORIES.index(o.category) for o in objects] == [
            a["category_id"] for a in one["annotations"]
        ]
    with pytest.raises(FileNotFoundError, match="make_refshapes"):
        list(read_scenes(root + "/nowhere"))


def test_the_same_bytes_again(folder, tmp_path):
    root, out, counts = folder
    assert write_captions(root, tmp_path, seed=0) == counts
    for path in out.rglob("*.*"):
        assert (tmp_path / path.relative_to(out)).read_bytes() == path.read_bytes()
