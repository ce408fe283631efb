"""Recall of what captions mention: the detector alone, Category and an oracle of the words; and of
what expressions mean."""

import json

import cv2
import numpy as np
import pytest
import torch
from torchvision.ops import batched_nms, box_iou

import portable_table
from portable_study.photos import split_of
from reranking.annotations import Mentioned
from reranking.recall import (
    METHODS,
    load_matches,
    match_mentions,
    oracle_relatedness,
    recall_of_mentions,
    save_matches,
)

NAMES = ["cat", "dog"]


def mentioned(boxes, classes=(0,)) -> Mentioned:
    return Mentioned(np.array(boxes, dtype=np.float32).reshape(-1, 4), classes)


def line_of_boxes(count: int) -> np.ndarray:
    """Boxes beside each other."""
    return np.arange(count)[:, None] * [20.0, 0, 20, 0] + [0, 0, 10, 10]


def test_the_oracle_knows_the_categories():
    relatedness = oracle_relatedness(
        [mentioned([], (0,)), mentioned([], (0, 1))], np.array([0, 1, 0])
    )
    assert relatedness.dtype == np.float32
    assert np.allclose(relatedness, [[1, 0.05, 1], [1, 1, 1]])
    assert oracle_relatedness([mentioned([])], np.zeros(0, np.int64)).shape == (1, 0)


def test_recall_by_hand():
    """Twelve dogs are surer than two cats, of which the caption speaks."""
    boxes = line_of_boxes(14)
    scores = np.array([*np.linspace(0.9, 0.6, 12), 0.5, 0.4])
    classes = np.array([1] * 12 + [0] * 2)
    related = np.where(classes == 0, 0.9, 0.5)[None].astype(np.float32)
    speaks_of = mentioned([*boxes[12:], [500, 0, 600, 10]])  # no proposal hits the third
    matches = match_mentions(boxes, scores, classes, NAMES, related, [speaks_of], 0.5)
    results = recall_of_mentions(matches)
    assert results["captions"] == 1 and set(results["methods"]) == set(METHODS)

    def recall(method, kind, number):
        return results["methods"][method][kind][number]["recall"]

    assert recall("detector", "top", "5") == recall("detector", "top", "10") == 0
    # .45 and .36 beside the dogs' .45, .4364, .4227, ...: first and eighth or so.
    assert recall("category", "top", "5") == pytest.approx(100 / 3)
    assert recall("category", "top", "10") == pytest.approx(200 / 3)
    assert recall("oracle", "top", "5") == pytest.approx(200 / 3)
    assert recall("oracle", "mean", "3") == pytest.approx(200 / 3)
    assert results["methods"]["oracle"]["mean"]["3"]["proposals"] == 3
    assert results["methods"]["detector"]["top"]["10"]["proposals"] == 10


def test_it_is_the_mean_over_captions_of_the_share_that_is_hit():
    """Against the definition, written again with other code."""
    rng = np.random.default_rng(0)
    matches = {method: [] for method in METHODS}
    shares = []
    for _ in range(6):
        corners = rng.uniform(0, 50, (60, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(10, 40, (60, 2))], axis=1)
        scores, classes = rng.random(60), rng.integers(0, 2, 60)
        targets = [mentioned(boxes[rng.choice(60, n)] + rng.uniform(-6, 6, (n, 4))) for n in (1, 4)]
        related = rng.random((2, 60)).astype(np.float32)
        for method, of_image in match_mentions(
            boxes, scores, classes, NAMES, related, targets, 0.4
        ).items():
            matches[method] += of_image
        for row, target in zip(related, targets, strict=True):
            fused = torch.tensor(scores).float() * torch.tensor(row)
            corners32 = torch.tensor(boxes).float()
            kept = batched_nms(corners32, fused, torch.tensor(classes), 0.4)[:5]
            iou = box_iou(corners32[kept], torch.tensor(target.boxes))
            shares.append((iou > 0.5).any(dim=0).float().mean().item())
    top = recall_of_mentions(matches)["methods"]["category"]["top"]["5"]
    assert top["recall"] == pytest.approx(100 * np.mean(shares)) and 0 < top["recall"] < 100


def test_thresholds_are_each_methods_own_and_the_best_stays():
    boxes, classes = line_of_boxes(20), np.zeros(20, np.int64)
    sure = match_mentions(
        boxes, np.linspace(0.9, 0.5, 20), classes, NAMES, np.full((1, 20), 0.1, np.float32),
        [mentioned(boxes[:1])], 0.5,
    )  # fmt: skip
    unsure = match_mentions(
        boxes, np.linspace(0.4, 0.1, 20), classes, NAMES, np.full((1, 20), 0.1, np.float32),
        [mentioned(boxes[:1])], 0.5,
    )  # fmt: skip
    results = recall_of_mentions({m: sure[m] + unsure[m] for m in METHODS})["methods"]
    for method in METHODS:
        point = results[method]["mean"]["3"]
        # Five of the sure caption and the best of the unsure one.
        assert point["proposals"] == 3 and point["recall"] == 100
    assert results["category"]["mean"]["3"]["threshold"] < 0.1
    assert results["detector"]["mean"]["3"]["threshold"] > 0.5


def test_an_image_without_detections_counts_as_missed():
    none = np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64)
    missed = match_mentions(
        *none, NAMES, np.zeros((1, 0), np.float32), [mentioned([[0, 0, 9, 9]])], 0.5
    )
    boxes = line_of_boxes(1)
    hit = match_mentions(
        boxes, np.ones(1), np.zeros(1, np.int64), NAMES, np.ones((1, 1), np.float32),
        [mentioned(boxes)], 0.5,
    )  # fmt: skip
    results = recall_of_mentions({m: missed[m] + hit[m] for m in METHODS})
    assert results["methods"]["detector"]["top"]["5"] == {"recall": 50.0, "proposals": 0.5}


def test_saved_matches_are_those_that_were_made(tmp_path):
    boxes = line_of_boxes(12)
    scores, classes = np.linspace(0.9, 0.3, 12), np.arange(12) % 2
    related = np.linspace(0, 1, 24, dtype=np.float32).reshape(2, 12)
    targets = [mentioned(boxes[3:6]), mentioned(boxes[:1] + 500)]
    matches = match_mentions(boxes, scores, classes, NAMES, related, targets, 0.5)
    files = [tmp_path / name for name in ("a.npz", "b.npz", "c.npz")]
    save_matches(files[0], {method: of_both[:1] for method, of_both in matches.items()})
    save_matches(files[1], {method: [] for method in METHODS})
    save_matches(files[2], {method: of_both[1:] for method, of_both in matches.items()})
    assert recall_of_mentions(load_matches(files)) == recall_of_mentions(matches)


# --- referents of expressions, by tools/portable_table.py --------------------------------------

CUPS = {"red": [20, 40, 50, 60], "blue": [130, 40, 50, 60]}  # xywh


@pytest.fixture
def photos(tmp_path):
    """Two photos of a red and a blue cup; the detector is surer of the blue one."""
    (tmp_path / "photos").mkdir()
    ids = [i for i in range(100) if split_of(i) == "report"][:2]
    pixels = np.full((150, 200, 3), 200, np.uint8)
    for colour, (x, y, w, h) in CUPS.items():
        pixels[y : y + h, x : x + w] = (30, 30, 220) if colour == "red" else (220, 60, 30)
    boxes = [(image_id, box) for image_id in ids for box in CUPS.values()]
    annotations = [
        {"id": n, "image_id": image_id, "category_id": 47, "bbox": box, "iscrowd": 0}
        for n, (image_id, box) in enumerate(boxes)
    ]
    scores = (0.4, 0.9)
    found = [
        {"image_id": i, "category_id": 47, "bbox": box, "score": scores[n % 2]}
        for n, (i, box) in enumerate(boxes)
    ]
    images = [{"id": i, "file_name": f"{i}.png", "height": 150, "width": 200} for i in ids]
    categories = [{"id": 47, "name": "cup"}]
    contents = {
        "instances": {"images": images, "annotations": annotations, "categories": categories},
        "captions": {"annotations": [{"image_id": ids[0], "id": 1, "caption": "two cups"}]},
        "detections_nanodet_plus": found,
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    for i in ids:
        cv2.imwrite(str(tmp_path / "photos" / f"{i}.png"), pixels)
    x, y, w, h = CUPS["red"]
    sample = {"query": "the red cup", "box": [x, y, x + w, y + h]}
    lines = [json.dumps({"image_id": i, **sample}) for i in [*ids, 999_999]]  # of no photo
    (tmp_path / "samples.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_the_table_has_the_recall_of_each_method(photos, capsys):
    words = ["--data", str(photos), "--samples", str(photos / "samples.jsonl")]
    out = photos / "out"
    assert portable_table.main([*words, "--pictures", "1", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    table = printed[printed.index("Samples: 2 expressions on 2 photos") :].splitlines()
    rows = {row.split("|")[1].strip(): row.split("|")[2:7] for row in table[3:7]}
    first = {method: float(cells[0].split(" ")[1]) for method, cells in rows.items()}
    # Only the picture tells which cup is red; both are among the first three.
    assert first["detector alone"] == first["Category"] == 0 and first["Portable"] == 100
    assert {cells[1].split()[0] for cells in rows.values()} == {"100.0"}
    assert {cells[4].strip() for cells in rows.values()} == {"0"}  # none lost
    assert printed.startswith("Templates (report): ") and "on 2 photos" in printed
    assert "1 wins and" in printed and cv2.imread(str(out / "win_00.jpg")) is not None


def test_a_missing_photo_is_named(photos, capsys):
    next((photos / "photos").iterdir()).unlink()
    assert portable_table.main(["--data", str(photos)]) == 1
    assert ".png: no such photo" in capsys.readouterr().err
