"""REFER files become standard dataset dicts, or an error says what is wrong where."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import re
from pathlib import Path

import pytest

from vlnms_d2.data.datasets.refer import XYWH_ABS, load_refer, merge_by_image


def sentence(sent_id: int, text: str) -> dict:
    return {"sent_id": sent_id, "sent": text, "raw": text.capitalize(), "tokens": text.split()}


def ref(ref_id: int, ann_id: int, image_id: int, split: str, *sentences: dict) -> dict:
    return {
        "ref_id": ref_id,
        "ann_id": ann_id,
        "category_id": 3,
        "image_id": image_id,
        "file_name": f"image_{image_id}_{ann_id}.jpg",
        "split": split,
        "sent_ids": [one["sent_id"] for one in sentences],
        "sentences": list(sentences),
    }


REFS = [
    ref(1, 21, 2, "train", sentence(11, "red cup"), sentence(12, "cup on left")),
    ref(2, 10, 1, "train", sentence(13, "key next to ball")),
    ref(3, 30, 3, "val", sentence(14, "big house")),
]
SQUARE = [[10, 10, 40, 10, 40, 60, 10, 60]]
INSTANCES = {
    "images": [
        {"id": i, "file_name": f"image_{i}.jpg", "height": 100, "width": 120} for i in (2, 1, 3, 4)
    ],
    "annotations": [
        {"id": 20, "image_id": 2, "bbox": [0, 0, 5, 5], "category_id": 18, "iscrowd": 1},
        {"id": 21, "image_id": 2, "bbox": [10, 10, 30, 50], "category_id": 3,
         "segmentation": SQUARE, "area": 1500.0, "iscrowd": 0},
        {"id": 10, "image_id": 1, "bbox": [10.5, 10, 30, 50], "category_id": 3},
        {"id": 11, "image_id": 1, "bbox": [50, 10, 30, 50], "category_id": 1},
        {"id": 30, "image_id": 3, "bbox": [10, 10, 30, 50], "category_id": 3},
    ],
    "categories": [
        {"id": 18, "name": "dog"}, {"id": 1, "name": "person"}, {"id": 3, "name": "car"},
    ],
}  # fmt: skip
CONTEXTS = {"version": 1, "contexts": {"11": [], "12": [20], "13": [11], "14": []}}


@pytest.fixture
def files(tmp_path):
    """Writes the files with changes; returns the arguments of `load_refer`."""

    def write(refs=REFS, instances=INSTANCES, contexts=CONTEXTS) -> dict:
        (tmp_path / "refs(unc).p").write_bytes(pickle.dumps(refs, 2))
        (tmp_path / "instances.json").write_text(json.dumps(instances))
        (tmp_path / "contexts.json").write_text(json.dumps(contexts))
        return {
            "refs_file": tmp_path / "refs(unc).p",
            "instances_file": tmp_path / "instances.json",
            "image_root": tmp_path / "images",
        }

    return write


def changed(content, *path_and_value):
    """A copy with the value set, or with the key removed if the value is `...`."""
    *path, value = path_and_value
    content = copy.deepcopy(content)
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return content


def test_images_of_the_split_with_annotations_and_expressions(files, tmp_path):
    first, second = load_refer(**files(), split="train", manner="refcoco")
    assert [first["image_id"], second["image_id"]] == [1, 2]
    assert second == {
        "file_name": str(tmp_path / "images" / "image_2.jpg"),
        "image_id": 2,
        "height": 100,
        "width": 120,
        "annotations": [
            {"id": 20, "bbox": [0, 0, 5, 5], "bbox_mode": XYWH_ABS, "category_id": 2,
             "iscrowd": 1},
            {"id": 21, "bbox": [10, 10, 30, 50], "bbox_mode": XYWH_ABS, "category_id": 1,
             "iscrowd": 0, "segmentation": SQUARE, "area": 1500.0},
        ],
        "expressions": [
            {"sent_id": 11, "ref_id": 1, "query": "red cup", "ann_id": 21,
             "context_ann_ids": None, "split": "train", "manner": "refcoco"},
            {"sent_id": 12, "ref_id": 1, "query": "cup on left", "ann_id": 21,
             "context_ann_ids": None, "split": "train", "manner": "refcoco"},
        ],
    }  # fmt: skip
    assert first["annotations"][0]["bbox"] == [10.5, 10, 30, 50]


def test_the_box_mode_is_that_of_detectron2():
    structures = pytest.importorskip("detectron2.structures")
    assert structures.BoxMode.XYWH_ABS == XYWH_ABS


def test_given_classes_are_used_and_the_files_categories_are_not_read(files):
    instances = changed(INSTANCES, "categories", ...)
    classes = {1: 0, 2: 1, 3: 2, 18: 16}
    first, second = load_refer(**files(instances=instances), split="train", classes=classes)
    assert [a["category_id"] for a in first["annotations"]] == [2, 0]
    assert [a["category_id"] for a in second["annotations"]] == [16, 2]
    with pytest.raises(ValueError, match=r"'category_id' is 18, expected an id .* \(1, 3\)"):
        load_refer(**files(instances=instances), classes={1: 0, 3: 1})


def test_without_a_split_all_refs_are_read(files):
    assert [image["image_id"] for image in load_refer(**files())] == [1, 2, 3]


def test_contexts(files, tmp_path):
    images = load_refer(**files(), split="train", contexts_file=tmp_path / "contexts.json")
    contexts = {
        e["sent_id"]: e["context_ann_ids"] for image in images for e in image["expressions"]
    }
    assert contexts == {11: [], 12: [20], 13: [11]}


def test_raw_stands_in_for_an_empty_sentence_and_no_words_are_left_out(files, caplog):
    refs = changed(REFS, 0, "sentences", 0, {"sent_id": 11, "sent": " ", "raw": "Red cup"})
    refs = changed(refs, 0, "sentences", 1, {"sent_id": 12, "sent": "", "raw": ""})
    refs = changed(refs, 1, "sentences", 0, {"sent_id": 13})
    (image,) = load_refer(**files(refs=refs), split="train")
    assert [e["query"] for e in image["expressions"]] == ["Red cup"]
    assert "ref 2: left out sentence 13" in caplog.text


def test_the_words_are_the_tokens_of_refer(files):
    refs = changed(REFS, 0, "sentences", 0, "tokens", ["man", "'s", "t-shirt", ",", "left"])
    for number, tokens in ((0, "word"), (1, [1, 2])):  # none of REFER's
        refs = changed(refs, 0 if number else 1, "sentences", number, "tokens", tokens)
    first, second = load_refer(**files(refs=refs), split="train")
    assert [e["query"] for e in first["expressions"]] == ["key next to ball"]
    assert [e["query"] for e in second["expressions"]] == ["man 's t-shirt , left", "cup on left"]


def test_boxes_are_clipped_and_empty_ones_left_out(files, caplog):
    instances = changed(INSTANCES, "annotations", 1, "bbox", [-10, 60, 300, 70.5])
    instances["annotations"][0]["bbox"] = [10, 10, 0, 40]
    instances["annotations"][3]["bbox"] = [200, 10, 30, 30]
    with caplog.at_level(logging.WARNING):
        first, second = load_refer(**files(instances=instances), split="train")
    assert [a["bbox"] for a in second["annotations"]] == [[0, 60, 120, 40]]
    assert [a["id"] for a in first["annotations"]] == [10]
    assert re.search(r"instances\.json: left out 2 annotations .* ids 11, 20", caplog.text)


@pytest.mark.parametrize("bbox", [[10, 10, 0, 40], [10, 10, 30, -5], [120, 0, 5, 5], [0, -9, 9, 9]])
def test_a_referent_without_a_box_is_an_error(files, bbox):
    instances = changed(INSTANCES, "annotations", 1, "bbox", bbox)
    with pytest.raises(ValueError, match=r"ref 1, sentence 11: 'ann_id' 21 .* box is empty"):
        load_refer(**files(instances=instances))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ((0, "ref_id", ...), r"refs\(unc\)\.p: ref number 0 has no 'ref_id', expected an integer"),
        ((1, "ann_id", "10"), r"ref number 1: 'ann_id' is '10', expected an integer"),
        ((1, "image_id", True), r"ref number 1: 'image_id' is True, expected an integer"),
        ((2, "split", ...), r"ref number 2 has no 'split', expected a string"),
        ((2, "sentences", ...), r"ref number 2 has no 'sentences', expected a list"),
        ((0, "sentences", 1, "sent_id", ...), r"ref 1, sentence number 1 has no 'sent_id'"),
        ((0, "sentences", 1, "sent_id", 11), r"ref 1: 'sent_id' 11 is used twice"),
        ((0, "sentences", 1, "red cup"), r"ref 1, sentence number 1 is str, expected a dictionary"),
        ((1, [3]), r"ref number 1 is list, expected a dictionary with 'ref_id'"),
        ((0, "ann_id", 99), r"ref 1, sentence 11: 'ann_id' 99 is no annotation of its image"),
        ((0, "ann_id", 10), r"ref 1, sentence 11: 'ann_id' 10 is no annotation of its image"),
        ((0, "image_id", 9), r"ref 1: 'image_id' 9 is not among the images of .*instances\.json"),
    ],
)
def test_damaged_refs(files, path, message):
    with pytest.raises(ValueError, match=message):
        load_refer(**files(refs=changed(REFS, *path)))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (("images", ...), r"instances\.json has no 'images', expected a list"),
        (("annotations", {}), r"instances\.json: 'annotations' is \{\}, expected a list"),
        (("images", 0, "id", ...), r"instances\.json: image number 0 has no 'id'"),
        (("images", 0, "file_name", ...), r"image number 0 has no 'file_name', expected a string"),
        (("images", 0, "height", 1.5), r"image number 0: 'height' is 1\.5, expected an integer"),
        (("images", 0, "width", 0), r"image number 0: 'width' is 0, expected the size in pixels"),
        (("annotations", 0, "image_id", ...), r"annotation number 0 has no 'image_id'"),
        (("annotations", 0, "id", ...), r"annotation number 0 has no 'id'"),
        (("images", 1, "id", 2), r"image number \d: 'id' 2 is used twice"),
        (("annotations", 0, "id", 21), r"annotation 21 of image 2: 'id' 21 is used twice"),
        (("annotations", 1, "bbox", ...), r"annotation 21 has no 'bbox', expected a list"),
        (("annotations", 1, "bbox", [1, 2, 3]), r"annotation 21: 'bbox' is \[1, 2, 3\], expected"),
        (("annotations", 1, "bbox", [0, 0, float("nan"), 1]), r"annotation 21: 'bbox' is .*nan"),
        (("annotations", 1, "bbox", [0, 0, "1", 1]), r"annotation 21: 'bbox' is .*Repair"),
        (("annotations", 1, "category_id", ...), r"annotation 21 has no 'category_id'"),
        (
            ("annotations", 1, "category_id", 4),
            r"annotation 21: 'category_id' is 4, expected an id",
        ),
        (("categories", ...), r"has no 'categories'"),
        (("categories", 0, "id", "18"), r"category number 0: 'id' is '18'"),
    ],
)
def test_damaged_instances(files, path, message):
    with pytest.raises(ValueError, match=message):
        load_refer(**files(instances=changed(INSTANCES, *path)))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (("version", 2), r"contexts\.json: 'version' is 2, expected 1"),
        (("contexts", ...), r"contexts\.json has no 'contexts', expected a dictionary"),
        (("contexts", "12", 20), r"'contexts', entry '12' is 20, expected a list of annotation"),
        (("contexts", "12", ["20"]), r"'contexts', entry '12' is \['20'\], expected a list"),
        (("contexts", "12", ...), r"'contexts' has no entry '12', a sentence of .*ref 1"),
        (("contexts", "12", [99]), r"ref 1, sentence 12: contextual object 99 is no annotation"),
    ],
)
def test_damaged_contexts(files, tmp_path, path, message):
    arguments = files(contexts=changed(CONTEXTS, *path))
    with pytest.raises(ValueError, match=message):
        load_refer(**arguments, contexts_file=tmp_path / "contexts.json")


def test_splits_of_several_letters_belong_to_each_as_in_refers_reader(files):
    splits = ("testA", "testAB", "testBC", "train", "val")  # RefCLEF has the two of two letters
    refs = [ref(n, 10, 1, split, sentence(n, "key")) for n, split in enumerate(splits)]
    arguments = files(refs=refs)

    def read(split):
        [image] = load_refer(**arguments, split=split)
        return [expression["sent_id"] for expression in image["expressions"]]

    asked = ("testA", "testB", "testC", "testAB", "test", "train", "val")
    assert list(map(read, asked)) == [[0, 1], [1, 2], [2], [1], [0, 1, 2], [3], [4]]


def test_a_list_of_one_rle_is_that_rle(files):
    rle = {"size": [100, 120], "counts": "abc"}
    instances = changed(INSTANCES, "annotations", 1, "segmentation", [rle])
    [_, second] = load_refer(**files(instances=instances), split="train")
    assert [one.get("segmentation") for one in second["annotations"]] == [None, rle]


@pytest.mark.parametrize("ids", [[21, 20], [-1]])
def test_grefcoco_is_told_by_its_lists_of_targets(files, tmp_path, ids):
    message = r"ref number 1: 'ann_id' is the list .* gRefCOCO, .* several or no targets"
    refs = changed(REFS, 1, "ann_id", ids)
    arguments = files(refs=refs)
    with pytest.raises(ValueError, match=message):
        load_refer(**arguments)
    (tmp_path / "grefs(unc).json").write_text(json.dumps(refs))
    with pytest.raises(ValueError, match=message):
        load_refer(**arguments | {"refs_file": tmp_path / "grefs(unc).json"})
    (tmp_path / "refs.json").write_text(json.dumps(REFS))
    assert load_refer(**arguments | {"refs_file": tmp_path / "refs.json"}) == load_refer(**files())


def test_an_unknown_split_lists_the_available_ones(files):
    with pytest.raises(ValueError, match=r"no ref of the split 'testA'.*splits: train, val"):
        load_refer(**files(), split="testA")
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p holds no refs"):
        load_refer(**files(refs=[]))


@pytest.mark.parametrize("name", ["refs(unc).p", "instances.json", "contexts.json"])
def test_a_missing_file_is_named_with_its_source(files, tmp_path, name):
    arguments = files()
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError) as raised:
        load_refer(**arguments, contexts_file=tmp_path / "contexts.json")
    assert name in str(raised.value) and "github.com/lichengunc/refer" in str(raised.value)


def test_files_of_another_kind(files, tmp_path):
    with pytest.raises(ValueError, match="expected a list of refs, found dict"):
        load_refer(**files(refs={}))
    with pytest.raises(ValueError, match=r"instances\.json: expected a JSON object, found list"):
        load_refer(**files(instances=[]))
    arguments = files()
    whole = Path(arguments["instances_file"]).read_text()
    Path(arguments["instances_file"]).write_text(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"instances\.json: not valid JSON .*cut short"):
        load_refer(**arguments)


def test_merging_gathers_the_expressions_of_an_image(files):
    one = load_refer(**files(), split="train", manner="refcoco")
    other = load_refer(**files(), manner="refcoco+")
    before = copy.deepcopy((one, other))
    merged = merge_by_image(one, other)
    assert [image["image_id"] for image in merged] == [1, 2, 3]
    assert [(e["manner"], e["sent_id"]) for e in merged[1]["expressions"]] == [
        ("refcoco", 11), ("refcoco", 12), ("refcoco+", 11), ("refcoco+", 12),
    ]  # fmt: skip
    assert [a["id"] for a in merged[1]["annotations"]] == [20, 21]
    assert (one, other) == before
    assert merge_by_image() == []


def test_merging_keeps_the_annotations_of_both():
    image = {"image_id": 1, "file_name": "a.jpg", "expressions": []}
    merged = merge_by_image(
        [image | {"annotations": [{"id": 1}]}], [image | {"annotations": [{"id": 1}, {"id": 2}]}]
    )
    assert merged[0]["annotations"] == [{"id": 1}, {"id": 2}]


def test_merging_refuses_other_images_of_the_same_id(files):
    images = load_refer(**files())
    other = [image | {"file_name": "elsewhere.jpg"} for image in images]
    with pytest.raises(ValueError, match=r"Image id 1 stands for .*image_1\.jpg and for elsewhere"):
        merge_by_image(images, other)
