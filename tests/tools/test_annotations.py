"""Categories, images and mentioned objects of annotations in COCO's format."""

import json

import pytest

from reranking.annotations import ImageInfo, read_annotations, read_mentioned

CONTENT = {
    "categories": [{"id": 7, "name": "dog"}, {"id": 2, "name": "cat"}],
    "images": [
        {"id": 1, "file_name": "1.jpg", "height": 20, "width": 30},
        {"id": 2, "height": 0, "width": 30},
    ],
    "annotations": [
        {"id": 10, "image_id": 1, "category_id": 7, "bbox": [1, 2, 3, 4]},
        {"id": 11, "image_id": 1, "category_id": 2, "bbox": [0, 0, 5, 5.5]},
        {"id": 12, "image_id": 2, "category_id": 7, "bbox": [0, 0, 5, 5]},
    ],
}
IMAGE_OF = {100: 1, 101: 1, "b": 2}


@pytest.fixture
def put(tmp_path):
    def write(content=CONTENT, name="instances.json"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def test_classes_follow_the_category_ids(put):
    found = read_annotations(put())
    assert (found.category_ids, found.category_names) == ([2, 7], ["cat", "dog"])
    assert found.class_of == {2: 0, 7: 1}
    assert found.images == {1: ImageInfo("1.jpg", (20, 30)), 2: ImageInfo(None, None)}
    assert read_annotations(put({"categories": CONTENT["categories"]})).images == {}


def test_mentioned_objects(put):
    mentions = [
        {"caption_id": 100, "annotation_ids": [10, 11]},
        {"caption_id": 101, "annotation_ids": []},
        {"caption_id": 999, "annotation_ids": [5]},
        {"caption_id": "b", "annotation_ids": [12]},
    ]
    found = read_mentioned(put(mentions, "mentions.json"), read_annotations(put()), IMAGE_OF)
    assert set(found) == {100, "b"}  # of the others nothing is mentioned, or asked
    assert found[100].boxes.tolist() == [[1, 2, 4, 6], [0, 0, 5, 5.5]]
    assert found[100].classes == (0, 1) and found["b"].classes == (1,)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"categories": [', "instances.json: not valid JSON"),
        ([], "instances.json: expected a JSON object"),
        ({"categories": []}, "'categories' is empty"),
        ({}, "has no 'categories'"),
        ({"categories": [{"id": 1}]}, "category number 0 has no 'name'"),
        ({"categories": [{"id": 1, "name": "a"}] * 2}, "'id' 1 is used twice"),
        ({**CONTENT, "images": [{"id": 1}] * 2}, "image number 1: 'id' 1 is used twice"),
        ({**CONTENT, "images": [{"id": "1"}]}, "image number 0: 'id' is '1'"),
    ],
)
def test_damaged_annotations_are_refused(put, content, message):
    with pytest.raises(ValueError, match=message):
        read_annotations(put(content))


def changed(**other) -> dict:
    return {**CONTENT, "annotations": [CONTENT["annotations"][0] | other]}


@pytest.mark.parametrize(
    ("mentions", "content", "message"),
    [
        ([{"caption_id": 100, "annotation_ids": [99]}], CONTENT, "has 99, which is no annotation"),
        ([{"caption_id": 100, "annotation_ids": [12]}], CONTENT, "has 12, .* of image 1 in"),
        ([{"caption_id": 100, "annotation_ids": [[]]}], CONTENT, r"has \[\], which is no"),
        ([{"caption_id": 5, "annotation_ids": [10]}], CONTENT, "no 'caption_id' .* the queries"),
        ([], CONTENT, "no 'caption_id'"),
        (
            [{"caption_id": 100, "annotation_ids": [10]}] * 2,
            CONTENT,
            "'caption_id' 100 is used twice",
        ),
        ([{"annotation_ids": [10]}], CONTENT, "number 0: 'caption_id' is None"),
        ([{"caption_id": 100}], CONTENT, "number 0 has no 'annotation_ids'"),
        ('[{"caption_id": 100, "anno', CONTENT, "mentions.json: not valid JSON.*cut short"),
        ([], {**CONTENT, "annotations": CONTENT["annotations"][:1] * 2}, "'id' 10 is used twice"),
        ([], changed(bbox=[1, 2, 3]), r"annotation number 0: 'bbox' is \[1, 2, 3\]"),
        ([], changed(category_id=5), "annotation number 0: 'category_id' is 5"),
        ([], {"categories": CONTENT["categories"]}, "instances.json has no 'annotations'"),
    ],
)
def test_damaged_mentions_are_refused(put, mentions, content, message):
    with pytest.raises(ValueError, match=message):
        read_mentioned(put(mentions, "mentions.json"), read_annotations(put(content)), IMAGE_OF)
