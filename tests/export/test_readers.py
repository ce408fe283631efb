"""Each format, read by a restatement of what its reader does.

The readers below follow the public code of the second stages, line by line where a line decides;
none of them calls a function of `vlnms_d2`. They return what the second stage computes with.
"""

import base64
import csv
import io
import json
import pickle

import numpy as np
import pytest

from vlnms_d2.export import DDPN, FORMATS, BottomUp, Imram, QueryProposals, Scan

CATS, DOGS = [0, 1], [2, 3, 4]  # objects by class
NAMES = {17: "cat", 18: "dog"}
D = 5


def make_query(query_id, objects, image_id=1, shift=0.0, dim=D, **other) -> QueryProposals:
    """The proposals of a query: objects by number, in the order of their scores.

    Args:
        shift: moves the boxes, as box refinement does.
    """
    index = np.array(objects, dtype=np.int64)
    corners = np.array([[10 * i + shift, 3, 10 * i + 20 + shift, 50 + i] for i in objects])
    corners = corners.reshape(-1, 4).astype(np.float32)
    ids = np.where(np.isin(index, CATS), 17, 18)
    given = {
        "query": f"words of {query_id}",
        "ref_id": None,
        "split": None,
        "boxes": np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1),
        "corners": corners,
        "category_ids": ids,
        "category_names": [NAMES[i] for i in ids.tolist()],
        "scores": np.linspace(0.9, 0.5, len(index)).astype(np.float32),
        "cls_scores": (0.95 - 0.1 * index).astype(np.float32),
        "relatedness": np.ones(len(index), np.float32),
        "candidate_index": index,
        "image_size": (60, 90),
        "image_name": f"COCO_train2014_{image_id:012d}.jpg",
        "features": features_of(objects, dim) + np.float32(shift),
    }
    return QueryProposals(image_id, query_id, **given | other)


def features_of(objects, dim=D) -> np.ndarray:
    """[len(objects), dim], all numbers distinct."""
    return np.array([[10 * i + d + 1 for d in range(dim)] for i in objects], np.float32).reshape(
        -1, dim
    )


def export(fmt, folder, *images):
    """Write images with a format, a shard each; returns the file or folder."""
    shards = []
    for number, image in enumerate(images):
        shard = io.BytesIO()
        fmt.write(image, shard)
        shards.append(folder / f"{number}.shard")
        shards[-1].write_bytes(shard.getvalue())
    fmt.merge(iter(shards), folder / fmt.output)
    return folder / fmt.output


# --- MAttNet, CM-A-E and NMTree, as released and as the forks of Ref-NMS ----------------------


def load_dets(path, image_ids):
    """lib/loaders/dets_loader.py of MAttNet, utils/det_loader.py of NMTree: detections by id, and
    the ids of each image."""
    dets = json.loads(path.read_bytes())
    by_id = {det["det_id"]: det for det in dets}
    assert len(by_id) == len(dets)
    of_image = {image_id: [] for image_id in image_ids}
    for det in dets:
        of_image[det["image_id"]] += [det["det_id"]]
    return by_id, of_image


def read_mattnet(path, image_ids, sizes):
    """What MAttNet's test batch has of each image: locations [n, 5], and of each detection the
    offsets of at most five neighbours of its class and the rows of the features of the others."""
    by_id, of_image = load_dets(path, image_ids)
    # tools/extract_mrcn_det_feats.py: row h5_id of a feature array of as many rows as detections
    rows = np.full(len(by_id), -1)
    for det in by_id.values():
        rows[det["h5_id"]] = det["det_id"]
    assert sorted(rows) == sorted(by_id)
    batches = {}
    for image_id, det_ids in of_image.items():
        height, width = sizes[image_id]
        boxes = np.array([by_id[i]["box"] for i in det_ids]).reshape(-1, 4)
        x, y, w, h = boxes.T
        locations = [x / width, y / height, (x + w - 1) / width, (y + h - 1) / height]
        locations = np.stack([*locations, w * h / (width * height)], axis=1)
        center = boxes[:, :2] + boxes[:, 2:] / 2
        neighbours, contexts = [], []
        for place, det_id in enumerate(det_ids):
            order = np.argsort(((center - center[place]) ** 2).sum(1), kind="stable")
            others = [det_ids[i] for i in order if det_ids[i] != det_id]
            category = by_id[det_id]["category_id"]
            same = [i for i in others if by_id[i]["category_id"] == category]
            neighbours.append([by_id[i]["box"] for i in same[:5]])
            contexts.append([rows[by_id[i]["h5_id"]] for i in others if i not in same])
        names = [by_id[i]["category_name"] for i in det_ids]
        scores = [by_id[i]["score"] for i in det_ids]
        batches[image_id] = (locations, neighbours, contexts, names, scores)
    return batches


def read_nmtree(path, image_ids):
    """tools/eval_det.py of NMTree: the box of each detection of an image, by its place."""
    by_id, of_image = load_dets(path, image_ids)
    return {image: [by_id[i]["box"] for i in ids] for image, ids in of_image.items()}


def read_ref_nms(path, split):
    """eval_ref.py of the forks: the detections of each sentence of a split, each with the row of
    its features in one array for all splits."""
    dets = json.loads(path.read_bytes())
    by_id = {det["det_id"]: det for det in dets}
    rows = {det["h5_id"] for det in dets}
    assert len(by_id) == len(dets) and rows == set(range(len(dets)))
    of_sentence = {}
    for det in dets:
        if det["split"] == split:
            key = (det["ref_id"], det["sent_id"], det["image_id"])
            entry = (det["box"], det["category_id"], det["category_name"])
            assert by_id[det["h5_id"]] is det
            of_sentence.setdefault(key, []).append(entry)
    return of_sentence


def boxes_of(query, places):
    return query.boxes[places].tolist()


@pytest.mark.parametrize("name", ["mattnet", "nmtree"])
def test_near_copies_do_not_displace_real_neighbours(tmp_path, name):
    # Seven queries that all refine the boxes a little, and two other objects of the class.
    shifts = (0, 0.2, 0.4, 0.1, 0.3, 0.5, 0.6)
    image = [make_query(n, [2, 0], shift=shift) for n, shift in enumerate(shifts)]
    image[3] = make_query(3, [2, 0, 3, 4], shift=0.1)
    other = [make_query(20, [1], image_id=7)]
    path = export(FORMATS[name], tmp_path, image, other)
    by_id, of_image = load_dets(path, (1, 7))
    assert of_image == {1: [0, 1, 2, 3], 7: [4]}
    # The best kept of each: of equal confidences the one with the highest score.
    expected = boxes_of(image[3], [1]) + boxes_of(image[0], [0]) + boxes_of(image[3], [2, 3])
    assert np.allclose([by_id[i]["box"] for i in of_image[1]], expected)
    batches = read_mattnet(path, (1, 7), {1: (60, 90), 7: (60, 90)})
    locations, neighbours, contexts, names, scores = batches[1]
    assert np.allclose(locations[1], [20 / 90, 3 / 60, 39 / 90, 51 / 60, 20 * 49 / 5400])
    assert np.allclose(neighbours[1], boxes_of(image[3], [2, 3]))
    assert [len(each) for each in neighbours] == [0, 2, 2, 2]
    assert contexts[0] == [1, 2, 3] and contexts[2] == [0]
    assert names == ["cat", "dog", "dog", "dog"]
    assert np.allclose(scores, [0.95, 0.75, 0.65, 0.55])
    assert np.allclose(read_nmtree(path, (1, 7))[7], boxes_of(other[0], [0]))


def test_copies_of_another_class_or_with_less_overlap_stay(tmp_path):
    dog = make_query(1, [2])
    cat = make_query(2, [2], category_ids=np.array([17]), candidate_index=np.array([9]))
    away = make_query(3, [2], shift=1.2)  # IoU 18.8 / 21.2 = 0.887
    near = make_query(4, [2], shift=0.9)  # 19.1 / 20.9 = 0.914
    path = export(FORMATS["mattnet"], tmp_path, [dog, cat, away, near])
    boxes = read_nmtree(path, (1,))[1]
    assert np.allclose(boxes, boxes_of(dog, [0]) + boxes_of(away, [0]) + boxes_of(cat, [0]))


def test_ref_nms_forks_find_each_sentence_of_each_split(tmp_path):
    images = [
        [make_query(11, [0, 2], ref_id=5, split="val"), make_query(12, [2], ref_id=6, split="val")],
        [make_query(13, [1], image_id=2, ref_id=7, split="testA")],
    ]
    path = export(FORMATS["per-expression"], tmp_path, *images)
    found = read_ref_nms(path, "val") | read_ref_nms(path, "testA")
    assert read_ref_nms(path, "testB") == {}
    expected = {}
    for query in [*images[0], *images[1]]:
        entries = zip(
            query.boxes.tolist(), query.category_ids.tolist(), query.category_names, strict=True
        )
        expected[query.ref_id, query.query_id, query.image_id] = list(entries)
    assert found == expected


@pytest.mark.parametrize("key", ["det_id", "h5_id", "box", "image_id", "category_id"])
def test_a_missing_key_stops_the_readers_of_lists(tmp_path, key):
    image = [make_query(11, [0, 2], ref_id=5, split="val")]
    for name, read in (
        ("mattnet", lambda path: read_mattnet(path, (1,), {1: (60, 90)})),
        ("per-expression", lambda path: read_ref_nms(path, "val")),
    ):
        path = export(FORMATS[name], tmp_path, image)
        assert read(path)
        dets = json.loads(path.read_bytes())
        dets[1].pop(key)
        path.write_text(json.dumps(dets))
        with pytest.raises(KeyError, match=key):
            read(path)


# --- DDPN -----------------------------------------------------------------------------------------


def read_ddpn(folder, annotations, qid, imdb_name="refcoco", dim=D):
    """data_provider/multi_data_provider.py of DDPN: features and boxes of a query, padded to
    RPN_TOPN = 100 boxes. (There, an exception only prints a line.)"""
    iid = annotations[qid]["iid"]
    if "refcoco" in imdb_name or imdb_name == "refclef":
        name = "COCO_train2014_" + str(iid).zfill(12) + ".jpg.npz"
    else:
        name = str(iid) + ".jpg.npz"
    with np.load(folder / name) as arrays:
        features, num_boxes, boxes = arrays["x"], arrays["num_bbox"], arrays["bbox"]
        size = arrays["image_h"], arrays["image_w"]
    features = features.transpose((1, 0))
    features = features / np.sqrt((features**2).sum())
    padded, padded_boxes = np.zeros((100, dim)), np.zeros((100, 4))
    padded[:num_boxes, :] = features
    padded_boxes[:num_boxes, :] = boxes
    img_shape = np.zeros(2)
    img_shape[:] = size
    assert isinstance(int(iid), int)  # the last value of a batch
    return padded, padded_boxes, img_shape


def check_ddpn(found, objects, boxes, dim=D):
    features, found_boxes, size = found
    expected = features_of(objects, dim)
    expected = expected / np.sqrt((expected**2).sum())
    assert np.allclose(features[: len(objects)], expected) and not features[len(objects) :].any()
    assert np.allclose(found_boxes[: len(objects)], boxes)
    assert not found_boxes[len(objects) :].any() and size.tolist() == [60, 90]


@pytest.mark.parametrize("dim", [D, 3])
def test_ddpn_reads_images_and_queries(tmp_path, dim):
    """With `dim` 3 the features of the first query are square."""
    image = [
        make_query(41, [2, 0, 1], image_id=9, dim=dim, query="The cat's  tail"),
        make_query(42, [3], image_id=9, dim=dim),
    ]
    annotations = {
        "a": {"qstr": "the cat 's tail", "iid": 9, "boxes": [[1, 2, 30, 40]]},
        "b": {"qstr": "words of 42", "iid": "9", "boxes": [[5, 6, 7, 8]]},
    }
    (tmp_path / "format_val.pkl").write_bytes(pickle.dumps(annotations, protocol=2))
    (tmp_path / "format_test.json").write_text(json.dumps(annotations))
    files = (tmp_path / "format_val.pkl", tmp_path / "format_test.json")
    folder = export(DDPN(annotations=files), tmp_path, image)
    first = read_ddpn(folder / "images", annotations, "a", dim=dim)
    check_ddpn(
        first, [0, 1, 2, 3], image[0].corners[[1, 2, 0]].tolist() + image[1].corners.tolist(), dim
    )
    for copy in (
        pickle.loads((folder / "format_val.pkl").read_bytes()),
        json.loads((folder / "format_test.json").read_bytes()),
    ):
        assert [copy[qid]["iid"] for qid in "ab"] == [41, 42]
        assert copy["b"] == annotations["b"] | {"iid": 42}
        for qid, query, objects in (("a", image[0], [2, 0, 1]), ("b", image[1], [3])):
            found = read_ddpn(folder / "queries", copy, qid, dim=dim)
            check_ddpn(found, objects, query.corners, dim)


def test_ddpn_names(tmp_path):
    for names, file_name, imdb_name in (
        ("auto", "COCO_val2014_000000000009.jpg", "refcoco+"),
        ("auto", "000000000009.jpg", "refcocog"),
        ("coco", "12_9.png", "refclef"),
        ("auto", "9.png", "flickr30k"),
        ("plain", "000000000009.jpg", "flickr30k"),
    ):
        query = make_query(41, [0], image_id=9, image_name=file_name)
        folder = export(DDPN(names), tmp_path, [query])
        for below, iid in (("images", 9), ("queries", 41)):
            found = read_ddpn(folder / below, {"a": {"iid": iid}}, "a", imdb_name)
            check_ddpn(found, [0], query.corners)
    with pytest.raises(ValueError, match="ddpn names are 'none', expected auto, coco, plain"):
        DDPN("none")


@pytest.mark.parametrize("objects", [[0], [0, 1], list(range(D))])
def test_a_wrong_orientation_or_a_missing_key_stops_ddpn(tmp_path, objects):
    query = make_query(41, objects)
    path = export(DDPN(), tmp_path, [query]) / "queries" / "COCO_train2014_000000000041.jpg.npz"
    annotations = {"a": {"iid": 41}}
    check_ddpn(read_ddpn(path.parent, annotations, "a"), objects, query.corners)
    with np.load(path) as arrays:
        right = dict(arrays)
    np.savez(path, **right | {"x": right["x"].T})
    with pytest.raises((ValueError, AssertionError)):
        check_ddpn(read_ddpn(path.parent, annotations, "a"), objects, query.corners)
    for key in right:
        np.savez(path, **{name: value for name, value in right.items() if name != key})
        with pytest.raises(KeyError, match=key):
            read_ddpn(path.parent, annotations, "a")


def test_ddpn_has_room_for_100_boxes(tmp_path):
    with pytest.raises(ValueError, match=r"query 41 of image 1 has 101 boxes, .* 100 \(its RPN"):
        export(DDPN(), tmp_path, [make_query(41, range(101))])
    image = [make_query(41, range(0, 100)), make_query(42, range(100, 180))]
    folder = export(DDPN(), tmp_path, image)
    _, boxes, _ = read_ddpn(folder / "images", {"a": {"iid": 1}}, "a")
    assert np.allclose(boxes, image[0].corners)  # the most confident


def test_what_ddpn_cannot_look_up_is_refused(tmp_path):
    with pytest.raises(ValueError, match="query id '12#0' of image 1 is no integer"):
        export(DDPN(), tmp_path, [make_query("12#0", [0])])
    path = tmp_path / "format_val.json"
    catalog = [{"image_id": 1, "expressions": [{"sent_id": 4, "query": "a dog"}]}]
    path.write_text(
        json.dumps({"q1": {"qstr": "a dog", "iid": 1}, "q2": {"qstr": "cat", "iid": 1}})
    )
    message = r"format_val.json: 1 of 2 queries .* \(the first is 'q2': image 1, 'cat'\)"
    with pytest.raises(ValueError, match=message):
        DDPN(annotations=[path]).check(catalog)
    path.write_text(json.dumps({"q1": {"iid": 1}}))
    with pytest.raises(ValueError, match=r"format_val\.json: query 'q1' has no 'qstr'"):
        DDPN(annotations=[path]).check(catalog)
    path = tmp_path / "format_val.pkl"
    path.write_bytes(pickle.dumps({"q1": np.float32}))
    with pytest.raises(ValueError, match=r"format_val\.pkl: refused"):
        DDPN(annotations=[path]).check(catalog)


# --- bottom-up-attention, LXMERT, ALBEF -----------------------------------------------------------


def read_tsv(path, columns):
    """Lines of TSV as dicts: csv.DictReader of both readers, the numbers and arrays as they decode
    them.

    Args:
        columns: names with the type of the column; a NumPy type for base64.
    """
    with path.open(newline="") as file:
        for line in csv.reader(file, delimiter="\t"):
            item = dict(zip(columns, line, strict=True))
            for name, kind in columns.items():
                content = item[name]
                if kind in (int, str):
                    item[name] = kind(content)
                else:
                    item[name] = np.frombuffer(base64.b64decode(content), kind)
            yield item


def read_bottom_up(path):
    """tools/read_tsv.py of bottom-up-attention: by image id, two matrices of float32."""
    columns = dict.fromkeys(("image_id", "image_w", "image_h", "num_boxes"), int)
    items = {}
    for item in read_tsv(path, columns | dict.fromkeys(("boxes", "features"), np.float32)):
        for name in ("boxes", "features"):
            item[name] = item[name].reshape(item["num_boxes"], -1)
        items[item["image_id"]] = item
    return items


LXMERT = {
    "img_id": str, "img_h": int, "img_w": int, "objects_id": np.int64, "objects_conf": np.float32,
    "attrs_id": np.int64, "attrs_conf": np.float32, "num_boxes": int, "boxes": np.float32,
    "features": np.float32,
}  # fmt: skip


def read_lxmert(path):
    """load_obj_tsv of LXMERT, and the check of its tasks that boxes lie in the image."""
    items = list(read_tsv(path, LXMERT))
    for item in items:
        n = item["num_boxes"]
        item["boxes"], item["features"] = (
            item["boxes"].reshape(n, 4),
            item["features"].reshape(n, -1),
        )
        assert all(len(item[name]) == n for name in LXMERT if LXMERT[name] not in (int, str))
        scaled = item["boxes"] / np.array([item["img_w"], item["img_h"]] * 2)
        assert scaled.min() >= 0 and scaled.max() < 1 + 1e-5
    return items


def test_bottom_up_has_a_line_an_image_without_near_copies(tmp_path):
    image = [make_query(11, [2, 0]), make_query(12, [2, 1], shift=0.2), make_query(13, [])]
    path = export(BottomUp(boxes=(5, 100)), tmp_path, image, [make_query(14, [], image_id=2)])
    found = read_bottom_up(path)
    assert list(found) == [1]  # a line without boxes would stop the reader
    item = found[1]
    assert (item["image_w"], item["image_h"], item["num_boxes"]) == (90, 60, 5)
    distinct = np.concatenate([image[0].corners[[1]], image[1].corners[[1]], image[0].corners[[0]]])
    assert np.array_equal(item["boxes"], distinct[[0, 1, 2, 0, 1]])
    expected = np.concatenate(
        [features_of([0]), features_of([1]) + np.float32(0.2), features_of([2])]
    )
    assert np.array_equal(item["features"], expected[[0, 1, 2, 0, 1]])
    path = export(BottomUp(boxes=(1, 2)), tmp_path, image)
    assert np.array_equal(read_bottom_up(path)[1]["boxes"], distinct[:2])


def test_bottom_up_has_a_line_a_query_by_its_id(tmp_path):
    image = [make_query(11, [2, 0]), make_query(12, [3])]
    found = read_bottom_up(export(BottomUp(boxes=(1, 100), per_query=True), tmp_path, image))
    assert list(found) == [11, 12]
    assert np.array_equal(found[11]["features"], features_of([0, 2]))
    assert np.array_equal(found[12]["boxes"], image[1].corners)
    catalog = [{"image_id": 1, "expressions": [{"sent_id": "a"}]}]
    with pytest.raises(ValueError, match="query id 'a' of image 1 is no integer"):
        BottomUp(per_query=True).check(catalog)


def test_lxmert_reads_its_ten_columns(tmp_path):
    image = [make_query(11, [2, 0])]
    [item] = read_lxmert(export(BottomUp("lxmert", (2, 36)), tmp_path, image))
    assert (item["img_id"], item["img_h"], item["img_w"]) == ("1", 60, 90)
    assert item["objects_id"].tolist() == [17, 18]
    assert np.array_equal(item["objects_conf"], image[0].cls_scores[[1, 0]])
    assert not item["attrs_id"].any() and not item["attrs_conf"].any()
    assert np.array_equal(item["boxes"], image[0].corners[[1, 0]])
    assert np.array_equal(item["features"], features_of([0, 2]))


def read_albef(path, maps):
    """`grounding_eval` in dataset/utils.py of ALBEF: the best box of each image.

    Args:
        maps: attention [H, W] by image id.
    """
    dets, best = json.loads(path.read_bytes()), {}
    for image_id, attention in maps.items():
        max_score, box = 0, None
        for det in dets[str(image_id)]:
            rows = slice(int(det[1]), int(det[1] + det[3]))
            score = attention[rows, int(det[0]) : int(det[0] + det[2])].sum()
            score = score / (det[2] * det[3]) ** 0.5
            if score > max_score:
                max_score, box = score, det[:4]
        best[image_id] = box
    return dets, best


def test_albef_finds_a_box_in_each_image(tmp_path):
    image = [make_query(11, [2, 0]), make_query(12, [2, 1], shift=0.2)]
    thin = np.array([[10.2, 3, 10.8, 20]], np.float32)  # no pixel from int(10.2) to int(10.8)
    boxes = np.array([[10.2, 3, 0.6, 17]], np.float32)
    other = [make_query(13, [0], image_id=2, corners=thin, boxes=boxes)]
    path = export(FORMATS["albef"], tmp_path, image, other, [make_query(14, [], image_id=3)])
    attention = np.zeros((60, 90))
    attention[10:40, 25:45] = 1
    dets, best = read_albef(path, {1: attention, 2: np.ones((60, 90)), 3: attention})
    expected = boxes_of(image[0], [1]) + boxes_of(image[1], [1]) + boxes_of(image[0], [0])
    assert np.allclose(dets["1"], expected)
    assert best == {1: dets["1"][2], 2: [0, 0, 90, 60], 3: [0, 0, 90, 60]}
    assert export(FORMATS["albef"], tmp_path).read_bytes() == b"{\n}\n"


# --- SCAN and IMRAM -------------------------------------------------------------------------------


def read_precomp(folder, split, array):
    """data.py of SCAN and IMRAM: what the data set of a split gives for each index."""
    captions = [line.strip() for line in (folder / f"{split}_caps.txt").open("rb")]
    images = np.load(folder / f"{split}_{array}.npy")
    length = len(captions)
    im_div = 5 if len(images) != length else 1
    if split == "dev":
        length = 5000
    return [(images[i // im_div], captions[i].decode()) for i in range(length)]


def read_evaluation(pairs):
    """evaluation.py of both: of image i the row 5i, for all captions."""
    assert len(pairs) % 5 == 0
    return [image for image, _ in pairs[::5]], [caption for _, caption in pairs]


def captioned(image_id, count=5, split="train", objects=(3, 1)):
    """An image with captions, each with its own boxes."""
    return [
        make_query(10 * image_id + n, list(objects), image_id, float(n), split=split)
        for n in range(count)
    ]


FORMATS_OF_RETRIEVAL = pytest.mark.parametrize(("make", "array"), [(Scan, "ims"), (Imram, "feat")])


@FORMATS_OF_RETRIEVAL
def test_retrieval_trains_with_each_captions_own_boxes(tmp_path, make, array):
    images = [captioned(4, 6), captioned(2, 5, "restval"), captioned(3, 7, objects=[4])]
    folder = export(make(3), tmp_path, *images)
    pairs = read_precomp(folder, "train", array)
    expected = [query for image in images for query in image[:5]]
    assert [caption for _, caption in pairs] == [query.query for query in expected]
    for (features, _), query in zip(pairs, expected, strict=True):
        assert features.dtype == np.float32
        assert np.array_equal(features, np.tile(query.features, (3, 1))[:3])
    of_images, captions = read_evaluation(pairs)
    assert [captions[5 * i] for i in range(3)] == [image[0].query for image in images]
    assert np.array_equal(of_images[2][0], images[2][0].features[0])


@FORMATS_OF_RETRIEVAL
def test_retrieval_takes_5000_captions_of_dev(tmp_path, make, array):
    images = [captioned(i, split="val") for i in range(1000)]
    folder = export(make(2), tmp_path, *images)
    pairs = read_precomp(folder, "dev", array)
    assert np.array_equal(pairs[4999][0], images[999][4].features)
    assert pairs[4999][1] == "words of 9994"


@FORMATS_OF_RETRIEVAL
def test_less_of_dev_than_retrieval_reads_is_told(tmp_path, make, array, caplog):
    images = [captioned(i, split="val") for i in range(999)]
    folder = export(make(2), tmp_path, *images)
    with pytest.raises(IndexError):
        read_precomp(folder, "dev", array)
    [message] = [each.getMessage() for each in caplog.records]
    assert (
        f"{make.name}: {folder} has 4995 captions of dev, but SCAN and IMRAM read 5000" in message
    )
    caplog.clear()
    (tmp_path / "more").mkdir()
    export(make(2), tmp_path / "more", *images, captioned(999, split="val"), captioned(1000))
    assert not caplog.records


@FORMATS_OF_RETRIEVAL
def test_what_retrieval_would_read_wrong_is_refused(tmp_path, make, array):
    few, catalog = captioned(4, 4), [{"image_id": 4, "expressions": [{"split": "train"}] * 4}]
    message = f"{make.name}: image 4 has 4 captions, but the reader takes 5"
    with pytest.raises(ValueError, match=message):
        export(make(3), tmp_path, captioned(1), few)
    with pytest.raises(ValueError, match=message):
        make(3).check(catalog)
    with pytest.raises(ValueError, match=r"image 4 has the split 'test'.*easier protocol.*--allow"):
        export(make(3), tmp_path, captioned(4, split="test"))
    for split in (None, "testA"):
        with pytest.raises(ValueError, match=f"image 4 has the splits {{{split!r}}}, expected"):
            export(make(3), tmp_path, captioned(4, split=split))
    folder = export(make(3, allow_test=True), tmp_path, captioned(4, split="test"))
    assert len(read_precomp(folder, "test", array)) == 5
