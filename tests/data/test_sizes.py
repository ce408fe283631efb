"""Values of any size and nesting in files end in a short error that names the file."""

import json
import pickle

import pytest

from vlnms_d2.data.datasets.coco import read_annotations
from vlnms_d2.data.datasets.refer import read_refs
from vlnms_d2.data.detections import DetectionStore
from vlnms_d2.data.queries import read_queries
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
