"""Pseudo ground truth: which annotated or detected boxes an expression speaks of."""

import json

import numpy as np
import pytest
from detectron2.structures import BoxMode
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_vectors import TableVectors, all_words

from pseudo_gt import text_similarity, weakly_supervised
from vlnms_d2.data.pseudo_gt import add_pseudo_gt, save_pseudo_gt
from vlnms_d2.language.matching import CategoryMatcher

NAMES = ["cat", "dog", "table"]
VECTORS = TableVectors({"cat": 0, "kitten": 20, "dog": 60, "puppy": 50, "table": 180, "desk": 150})


def matcher(names=NAMES) -> CategoryMatcher:
    return CategoryMatcher(names, all_words, VECTORS)


def annotation(ann_id: int, category_id: int, bbox, mode=BoxMode.XYWH_ABS) -> dict:
    return {"id": ann_id, "bbox": list(bbox), "bbox_mode": mode, "category_id": category_id}


def expression(sent_id: int, query: str, ann_id: int | None) -> dict:
    return {"sent_id": sent_id, "query": query, "ann_id": ann_id, "context_ann_ids": None}


def image(image_id: int, annotations: list[dict], *expressions: dict) -> dict:
    return {
        "image_id": image_id,
        "file_name": f"{image_id}.jpg",
        "annotations": annotations,
        "expressions": list(expressions),
    }


SCENE = [
    annotation(10, 0, [0, 0, 10, 10]),
    annotation(11, 1, [20, 0, 30, 10], BoxMode.XYXY_ABS),
    annotation(12, 2, [0, 50, 100, 50]),
    annotation(13, 0, [0, 0, 10, 9.5]),  # the first one's box, annotated once more
    annotation(14, 0, [50, 0, 10, 10]),
]


def test_objects_of_the_named_categories_are_context_but_not_the_referent():
    images = [
        image(
            1,
            SCENE,
            expression(1, "cat by the dog", 10),
            expression(2, "puppy on desk", 11),
            expression(3, "kitten", 14),
            expression(4, "thing", 12),
            expression(5, "", 12),
            expression(6, "cat", None),
        ),
        image(2, [], expression(7, "cat", None)),
    ]
    found = text_similarity(images, matcher(), gamma=0.8)
    assert found == {1: [11, 14], 2: [12], 3: [10, 13], 4: [], 5: [], 6: [10, 13, 14], 7: []}


def iou(a: list[float], b: list[float]) -> float:
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / (a[2] * a[3] + b[2] * b[3] - width * height)


boxes = st.tuples(*[st.integers(0, 3)] * 2, *[st.integers(1, 20)] * 2).map(list)
objects = st.lists(st.tuples(st.integers(0, 2), boxes), min_size=1, max_size=5)
texts = st.lists(st.sampled_from(["cat", "kitten", "dog", "puppy", "desk", "of"]), max_size=3)


@settings(max_examples=100, deadline=None)
@given(objects, st.lists(st.tuples(texts, st.integers(0, 4)), max_size=3), st.floats(0, 0.99))
def test_text_similarity_equals_a_loop(scene, queries, gamma):
    annotations = [annotation(100 + i, c, box) for i, (c, box) in enumerate(scene)]
    expressions = [
        expression(i, " ".join(words), 100 + referent % len(scene))
        for i, (words, referent) in enumerate(queries)
    ]
    expected = {}
    for (words, referent), own in zip(queries, expressions, strict=True):
        referent %= len(scene)
        expected[own["sent_id"]] = [
            100 + i
            for i, (c, box) in enumerate(scene)
            if any(VECTORS.similarity([w], [NAMES[c]])[0, 0] > gamma for w in words)
            and i != referent
            and iou(box, scene[referent][1]) <= 0.9
        ]
    assert text_similarity([image(1, annotations, *expressions)], matcher(), gamma) == expected


def test_objects_of_no_known_class_are_never_context():
    scene = [annotation(1, -1, [0, 0, 10, 10]), annotation(2, 2, [50, 0, 10, 10])]
    found = text_similarity([image(1, scene, expression(5, "table", None))], matcher(), 0.5)
    assert found == {5: [2]}


def test_an_iou_of_exactly_nine_tenths_is_context():
    scene = [annotation(1, 0, [0, 0, 10, 10]), annotation(2, 0, [0, 0, 10, 9])]
    assert text_similarity([image(1, scene, expression(5, "cat", 1))], matcher(), 0.5) == {5: [2]}


def test_detected_boxes_are_taken_in_place_of_annotated_ones():
    images = [
        image(1, SCENE, expression(1, "cat by the dog", 10), expression(2, "desk", 10)),
        image(2, [], expression(3, "dog", None)),
    ]
    detections = {1: (np.array([[1.0, 2, 3, 4], [5, 6, 7, 8]]), np.array([1, 0]))}
    found = weakly_supervised(images, detections, matcher(["dog", "cat"]), gamma=0.8)
    assert found == {1: [[1, 2, 3, 4], [5, 6, 7, 8]], 2: [], 3: []}


# --- files -------------------------------------------------------------------------------------

IMAGES = [image(1, SCENE, expression(1, "cat", 10), expression(2, "dog", 11))]


@pytest.mark.parametrize(
    ("found", "field"),
    [
        ({"contexts": {1: [11], 2: []}}, "context_ann_ids"),
        ({"boxes": {1: [[0.5, 0, 3, 4]], 2: []}}, "pseudo_boxes"),
    ],
)
def test_what_is_saved_is_added_to_the_expressions(tmp_path, found, field):
    path = tmp_path / "pseudo_gt.json"
    save_pseudo_gt(path, "some_set", {"gamma": 0.4}, statistics={}, **found)
    before = json.dumps(IMAGES)
    (added,) = add_pseudo_gt(IMAGES, path)
    (values,) = found.values()
    assert [e[field] for e in added["expressions"]] == [values[1], values[2]]
    assert json.dumps(IMAGES) == before
    assert json.loads(path.read_text())["settings"] == {"gamma": 0.4}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"version": 9, "contexts": {}}, "'version' is 9, expected 1"),
        ({"version": 1}, "has no 'contexts'"),
        ({"version": 1, "contexts": {"1": []}}, "None for sentence 2"),
        ({"version": 1, "contexts": {"1": [], "2": [99]}}, r"\[99\] for sentence 2.*annotation"),
        ({"version": 1, "contexts": {"1": ["10"], "2": []}}, r"\['10'\] for sentence 1"),
        ({"version": 1, "boxes": {"1": [[1, 2, 3]], "2": []}}, r"sentence 1.*boxes \[x, y"),
        ([], "expected a JSON object"),
    ],
)
def test_files_of_other_data_sets_are_refused(tmp_path, content, message):
    path = tmp_path / "pseudo_gt.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        add_pseudo_gt(IMAGES, path)


def test_a_missing_file_says_what_makes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"pseudo_gt.json.*tools/prepare_data.py"):
        add_pseudo_gt(IMAGES, tmp_path / "pseudo_gt.json")
