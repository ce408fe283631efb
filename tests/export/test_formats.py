"""Formats of second stages: what their readers expect, shard by shard."""

import io
import json

import numpy as np
import pytest
from pycocotools.coco import COCO

from vlnms_d2.export import DDPN, FORMATS, Imram, QueryProposals, Scan
from vlnms_d2.export.base import decimals, npz_bytes

EVERY_FORMAT = {**FORMATS, "ddpn": DDPN(), "scan": Scan(3), "imram": Imram(3)}
CATEGORY_NAMES = {7: "dog", 2: "cat"}


def proposals(query_id, candidates, image_id=1, **other) -> QueryProposals:
    """Of candidates by number: 0 and 2 are dogs, 1 is a cat, with confidences .5, .9, .7."""
    index = np.array(candidates, dtype=np.int64)
    category_ids = np.array([7, 2, 7])[index]
    related = np.linspace(1, 0.8, len(index)).astype(np.float32)
    confidences = np.array([0.5, 0.9, 0.7])[index]
    boxes = np.array([[0.5, 1, 2, 3], [4, 5, 6, 7], [10.1, 0, 20.2, 30]])[index]
    given = {
        "query": f"words of {query_id}",
        "ref_id": None,
        "split": None,
        "boxes": boxes,
        "corners": np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1),
        "category_ids": category_ids,
        "category_names": [CATEGORY_NAMES[i] for i in category_ids.tolist()],
        "scores": (confidences * related).astype(np.float32),
        "cls_scores": confidences,
        "relatedness": related,
        "candidate_index": index,
    }
    return QueryProposals(image_id, query_id, **given | other)


@pytest.fixture
def merged(tmp_path):
    """Writes images to shards, one each, merges them and returns the path of the result."""

    def make(name, *images):
        shards = []
        one = EVERY_FORMAT[name]
        for number, image in enumerate(images):
            shard = io.BytesIO()
            one.write(image, shard)
            shards.append(tmp_path / f"{number}.{name}")
            shards[-1].write_bytes(shard.getvalue())
        path = tmp_path / one.output
        one.merge(iter(shards), path)
        return path

    return make


def test_jsonl_is_a_line_a_query_with_all_scores(merged):
    path = merged("jsonl", [proposals(11, [1, 0]), proposals("à", [])], [proposals(12, [2])])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["query_id"], len(line["proposals"])) for line in lines] == [
        (11, 2), ("à", 0), (12, 1),
    ]  # fmt: skip
    assert lines[0]["image_id"] == 1 and lines[0]["query"] == "words of 11"
    best, second = lines[0]["proposals"]
    assert best == {
        "box": [4, 5, 10, 12], "class": "cat", "category_id": 2, "s": 0.9, "c": 0.9, "r": 1.0,
    }  # fmt: skip
    assert np.float32(second["s"]) == np.float32(0.5) * np.float32(0.8)
    assert second["r"] == 0.8  # the shortest number that is the same float32


def test_coco_is_what_pycocotools_reads_with_the_query_added(merged):
    path = merged("coco", [proposals(11, [1, 0])], [proposals(12, [2], image_id=3)])
    found = json.loads(path.read_text())
    assert found == [
        {"image_id": 1, "category_id": 2, "bbox": [4, 5, 6, 7], "score": 0.9, "sent_id": 11},
        {"image_id": 1, "category_id": 7, "bbox": [0.5, 1, 2, 3], "score": 0.4, "sent_id": 11},
        {"image_id": 3, "category_id": 7, "bbox": [10.1, 0, 20.2, 30], "score": 0.7, "sent_id": 12},
    ]
    truth = COCO()
    truth.dataset = {"images": [{"id": 1}, {"id": 3}], "annotations": [], "categories": []}
    truth.createIndex()
    read = truth.loadRes(str(path))
    assert [len(read.getAnnIds(imgIds=[i])) for i in (1, 3)] == [2, 1]


def test_per_expression_has_the_keys_of_the_forks(merged):
    image = [
        proposals(11, [1, 0], ref_id=5, split="val"),
        proposals(12, [1], ref_id=5, split="val"),
    ]
    found = json.loads(merged("per-expression", image, [proposals(13, [2])]).read_text())
    assert [entry["det_id"] for entry in found] == [0, 1, 2, 3]  # through all shards
    assert [entry["h5_id"] for entry in found] == [0, 1, 2, 3]
    assert [entry["sent_id"] for entry in found] == [11, 11, 12, 13]
    assert found[0] == {
        "det_id": 0, "h5_id": 0, "ref_id": 5, "sent_id": 11, "image_id": 1, "box": [4, 5, 6, 7],
        "category_id": 2, "category_name": "cat", "split": "val",
    }  # fmt: skip
    assert found[3]["ref_id"] is None and found[3]["split"] is None


def test_mattnet_has_the_union_of_an_images_expressions_once_each(merged):
    image = [proposals(11, [1, 0]), proposals(12, [2, 1]), proposals(13, [])]
    found = json.loads(merged("mattnet", image, [proposals(14, [0], image_id=3)]).read_text())
    assert [entry["det_id"] for entry in found] == [0, 1, 2, 3]
    assert [(entry["image_id"], entry["score"]) for entry in found] == [
        (1, 0.9), (1, 0.7), (1, 0.5), (3, 0.5),
    ]  # fmt: skip
    assert found[0] == {
        "det_id": 0, "h5_id": 0, "box": [4, 5, 6, 7], "image_id": 1, "category_id": 2,
        "category_name": "cat", "score": 0.9,
    }  # fmt: skip


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("jsonl", "albef")])
def test_nothing_kept_is_an_empty_list(merged, name):
    assert json.loads(merged(name, [proposals(11, [])], []).read_text()) == []
    assert json.loads(merged(name).read_text()) == []


def test_merging_replaces_what_is_there(merged):
    merged("coco", [proposals(11, [1, 0])])
    assert len(json.loads(merged("coco", [proposals(11, [1])]).read_text())) == 1


def test_how_entries_lie_in_shards_does_not_matter(merged):
    one, other = [proposals(11, [1, 0])], [proposals(12, [2], image_id=3)]
    for name in FORMATS:
        apart = merged(name, one, other).read_bytes()
        assert apart == merged(name, one, [], other).read_bytes()


def with_features(query_id, candidates, image_id=1, **other) -> QueryProposals:
    """With the features [number, number + 0.5] of each candidate, on an image of 40 x 50."""
    features = np.array([[i, i + 0.5] for i in candidates], np.float32).reshape(-1, 2)
    given = {"image_size": (40, 50), "image_name": "1.png", "features": features}
    return proposals(query_id, candidates, image_id, **given | other)


def test_nmtree_is_mattnets_list(merged):
    image = [proposals(11, [1, 0]), proposals(12, [2, 1])]
    assert merged("nmtree", image).read_bytes() == merged("mattnet", image).read_bytes()


def test_single_precision_is_written_with_the_digits_that_it_has(merged):
    boxes = np.float32([[0.1, 0.2, 0.3, 0.4]])
    corners = np.float32([[0.1, 0.2, 0.4, 0.6]])
    own = proposals(11, [0], boxes=boxes, corners=corners, cls_scores=np.float32([0.7]))
    [line] = merged("jsonl", [own]).read_text().splitlines()
    [entry] = json.loads(line)["proposals"]
    assert (entry["box"], entry["c"]) == ([0.1, 0.2, 0.4, 0.6], 0.7)
    [entry] = json.loads(merged("coco", [own]).read_text())
    assert entry["bbox"] == [0.1, 0.2, 0.3, 0.4]
    assert decimals(np.zeros((0, 4), np.float32)) == []


def test_masks_stand_beside_their_boxes(merged):
    masks = [{"size": [40, 50], "counts": "abc"}, {"size": [40, 50], "counts": "de"}]
    own = proposals(11, [1, 0], masks=masks)
    found = json.loads(merged("coco", [own]).read_text())
    assert [entry["segmentation"] for entry in found] == masks
    [line] = merged("jsonl", [own]).read_text().splitlines()
    assert [entry["mask"] for entry in json.loads(line)["proposals"]] == masks


@pytest.mark.parametrize(("name", "array"), [("scan", "ims"), ("imram", "feat")])
def test_retrieval_has_a_row_a_caption_in_order(merged, name, array):
    first = [
        with_features(11, [1, 0], split="val"),
        with_features(12, [2, 1, 0, 2], query="two\n lines", split="val"),
        *(with_features(n, [0], split="val") for n in (13, 14, 15, 16)),
    ]
    second = [with_features(n, [], split="restval") for n in range(20, 25)]
    folder = merged(name, first, second)
    rows = np.load(folder / f"dev_{array}.npy")
    assert rows.dtype == np.float32 and rows.shape == (5, 3, 2)
    assert rows[:3, :, 0].tolist() == [[1, 0, 1], [2, 1, 0], [0, 0, 0]]
    assert rows[2].tolist() == [[0, 0.5]] * 3
    captions = (folder / "dev_caps.txt").read_text().splitlines()
    assert captions[:3] == ["words of 11", "two lines", "words of 13"]
    assert np.load(folder / "dev_num_boxes.npy").tolist() == [2, 3, 1, 1, 1]
    assert (folder / "dev_query_ids.txt").read_text().split() == ["11", "12", "13", "14", "15"]
    assert not np.load(folder / f"train_{array}.npy").any()  # no proposals


@pytest.mark.parametrize("name", ["ddpn", "scan"])
def test_folders_are_replaced_and_depend_on_the_shards_alone(merged, name):
    def image(image_id, objects=(1, 0)):
        return [
            with_features(10 * image_id + n, objects, image_id, split="train") for n in range(5)
        ]

    def files(*images):
        folder = merged(name, *images)
        return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    before = files(image(1), image(2, [0]))
    assert files(image(9, [0])) != before
    assert files(image(1), [], image(2, [0])) == before


def test_npz_files_have_no_date():
    assert b"\x00\x00\x21\x00" in npz_bytes({"x": np.zeros(3)})  # 1980-01-01, 00:00
