"""Detections in COCO's results format."""

import json

import numpy as np
import pytest

from vlnms_d2.data.results_file import read_detections

CATEGORIES = {"categories": [{"id": 7, "name": "dog"}, {"id": 2, "name": "cat"}]}


def detection(image_id=1, category_id=2, bbox=(1, 2, 3, 4), score=0.5, **other) -> dict:
    entry = {"image_id": image_id, "category_id": category_id, "bbox": bbox, "score": score}
    return entry | other


@pytest.fixture
def read(tmp_path):
    """Writes both files and reads them."""

    def write(results, categories=CATEGORIES, **kwargs):
        for name, content in (("results.json", results), ("instances.json", categories)):
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / name).write_text(text)
        return read_detections(tmp_path / "results.json", tmp_path / "instances.json", **kwargs)

    return write


def test_boxes_by_image_and_falling_score(read):
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
        ([3], "detection number 0 is int"),
        ([detection(), detection(category_id=3)], "number 1: 'category_id' is 3, which"),
        ([detection(category_id="2")], "'category_id' is '2', expected an integer"),
        ([detection(bbox=[1, 2, 3])], r"'bbox' is \[1, 2, 3\]"),
        ([detection(score=float("nan"))], "'score' nan, expected"),
        ([{"image_id": 1, "category_id": 2, "bbox": [1, 2, 3, 4]}], "'score' None"),
    ],
)
def test_damaged_results_are_refused(read, results, message):
    with pytest.raises(ValueError, match=message):
        read(results)


def test_missing_files_are_named(tmp_path, read):
    with pytest.raises(ValueError, match="has no 'categories'"):
        read([], categories={})
    (tmp_path / "results.json").unlink()
    (tmp_path / "instances.json").write_text(json.dumps(CATEGORIES))
    with pytest.raises(FileNotFoundError, match=r"results.json.*coco_instances_results"):
        read_detections(tmp_path / "results.json", tmp_path / "instances.json")
