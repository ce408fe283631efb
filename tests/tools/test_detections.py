"""Detections from results files in COCO's format: in memory, and on disk sorted by image."""

import gc
import json
import random
import tracemalloc

import numpy as np
import pytest

from preparation import read_detections
from reranking import detections
from reranking.detections import DetectionStore
from vlnms_d2.data.entries import iter_json_list

CLASS_OF = {2: 0, 7: 1}


def detection(image_id=1, category_id=2, bbox=(1, 2, 3, 4), score=0.5, **other) -> dict:
    entry = {"image_id": image_id, "category_id": category_id, "bbox": bbox, "score": score}
    return entry | other


@pytest.fixture
def build(tmp_path):
    """Writes a results file and builds the store of it."""

    def make(results) -> DetectionStore:
        text = results if isinstance(results, str) else json.dumps(results)
        (tmp_path / "results.json").write_text(text)
        folder = tmp_path / "store"
        folder.mkdir(exist_ok=True)
        return DetectionStore.build(
            tmp_path / "results.json", CLASS_OF, tmp_path / "instances.json", folder
        )

    return make


@pytest.mark.parametrize("batch", [1, 7, 1 << 15])
def test_images_in_any_order_keep_the_order_of_the_file(build, monkeypatch, batch):
    monkeypatch.setattr(detections, "_BATCH", batch)
    rng = random.Random(0)
    results = [
        detection(rng.choice([3, -1, 900]), rng.choice([2, 7]), [i, 0, 1.25, rng.random()], i / 100)
        for i in range(100)
    ]
    store = build(results)
    assert store.image_ids.tolist() == [-1, 3, 900] and len(store) == 100
    for image_id in (-1, 3, 900):
        own = [entry for entry in results if entry["image_id"] == image_id]
        found = store.of(image_id)
        assert image_id in store and store.count(image_id) == len(own)
        assert found.boxes.tolist() == [entry["bbox"] for entry in own]
        assert found.scores.tolist() == [entry["score"] for entry in own]
        assert found.classes.tolist() == [CLASS_OF[entry["category_id"]] for entry in own]
        x, y, width, height = np.array([entry["bbox"] for entry in own]).T
        assert (found.corners == np.stack([x, y, x + width, y + height], axis=1)).all()


def test_what_was_built_can_be_opened_again(build, tmp_path):
    assert not DetectionStore.is_built(tmp_path)
    build([detection(5, bbox=[1, 2, 0, 4]), detection(5)])
    assert DetectionStore.is_built(tmp_path / "store")
    assert not (tmp_path / "store" / "spool.bin").exists()
    store = DetectionStore(tmp_path / "store")
    assert store.of(5).boxes.tolist() == [[1, 2, 0, 4], [1, 2, 3, 4]]
    assert store.num_zero_area == 1


def test_an_image_that_the_file_does_not_name_has_no_detections(build):
    for store in (build([detection(5)]), build([])):
        assert 4 not in store and 6 not in store and store.count(4) == 0
        assert store.of(4).corners.shape == (0, 4) and store.of(6).scores.shape == (0,)


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(detections, "_BATCH", 256)

    def peak(count: int, name: str) -> int:
        path, folder = tmp_path / f"{name}.json", tmp_path / name
        folder.mkdir()
        path.write_text(json.dumps([detection(i % 3) for i in range(count)]))
        gc.collect()
        tracemalloc.start()
        DetectionStore.build(path, CLASS_OF, path, folder)
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    def least_peak(count: int) -> int:
        # What other threads of the process allocate meanwhile counts as well, and only adds.
        return min(peak(count, f"{count}_{i}") for i in range(3))

    peak(500, "what_is_made_once")
    assert least_peak(6_000) < 1.1 * least_peak(2_000)


WHOLE = json.dumps([detection(), detection()])


@pytest.mark.parametrize(
    ("results", "message"),
    [
        (WHOLE[: len(WHOLE) // 2 + 9], "results.json: not valid JSON after 1 entries .*cut short"),
        (WHOLE[:-1], "not valid JSON after 2 entries .*cut short"),
        (WHOLE.replace("}, {", "} {"), "not valid JSON after 1 entries"),
        (WHOLE + "[]", "not valid JSON after 2 entries .*trailing garbage"),
        (WHOLE.replace("}, {", "},, {"), "not valid JSON after 1 entries"),
        ("[", "not valid JSON after 0 entries.*cut short"),
        ("", "results.json: expected a list"),
        ({}, "results.json: expected a list"),
        ([3], "entry number 0 is 3, expected an object"),
        ([detection(), detection(category_id=3)], "number 1: 'category_id' is 3, which .*instanc"),
        ([detection(category_id="2")], "'category_id' is '2', expected an integer"),
        ([detection(image_id="2")], "'image_id' is '2', expected an integer"),
        ([detection(bbox=[1, 2, 3])], r"'bbox' is \[1, 2, 3\]"),
        ([detection(bbox=[1, 2, -3, 4])], r"'bbox' is \[1, 2, -3, 4\], .*no negative size"),
        ([detection(bbox=[1, float("inf"), 3, 4])], "results.json: not valid JSON after 0 entries"),
        ([detection(bbox=[1, True, 3, 4])], "'bbox' is .*finite"),
        ([detection(score=float("nan"))], "results.json: not valid JSON after 0 entries"),
        ([detection(score=-0.1)], "number 0: 'score' is -0.1, expected .* from 0 to 1"),
        ([detection(score=1.5)], "'score' is 1.5"),
        ([{"image_id": 1, "category_id": 2, "bbox": [1, 2, 3, 4]}], "'score' is None"),
    ],
)
def test_damaged_results_are_refused(build, tmp_path, results, message):
    with pytest.raises(ValueError, match=message):
        build(results)
    assert not DetectionStore.is_built(tmp_path / "store")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"results.json: no such file.*coco_instances_res"):
        DetectionStore.build(tmp_path / "results.json", CLASS_OF, tmp_path, tmp_path)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"a": "\xff"}]')
    with pytest.raises(ValueError, match=r"a.json: not valid JSON"):
        list(iter_json_list(path, ""))


def test_an_entry_without_end_is_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"a": "' + "x" * 1_000_000)
    with pytest.raises(ValueError, match="not valid JSON after 0 entries"):
        list(iter_json_list(path, ""))


def test_all_values_of_json_come_through(tmp_path):
    entries = [{}, {"a": [1.5, -2e-7, None, True, {"}": '],[{\\"é'}]}, {"b": ""}]
    path = tmp_path / "a.json"
    path.write_text("\ufeff \n" + json.dumps(entries, indent=1) + "\n ", encoding="utf-8")
    assert list(iter_json_list(path, "")) == entries


# --- in memory ---------------------------------------------------------------------------------

CATEGORIES = {"categories": [{"id": 7, "name": "dog"}, {"id": 2, "name": "cat"}]}


@pytest.fixture
def read(tmp_path):
    """Writes both files and reads them."""

    def write(results, categories=CATEGORIES, **kwargs):
        for name, content in (("results.json", results), ("instances.json", categories)):
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / name).write_text(text)
        return read_detections(tmp_path / "results.json", tmp_path / "instances.json", **kwargs)

    return write


def test_boxes_by_image_in_descending_score_order(read):
    found = read(
        [
            detection(score=0.3),
            detection(image_id=5, category_id=7, score=0.1),
            detection(category_id=7, bbox=[0.5, 0, 2, 2], score=0.9, segmentation={}),
            detection(score=0.3, bbox=[9, 9, 9, 9]),
        ]
    )
    assert found.category_names == ["cat", "dog"] and set(found.by_image) == {1, 5}
    boxes, classes = found.by_image[1]
    assert boxes.tolist() == [[0.5, 0, 2, 2], [1, 2, 3, 4], [9, 9, 9, 9]]
    assert classes.tolist() == [1, 0, 0] and classes.dtype == np.int64


def test_the_least_score_is_inclusive(read):
    found = read([detection(score=0.3), detection(image_id=2, score=0.29)], min_score=0.3)
    assert set(found.by_image) == {1}


def test_no_detection_at_all(read):
    assert read([]).by_image == {}


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ('[{"image_id": 1, "cat', "results.json: not valid JSON.*cut short"),
        ({}, "results.json: expected a list"),
        ([3], "entry number 0 is 3, expected an object"),
        ([detection(), detection(category_id=3)], "number 1: 'category_id' is 3, which"),
        ([detection(category_id="2")], "'category_id' is '2', expected an integer"),
        ([detection(bbox=[1, 2, 3])], r"'bbox' is \[1, 2, 3\]"),
        ([detection(score=float("nan"))], "results.json: not valid JSON after 0 entries"),
        ([{"image_id": 1, "category_id": 2, "bbox": [1, 2, 3, 4]}], "'score' is None"),
        ([detection(score=7)], "'score' is 7, expected .* from 0 to 1"),
        ([detection(bbox=[1, 2, 3, -4])], r"'bbox' is \[1, 2, 3, -4\], .*no negative size"),
    ],
)
def test_damaged_results_are_refused_in_memory(read, results, message):
    with pytest.raises(ValueError, match=message):
        read(results)


def test_missing_files_are_named(tmp_path, read):
    with pytest.raises(ValueError, match="has no 'categories'"):
        read([], categories={})
    (tmp_path / "results.json").unlink()
    (tmp_path / "instances.json").write_text(json.dumps(CATEGORIES))
    with pytest.raises(FileNotFoundError, match=r"results.json.*coco_instances_results"):
        read_detections(tmp_path / "results.json", tmp_path / "instances.json")
