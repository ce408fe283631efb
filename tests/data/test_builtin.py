"""The RefShapes data sets that importing the plugin registers."""

import os
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

import vlnms_d2  # noqa: F401
from refshapes.expressions import write_expressions
from refshapes.writer import Settings, write_annotations, write_images
from vlnms_d2.data import builtin, register_refshapes
from vlnms_d2.data.datasets.refshapes import CATEGORIES

SPLITS = ("train", "val", "testA", "testB")
MANNERS = ("refcoco", "refcoco+", "refcocog")


def names(first: str) -> list[str]:
    kinds = ["", "instances_", "referents_", *(f"{manner}_" for manner in MANNERS)]
    return [f"{first}_{kind}{split}" for kind in kinds for split in SPLITS]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """RefShapes with two images a split, registered as `builtin`."""
    out = tmp_path_factory.mktemp("builtin")
    scenes = write_images(out, Settings(5, 320, 240, (2, 2, 2, 2)), workers=1)
    write_annotations(out, scenes)
    write_expressions(scenes, out, seed=5)
    register_refshapes(out, name="builtin")
    yield out
    for name in names("builtin"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_importing_the_plugin_registers_refshapes():
    assert set(names("refshapes")) <= set(DatasetCatalog.list())


def test_of_the_referents_alone_the_contexts_are_withheld_and_nothing_else(root):
    whole, withheld = (DatasetCatalog.get(f"builtin_{kind}train") for kind in ("", "referents_"))
    assert any(e["context_ann_ids"] for image in whole for e in image["expressions"])
    for image in whole:
        for expression in image["expressions"]:
            expression["context_ann_ids"] = None
    assert withheld == whole


def test_registering_reads_nothing(tmp_path):
    register_refshapes(tmp_path / "nowhere", name="absent")
    try:
        with pytest.raises(FileNotFoundError, match=str(tmp_path / "nowhere")):
            DatasetCatalog.get("absent_val")
    finally:
        for name in names("absent"):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


@pytest.mark.parametrize("split", SPLITS)
def test_the_data_set_of_a_split_has_the_expressions_of_all_manners(root, split):
    images = DatasetCatalog.get(f"builtin_{split}")
    first = 1 + 2 * SPLITS.index(split)
    assert [image["image_id"] for image in images] == [first, first + 1]
    for image in images:
        assert Path(image["file_name"]).is_file()
        assert {e["manner"] for e in image["expressions"]} == set(MANNERS)
        assert {e["split"] for e in image["expressions"]} == {split}
        known = {a["id"] for a in image["annotations"]}
        for e in image["expressions"]:
            assert e["ann_id"] in known and set(e["context_ann_ids"]) <= known
            assert e["query"]


def test_the_data_set_of_a_manner_has_its_part_of_them(root):
    everything = DatasetCatalog.get("builtin_val")
    parts = [DatasetCatalog.get(f"builtin_{manner}_val") for manner in MANNERS]
    for manner, part in zip(MANNERS, parts, strict=True):
        assert {e["manner"] for image in part for e in image["expressions"]} == {manner}
    sent_ids = [e["sent_id"] for part in parts for image in part for e in image["expressions"]]
    assert len(sent_ids) == sum(len(image["expressions"]) for image in everything)


def test_the_instances_of_a_split_are_a_plain_detection_data_set(root):
    images = DatasetCatalog.get("builtin_instances_testB")
    assert [image["image_id"] for image in images] == [7, 8]
    assert all(Path(image["file_name"]).is_file() for image in images)
    assert "expressions" not in images[0]
    for a in images[0]["annotations"]:
        assert 0 <= a["category_id"] < len(CATEGORIES) and a["segmentation"]


def test_metadata_say_how_to_evaluate(root):
    DatasetCatalog.get("builtin_instances_val")
    detection, grounding = (
        MetadataCatalog.get("builtin_instances_val"),
        MetadataCatalog.get("builtin_val"),
    )
    assert detection.evaluator_type == "coco"
    assert grounding.evaluator_type == "refer"
    assert grounding.thing_classes == detection.thing_classes == list(CATEGORIES)


def test_the_folder_of_the_data_sets_is_detectron2s(monkeypatch):
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    assert builtin.datasets_root() == Path("datasets")
    monkeypatch.setenv("DETECTRON2_DATASETS", os.path.join("~", "data"))
    monkeypatch.setenv("HOME", "/home/someone")
    assert builtin.datasets_root() == Path("/home/someone/data")
