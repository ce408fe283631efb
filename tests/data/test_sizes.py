"""Values of any size in files end in a short error; the known sizes of data sets are told."""

import json
import pickle

import pytest
from detectron2.data import DatasetCatalog

from reranking.annotations import read_annotations
from reranking.detections import DetectionStore
from reranking.queries import read_queries
from vlnms_d2.data.builtin import (
    KNOWN_SIZES,
    PUBLISHED_SIZES,
    REFER_SETS,
    check_counts,
)
from vlnms_d2.data.datasets.refer import read_refs
from vlnms_d2.modeling.text import Vocabulary

DEEP = "[" * 5000 + "]" * 5000
VALUES = {
    "2**70": str(2**70),
    "10**400": str(10**400),
    "4,300 digits": "9" * 4301,
    "deep": DEEP,
    "large": json.dumps([1.5] * 300_000),
    "null": "null",
    "object": "{}",
}


def check(read, path):
    with pytest.raises(ValueError) as error:
        read(path)
    message = str(error.value)
    assert path.name in message and len(message) < 1500 and message.encode()


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("key", ["image_id", "query"])
def test_queries(tmp_path, key, value):
    entry = {"image_id": "1", "query_id": "2", "query": '"cup"'} | {key: VALUES[value]}
    path = tmp_path / "q.jsonl"
    path.write_text("{" + ", ".join(f'"{k}": {v}' for k, v in entry.items()) + "}\n")
    check(read_queries, path)


@pytest.mark.parametrize("text", ["", "null", "[]", "3", '"text"', DEEP, "9" * 5000])
def test_top_levels(tmp_path, text):
    for name, read in (
        ("captions.json", read_queries),
        ("instances.json", read_annotations),
        ("vocab.json", Vocabulary.load),
    ):
        (tmp_path / name).write_text(text)
        check(read, tmp_path / name)


def test_half_of_a_character(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"image_id": 1, "query_id": 2, "query": "cup \\ud800"}\n')
    check(read_queries, path)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("key", ["image_id", "bbox", "score", "category_id"])
def test_detections(tmp_path, key, value):
    entry = {"image_id": "1", "category_id": "7", "bbox": "[1, 2, 3, 4]", "score": "0.5"}
    entry[key] = VALUES[value]
    path = tmp_path / "results.json"
    path.write_text("[{" + ", ".join(f'"{k}": {v}' for k, v in entry.items()) + "}]")
    check(lambda path: DetectionStore.build(path, {7: 0}, tmp_path / "a.json", tmp_path), path)


def test_a_small_pickle_of_a_large_value(tmp_path):
    nested = [0] * 10
    for _ in range(9):
        nested = [nested] * 10  # 10 ** 10 numbers, in some hundred bytes
    path = tmp_path / "refs(unc).p"
    for refs in ([{"ref_id": nested}], [{"ref_id": 2**70}], nested, {"a": nested}, None):
        path.write_bytes(pickle.dumps(refs, 2))
        check(lambda path: read_refs(path, {"ref_id": int}), path)


# --- known sizes agree with each other ---------------------------------------------------------


def total(*names: str) -> tuple[int, int]:
    sizes = [KNOWN_SIZES[name] for name in names]
    return sum(size.images for size in sizes), sum(size.expressions for size in sizes)


@pytest.mark.parametrize("name", ["refcoco", "refcoco+"])
def test_the_splits_of_refcoco_make_the_whole(name):
    splits = [f"{name}_unc_{split}" for split in ("train", "val", "testA", "testB")]
    assert total(*splits) == PUBLISHED_SIZES[name]


def test_both_ways_to_split_refcocog_hold_the_same_expressions():
    umd = total(*(f"refcocog_umd_{split}" for split in ("train", "val", "test")))
    google = total(*(f"refcocog_google_{split}" for split in ("train", "val")))
    assert umd[1] == google[1] == 95_010


def test_flickr30k():
    splits = ("train", "val", "test")
    entities = total(*(f"flickr30k_entities_captions_{split}" for split in splits))
    assert entities == PUBLISHED_SIZES["flickr30k"] == (31_783, 5 * 31_783)
    images, captions = total(*(f"flickr30k_captions_{split}" for split in splits))
    assert captions == 5 * images


def test_coco():
    splits = ("train", "restval", "val", "test")
    images, captions = total(*(f"coco_captions_{split}" for split in splits))
    assert (images, captions) == (123_287, 616_767)


def test_every_name_is_registered():
    names = {f"{one.name}_{split}" for one in REFER_SETS for split in one.splits}
    for kind in ("flickr30k_entities_captions", "flickr30k_captions", "coco_captions"):
        names |= {f"{kind}_{split}" for split in ("train", "val", "test")}
    names.add("coco_captions_restval")
    assert set(KNOWN_SIZES) == names <= set(DatasetCatalog.list())


def test_a_sentence_says_what_differs():
    assert check_counts("refcoco_unc_val", 1_500, 10_834) is None
    assert check_counts("refcoco", 19_994, 142_210) is None
    assert check_counts("my_own_val", 3, 4) is None
    assert check_counts("refcoco_google_val", 4_559, 1) is None  # the number is not known
    assert check_counts("refcoco_unc_val", 1_500, 10_000) == (
        "Data set refcoco_unc_val has 10,000 expressions where the published one has 10,834; if it "
        "should be the published one, fetch its files again."
    )
    told = check_counts("coco_captions_test", 4_999, 25_009)
    assert "4,999 images where" in told and "and 25,009 expressions where" in told
