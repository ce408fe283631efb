"""COCO without the images of REFER's val and test, to train detectors on, and those images."""

import json

import pytest
from dataset_folders import (
    COCO_IDS,
    KARPATHY_COCO_IDS,
    coco_file_name,
    dump_python2,
    make_coco_annotations,
    make_refer_folder,
)
from detectron2.data import DatasetCatalog, MetadataCatalog

from vlnms_d2.data import register_all
from vlnms_d2.data.builtin import refer_val_test_images

KEPT, LEFT_OUT = "coco_2014_trainval_without_refer", "coco_2014_refer_val_test"
VAL2014 = set(KARPATHY_COCO_IDS[2:])

# Who split which set -> the splits of its refs by image, in the order of COCO_IDS.
SPLITS = {
    # The second object of the first image is in val.
    "refcoco/refs(unc).p": [("train", "val"), ("train",), ("train",), (), ()],
    "refcoco+/refs(unc).p": [("train",), ("testB",), (), ("train",), ()],
    "refcocog/refs(umd).p": [(), (), (), ("test",), ("train",)],
    # By object, so that their images are in train too.
    "refcoco/refs(google).p": [("val",), (), (), (), ("test",)],
    "refcocog/refs(google).p": [(), (), ("val",), (), ()],
}
EXPECTED = {COCO_IDS[0], COCO_IDS[1], COCO_IDS[3]}


@pytest.fixture
def root(tmp_path):
    make_refer_folder(tmp_path)
    make_coco_annotations(tmp_path)
    for path, splits in SPLITS.items():
        refs = [
            {"image_id": image_id, "split": split}
            for image_id, of_image in zip(COCO_IDS, splits, strict=True)
            for split in of_image
        ]
        dump_python2(refs, tmp_path / "refer" / path)
    register_all(tmp_path, prefix="left_")
    yield tmp_path
    for name in [name for name in DatasetCatalog.list() if name.startswith("left_")]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_images_of_val_and_test_of_any_of_the_three_are_left_out(root):
    assert refer_val_test_images(root) == EXPECTED
    kept, left_out = (DatasetCatalog.get(f"left_{name}") for name in (KEPT, LEFT_OUT))
    assert {image["image_id"] for image in left_out} == EXPECTED
    ids = [image["image_id"] for image in kept]
    assert sorted(ids) == sorted((set(COCO_IDS) | VAL2014) - EXPECTED)
    assert MetadataCatalog.get(f"left_{KEPT}").refer_val_test_images == sorted(EXPECTED)


def test_they_are_what_detectron2_makes_of_the_annotations(root):
    for name in (KEPT, LEFT_OUT):
        images = DatasetCatalog.get(f"left_{name}")
        metadata = MetadataCatalog.get(f"left_{name}")
        assert metadata.evaluator_type == "coco"
        assert metadata.thing_classes == ["person", "dog", "cup", "toothbrush"]
        category_of = {n: i for i, n in metadata.thing_dataset_id_to_contiguous_id.items()}
        for image in images:
            split = "val2014" if image["image_id"] in VAL2014 else "train2014"
            file_name = root / "coco" / split / coco_file_name(image["image_id"], split)
            assert image["file_name"] == str(file_name)
            annotations = root / "coco" / "annotations" / f"instances_{split}.json"
            expected = {
                (tuple(a["bbox"]), a["category_id"], a["iscrowd"])
                for a in json.loads(annotations.read_text())["annotations"]
                if a["image_id"] == image["image_id"]
            }
            assert len(expected) == 3 == len(image["annotations"])
            assert expected == {
                (tuple(a["bbox"]), category_of[a["category_id"]], a["iscrowd"])
                for a in image["annotations"]
            }
            assert all(a["segmentation"] for a in image["annotations"])


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("refer/refcocog/refs(umd).p", "github.com/lichengunc/refer"),
        ("coco/annotations/instances_val2014.json", "cocodataset.org"),
        (f"coco/train2014/{coco_file_name(COCO_IDS[2])}", "cocodataset.org"),
    ],
)
def test_what_is_missing_is_named_with_its_source(root, path, source):
    (root / path).unlink()
    with pytest.raises(FileNotFoundError) as raised:
        DatasetCatalog.get(f"left_{KEPT}")
    assert str(root / path) in str(raised.value) and source in str(raised.value)


def test_the_plugin_registers_them():
    assert {KEPT, LEFT_OUT} <= set(DatasetCatalog.list())
