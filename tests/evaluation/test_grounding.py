"""REC, RES and phrase grounding, against hand-computed cases and a plain loop."""

from __future__ import annotations

import json
import logging

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from dataset_folders import make_flickr30k_entities_folder
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils import comm

from vlnms_d2.data.datasets.flickr30k import load_flickr30k_entities
from vlnms_d2.evaluation.grounding import (
    MASK_THRESHOLDS,
    PhraseGroundingEvaluator,
    RECEvaluator,
    RESEvaluator,
    decode_mask,
)

HEIGHT, WIDTH = 40, 60
A, B = [0, 0, 20, 20], [30, 10, 20, 20]  # xywh


def annotation(ann_id, box, segmentation=None):
    x, y, w, h = box
    corners = [x, y, x + w, y, x + w, y + h, x, y + h]
    return {
        "id": ann_id,
        "bbox": list(box),
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 0,
        "segmentation": [corners] if segmentation is None else segmentation,
    }


def expression(sent_id, ann_id, manner=None, **more):
    return {"sent_id": sent_id, "ann_id": ann_id, "manner": manner, "query": "words", **more}


def image(image_id, expressions, annotations=None):
    annotations = [annotation(1, A), annotation(2, B)] if annotations is None else annotations
    return {
        "image_id": image_id,
        "file_name": f"{image_id}.jpg",
        "height": HEIGHT,
        "width": WIDTH,
        "annotations": annotations,
        "expressions": expressions,
    }


def answers(boxes, scores, query_index, masks=None):
    instances = Instances((HEIGHT, WIDTH))
    instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).view(-1, 4))
    instances.scores = torch.tensor(scores, dtype=torch.float32)
    instances.query_index = torch.tensor(query_index, dtype=torch.int64)
    if masks is not None:
        instances.pred_masks = torch.as_tensor(masks)
    return instances


def asked(one, instances):
    queries = [e["query"] for e in one["expressions"]]
    image_input = {"image_id": one["image_id"], "file_name": one["file_name"], "query": queries}
    return [image_input], [{"instances": instances}]


def xyxy(box):
    x, y, w, h = box
    return [x, y, x + w, y + h]


def run(evaluator, *batches):
    evaluator.reset()
    for batch in batches:
        evaluator.process(*batch)
    return evaluator.evaluate()


TWO = image(7, [expression(1, 1, "short"), expression(2, 2, "long"), expression(3, 2, "long")])
ANSWERS = answers(
    # The best comes last; a tie, of which the first counts; nothing for the third.
    [xyxy(B), xyxy(A), xyxy(B), xyxy(A)],
    [0.2, 0.9, 0.5, 0.5],
    [0, 0, 1, 1],
)


# --- REC ---------------------------------------------------------------------------------------


def test_rec_by_hand():
    evaluator = RECEvaluator("toy", [TWO])
    flat = run(evaluator, asked(TWO, ANSWERS))["rec"]
    assert flat["expressions"] == 3
    assert flat["accuracy"] == pytest.approx(200 / 3)
    assert flat["mean_iou"] == pytest.approx(200 / 3)
    assert (flat["accuracy-short"], flat["accuracy-long"]) == (100.0, 50.0)
    assert "long" in evaluator._report(evaluator.results)[0]


def test_an_iou_of_exactly_one_half_is_no_hit():
    one = image(1, [expression(1, 1)])
    half, more = [0, 0, 20, 10], [0, 0, 20, 11]
    for box, accuracy in ((half, 0.0), (more, 100.0)):
        flat = run(RECEvaluator("toy", [one]), asked(one, answers([xyxy(box)], [1.0], [0])))
        assert flat["rec"]["accuracy"] == accuracy


def test_random_answers_against_a_plain_loop():
    rng = np.random.default_rng(0)
    images, batches, ious = [], [], []
    for image_id in range(6):
        expressions = [expression(10 * image_id + k, 1 + k % 2) for k in range(4)]
        one = image(image_id, expressions)
        corner = rng.uniform(0, 30, (12, 2))
        boxes = np.hstack([corner, corner + rng.uniform(5, 25, (12, 2))])
        scores, query = rng.random(12), np.sort(rng.integers(0, 4, 12))
        images.append(one)
        batches.append(asked(one, answers(boxes, scores, query)))
        for k, spoken in enumerate(expressions):
            of_query = [i for i in range(12) if query[i] == k]
            if not of_query:
                ious.append(0.0)
                continue
            x1, y1, x2, y2 = boxes[max(of_query, key=lambda i: scores[i])]
            tx1, ty1, tx2, ty2 = xyxy(A if spoken["ann_id"] == 1 else B)
            width = max(0.0, min(x2, tx2) - max(x1, tx1))
            inter = width * max(0.0, min(y2, ty2) - max(y1, ty1))
            ious.append(inter / ((x2 - x1) * (y2 - y1) + 400 - inter))
    flat = run(RECEvaluator("toy", images), *batches)["rec"]
    assert flat["accuracy"] == pytest.approx(100 * np.mean([iou > 0.5 for iou in ious]))
    assert flat["mean_iou"] == pytest.approx(100 * np.mean(ious), abs=1e-4)


def test_an_input_without_queries_is_skipped_and_an_image_counts_once():
    alone = [{"image_id": 7, "file_name": "7.jpg"}], [{"instances": Instances((HEIGHT, WIDTH))}]
    flat = run(RECEvaluator("toy", [TWO]), alone, asked(TWO, ANSWERS), asked(TWO, ANSWERS))
    assert flat["rec"]["expressions"] == 3


def test_the_expressions_of_the_input_name_the_queries():
    (image_input,), _ = asked(TWO, ANSWERS)
    image_input["query"] = ["words"]
    image_input["expressions"] = [{"sent_id": 2, "manner": "long"}]
    evaluator = RECEvaluator("toy", [TWO])
    flat = run(evaluator, ([image_input], [{"instances": answers([xyxy(B)], [1.0], [0])}]))
    assert flat["rec"]["expressions"] == 1
    assert flat["rec"]["accuracy-long"] == 100.0


def test_two_processes_equal_one(monkeypatch):
    images = [image(i, [expression(i, 1, "m")]) for i in range(3)]
    batches = [
        asked(one, answers([xyxy(A if i else B)], [1.0], [0])) for i, one in enumerate(images)
    ]
    whole = RECEvaluator("toy", images)
    run(whole, *batches)
    parts = [RECEvaluator("toy", images), RECEvaluator("toy", images)]
    # Padding of a sampler: the first image is processed twice.
    for part, share in zip(parts, (batches[:2], [batches[2], batches[0]]), strict=True):
        part.reset()
        for batch in share:
            part.process(*batch)
    gathered = [part._records for part in parts]
    monkeypatch.setattr(comm, "gather", lambda data, dst: gathered[::-1])
    parts[0].evaluate()
    assert parts[0].results == whole.results
    monkeypatch.setattr(comm, "gather", lambda data, dst: [])
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    assert parts[1].evaluate() == {}


def test_the_file(tmp_path):
    evaluator = RECEvaluator("toy", [TWO], output_dir=str(tmp_path / "new"))
    run(evaluator, asked(TWO, ANSWERS))
    written = json.loads((tmp_path / "new" / "rec_toy.json").read_text())
    assert written == evaluator.results
    assert written["task"] == "rec"


def test_no_expressions(caplog):
    evaluator = RECEvaluator("toy", [TWO])
    evaluator.reset()
    with caplog.at_level(logging.WARNING):
        assert evaluator.evaluate() == {}
    assert "Did not receive any expressions" in caplog.text


def test_errors_name_what_is_wrong():
    stranger = image(8, [expression(1, 1)])
    with pytest.raises(ValueError, match=r"8\.jpg: image id 8 is not of toy"):
        RECEvaluator("toy", [TWO]).process(*asked(stranger, ANSWERS))
    caption = image(7, [expression(1, None)])
    with pytest.raises(ValueError, match=r"expression 1 of 7\.jpg has no annotated referent"):
        RECEvaluator("toy", [caption]).process(*asked(caption, answers([], [], [])))
    (image_input,), outputs = asked(TWO, ANSWERS)
    image_input["expressions"] = [{"sent_id": 99, "manner": None}]
    with pytest.raises(ValueError, match=r"99.*is not of toy"):
        RECEvaluator("toy", [TWO]).process([image_input], outputs)
    inputs, outputs = asked(TWO, answers([xyxy(A)], [1.0], [0]))
    outputs[0]["instances"].remove("query_index")
    with pytest.raises(ValueError, match="query_index"):
        RECEvaluator("toy", [TWO]).process(inputs, outputs)


# --- RES ---------------------------------------------------------------------------------------


def rectangle(box):
    x, y, w, h = box
    mask = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    mask[y : y + h, x : x + w] = True
    return mask


def test_res_by_hand():
    one = image(1, [expression(1, 1), expression(2, 2), expression(3, 2)])
    masks = torch.stack([rectangle([0, 0, 20, 15]), rectangle([30, 10, 20, 20])])
    given = answers([xyxy(A), xyxy(B)], [1.0, 1.0], [0, 1], masks)
    flat = run(RESEvaluator("toy", [one]), asked(one, given))["res"]
    # Intersections 300, 400 and 0 (no answer), unions 400 each.
    assert flat["overall_iou"] == pytest.approx(100 * 700 / 1200)
    # IoUs 0.75, 1 and 0.
    expected = {0.5: 2, 0.6: 2, 0.7: 2, 0.8: 1, 0.9: 1}
    for threshold in MASK_THRESHOLDS:
        assert flat[f"pr@{threshold}"] == pytest.approx(100 * expected[threshold] / 3)


def test_res_takes_rle_and_empty_masks():
    rle = mask_util.encode(np.asfortranarray(rectangle(A).numpy().astype(np.uint8)))
    nothing = [[1.0, 1.0, 2.0, 2.0]]  # two points: no area
    one = image(
        1,
        [expression(1, 1), expression(2, 2)],
        [annotation(1, A, rle), annotation(2, B, nothing)],
    )
    masks = torch.stack([rectangle(A), torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)])
    given = answers([xyxy(A), xyxy(B)], [1.0, 1.0], [0, 1], masks)
    flat = run(RESEvaluator("toy", [one]), asked(one, given))["res"]
    assert flat["overall_iou"] == 100.0
    assert flat["pr@0.9"] == 100.0


@pytest.mark.parametrize("counts", ["compressed", "list"])
def test_polygons_and_both_kinds_of_rle_are_the_same_mask(counts):
    truth = rectangle(B).numpy()
    if counts == "compressed":
        rle = mask_util.encode(np.asfortranarray(truth.astype(np.uint8)))
    else:
        flat = truth.ravel(order="F").astype(int)
        changes = np.flatnonzero(np.diff(flat)) + 1
        rle = {
            "size": [HEIGHT, WIDTH],
            "counts": np.diff([0, *changes, len(flat)]).tolist(),
        }
    np.testing.assert_array_equal(decode_mask(rle, HEIGHT, WIDTH), truth)
    # REFER's own reader decodes a list of RLE, as RefCLEF has it, and adds the masks up.
    np.testing.assert_array_equal(decode_mask([rle], HEIGHT, WIDTH), truth)
    other = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    other[0] = 1
    both = [rle, mask_util.encode(np.asfortranarray(other))]
    if counts == "list":
        both[1] = {"size": [HEIGHT, WIDTH], "counts": [0] + [1, HEIGHT - 1] * WIDTH}
    np.testing.assert_array_equal(decode_mask(both, HEIGHT, WIDTH), truth | (other > 0))
    polygons = annotation(2, B)["segmentation"]
    np.testing.assert_array_equal(decode_mask(polygons, HEIGHT, WIDTH), truth)


def test_res_says_what_is_missing():
    with pytest.raises(ValueError, match="MASK_ON"):
        RESEvaluator("toy", [TWO]).process(*asked(TWO, ANSWERS))
    bare = image(1, [expression(1, 1)], [{**annotation(1, A), "segmentation": None}])
    with pytest.raises(ValueError, match=r"annotation 1 of 1\.jpg has no 'segmentation'"):
        RESEvaluator("toy", [bare]).process(*asked(bare, answers([xyxy(A)], [1.0], [0])))


# --- phrase grounding --------------------------------------------------------------------------


def test_phrases_of_a_flickr30k_entities_folder_by_type(tmp_path):
    make_flickr30k_entities_folder(tmp_path)
    folder = tmp_path / "flickr30k_entities"
    (one,) = load_flickr30k_entities(folder, tmp_path, "val")
    spoken = one["expressions"]
    kinds = [tuple(e["phrase_type"]) for e in spoken]
    assert len(set(kinds)) > 1
    boxes = {a["id"]: xyxy(a["bbox"]) for a in one["annotations"]}
    # Right for all phrases of the first one's types, elsewhere for the others.
    right = [kind == kinds[0] for kind in kinds]
    chosen = [
        boxes[e["ann_id"]] if hit else [0.0, 0.0, 1.0, 1.0]
        for e, hit in zip(spoken, right, strict=True)
    ]
    given = answers(chosen, [1.0] * len(spoken), list(range(len(spoken))))
    evaluator = PhraseGroundingEvaluator("phrases", [one])
    flat = run(evaluator, asked(one, given))["phrase_grounding"]
    assert flat["expressions"] == len(spoken)
    assert flat["accuracy"] == pytest.approx(100 * np.mean(right))
    for kind in {kind for types in kinds for kind in types}:
        hits = [hit for hit, types in zip(right, kinds, strict=True) if kind in types]
        assert flat[f"accuracy-type:{kind}"] == pytest.approx(100 * np.mean(hits))
        assert evaluator.results["groups"][f"type:{kind}"]["expressions"] == len(hits)


def test_a_chain_of_several_boxes_is_hit_by_their_union(tmp_path):
    make_flickr30k_entities_folder(tmp_path)
    (one,) = load_flickr30k_entities(tmp_path / "flickr30k_entities", tmp_path, "val")
    several = next(e for e in one["expressions"] if e["context_ann_ids"])
    one["expressions"] = [several]
    boxes = {a["id"]: xyxy(a["bbox"]) for a in one["annotations"]}
    parts = [boxes[i] for i in several["context_ann_ids"]]
    union = [*np.min(parts, axis=0)[:2], *np.max(parts, axis=0)[2:]]
    for box, accuracy in ((union, 100.0), (parts[0], 0.0)):
        evaluator = PhraseGroundingEvaluator("phrases", [one])
        flat = run(evaluator, asked(one, answers([box], [1.0], [0])))
        assert flat["phrase_grounding"]["accuracy"] == accuracy
