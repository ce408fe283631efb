"""Karpathy's splits become standard dataset dicts, or an error says what is wrong where."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from dataset_folders import (
    COCO_IDS,
    FLICKR_IDS,
    make_coco_annotations,
    make_karpathy_folder,
    sentence,
    write_karpathy,
)

from vlnms_d2.data.datasets.karpathy import load_karpathy

SOURCE = "cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"


@pytest.fixture(params=["flickr30k", "coco"])
def which(request) -> str:
    return request.param


@pytest.fixture
def file(tmp_path, which) -> Path:
    make_karpathy_folder(tmp_path, which)
    return tmp_path / "karpathy" / f"dataset_{which}.json"


def entry(number: int, *sentences: dict, **more) -> dict:
    return {
        "imgid": number,
        "filename": f"{100 - number}.jpg",
        "split": "val",
        "sentids": [one["sentid"] for one in sentences],
        "sentences": list(sentences),
        **more,
    }


def load_entries(tmp_path, *entries: dict, split: str = "val") -> list[dict]:
    write_karpathy(tmp_path / "dataset.json", entries, "made")
    return load_karpathy(tmp_path / "dataset.json", "images", split)


def test_images_of_flickr30k_have_flickrs_numbers(tmp_path):
    make_karpathy_folder(tmp_path, "flickr30k")
    images = load_karpathy(tmp_path / "karpathy" / "dataset_flickr30k.json", "images", "test")
    assert [image["image_id"] for image in images] == list(FLICKR_IDS[3:])
    assert images[0] == {
        "file_name": str(Path("images", "65567.jpg")),
        "image_id": 65567,
        "annotations": [],
        "expressions": [
            {"sent_id": 6, "ref_id": None, "query": "A red cup, left of the dog .",
             "ann_id": None, "context_ann_ids": None, "split": "test", "manner": None},
            {"sent_id": 7, "ref_id": None, "query": "Ein blauer Hut für zwei.",
             "ann_id": None, "context_ann_ids": None, "split": "test", "manner": None},
        ],
    }  # fmt: skip


def test_images_of_coco_have_cocos_ids_and_folders(tmp_path):
    make_karpathy_folder(tmp_path, "coco")
    file = tmp_path / "karpathy" / "dataset_coco.json"
    train = load_karpathy(file, "coco", "train")
    assert [image["image_id"] for image in train] == list(COCO_IDS[:2])
    assert train[0]["file_name"] == str(Path("coco/train2014/COCO_train2014_000000000009.jpg"))
    (restval,) = load_karpathy(file, "coco", "restval")
    assert restval["file_name"] == str(Path("coco/val2014/COCO_val2014_000000000139.jpg"))


def test_images_of_coco_have_the_objects_of_its_annotations(tmp_path):
    make_karpathy_folder(tmp_path, "coco")
    make_coco_annotations(tmp_path)
    folder = tmp_path / "coco" / "annotations"
    train_file, val_file = (folder / f"instances_{split}2014.json" for split in ("train", "val"))
    entries = json.loads(train_file.read_text())
    # Sticks out of its image of 80 x 60 pixels, and lies beside it.
    entries["annotations"][0]["bbox"] = [70, 50, 30, 30]
    entries["annotations"][1]["bbox"] = [90, 10, 5, 5]
    train_file.write_text(json.dumps(entries))
    classes = {1: 0, 18: 1, 47: 2, 90: 3}

    def objects(split: str, *files) -> dict[int, list]:
        images = load_karpathy(
            tmp_path / "karpathy/dataset_coco.json", "coco", split, files, classes
        )
        return {
            image["image_id"]: [
                (a["id"], a["category_id"], a["bbox"], a["iscrowd"]) for a in image["annotations"]
            ]
            for image in images
        }

    assert objects("train") == objects("train", val_file) == {9: [], 25: []}
    assert objects("train", train_file, val_file) == {
        9: [(1, 1, [70, 50, 10, 10], 0), (3, 3, [10, 30, 40, 20], 1)],
        25: [
            (11, 2, [0, 0, 30.5, 40.25], 0),
            (12, 3, [45, 20, 35, 25], 0),
            (13, 0, [10, 30, 40, 20], 1),
        ],
    }
    # restval, which is trained on too, is of val2014.
    assert [len(one) for one in objects("restval", train_file, val_file).values()] == [3]
    assert objects("test", train_file, folder / "absent.json") == {632: []}
    image = load_karpathy(
        tmp_path / "karpathy/dataset_coco.json", "coco", "val", [val_file], classes
    )[0]
    assert image["annotations"] and all("segmentation" not in a for a in image["annotations"])


def test_images_are_in_the_order_of_the_file(tmp_path):
    # COCO's folds of 1,000 images are consecutive ones of the file.
    entries = [entry(n, sentence(n, n, "a dog"), cocoid=i) for n, i in enumerate((7, 900, 3, 12))]
    assert [image["image_id"] for image in load_entries(tmp_path, *entries)] == [7, 900, 3, 12]


def test_other_files_have_karpathys_numbers(tmp_path):
    entries = [
        entry(0, sentence(0, 0, "a dog"), filename="2513260012_03d33305cf.jpg"),
        entry(1, sentence(1, 1, "a cat"), filename="17.jpg"),
    ]
    assert [image["image_id"] for image in load_entries(tmp_path, *entries)] == [0, 1]


def test_sentences_and_images_without_words_are_left_out(tmp_path, caplog):
    entries = [
        entry(0, sentence(0, 0, " \n"), {"sentid": 1, "tokens": ["a", "cat", ""]}),
        entry(1, {"sentid": 2}),
        entry(2),
    ]
    (image,) = load_entries(tmp_path, *entries)
    assert [(e["sent_id"], e["query"]) for e in image["expressions"]] == [(1, "a cat")]
    assert "image number 0: left out sentence 0, which has no words" in caplog.text
    assert "image number 1: left out sentence 2" in caplog.text


def test_a_missing_file_is_named_with_its_source(file):
    file.unlink()
    with pytest.raises(FileNotFoundError) as raised:
        load_karpathy(file, "images", "val")
    assert str(file) in str(raised.value) and SOURCE in str(raised.value)


def test_a_broken_file_is_named_with_its_source(file):
    file.write_text(file.read_text()[:-9])
    with pytest.raises(ValueError, match=r"not valid JSON .*cut short") as raised:
        load_karpathy(file, "images", "val")
    assert str(file) in str(raised.value) and SOURCE in str(raised.value)


def test_an_unknown_split_lists_the_available_ones(file, which):
    known = {"flickr30k": "test, train, val", "coco": "restval, test, train, val"}[which]
    with pytest.raises(ValueError, match=f"no image of the split 'testA', .* splits: {known}"):
        load_karpathy(file, "images", "testA")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"filename": ...}, r"dataset\.json: image number 1 has no 'filename', expected a string"),
        ({"split": 3}, r"image number 1: 'split' is 3, expected a string"),
        ({"imgid": "1"}, r"image number 1: 'imgid' is '1', expected an integer"),
        ({"sentences": {}}, r"image number 1: 'sentences' is \{\}, expected a list"),
        ({"sentences": ["a dog"]}, r"image number 1, sentence number 0 is str, expected"),
        ({"sentences": [{"raw": "x"}]}, r"image number 1, sentence number 0 has no 'sentid'"),
        ({"sentences": [sentence(0, 1, "x")]}, r"image number 1, .*'sentid' 0 is used twice"),
        ({"filepath": 7}, r"image number 1: 'filepath' is 7, expected a string"),
        (
            {"cocoid": 7},
            r"image number 0 has no 'cocoid', expected an integer as in image number 1",
        ),
        ({"filename": "100.jpg"}, r"image number 1: the id 100 is used twice"),
    ],
)
def test_damaged_entries(tmp_path, change, message):
    bad = {**entry(1, sentence(1, 1, "a cat")), **change}
    bad = {key: value for key, value in bad.items() if value is not ...}
    with pytest.raises(ValueError, match=message):
        load_entries(tmp_path, entry(0, sentence(0, 0, "a dog")), bad)


def test_files_of_another_kind(tmp_path):
    path = tmp_path / "dataset.json"
    for content, message in (([], "expected a JSON object, found list"), ({}, "has no 'images'")):
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            load_karpathy(path, "images", "val")
