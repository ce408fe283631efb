"""Tests of the recall evaluator, against hand-computed cases and a plain loop."""

import json
import logging

import numpy as np
import pytest
import torch
from detectron2.evaluation import print_csv_format
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm

from vlnms_d2.evaluation import ProposalRecallEvaluator, base
from vlnms_d2.evaluation.matching import NEVER, Match, MatchTable
from vlnms_d2.evaluation.recall import METHODS, flat_results, format_table, misses_cut

SIZE = (400, 600)
FAR = [500.0, 300.0, 520.0, 320.0]


def proposals(boxes, scores, query_index=None):
    instances = Instances(SIZE)
    instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).view(-1, 4))
    instances.scores = torch.tensor(scores, dtype=torch.float32)
    instances.pred_classes = torch.zeros(len(scores), dtype=torch.int64)
    if query_index is not None:
        instances.query_index = torch.tensor(query_index, dtype=torch.int64)
    return instances


def expression(sent_id, referent, context=(), manner="refcoco"):
    context = None if context is None else list(context)
    return {
        "sent_id": sent_id,
        "manner": manner,
        "referent_box": referent,
        "context_boxes": context,
    }


def batch(image_id, expressions, alone, asked):
    """A batch of one image, and what `predict_with_detector` returns for it."""
    image = {"image_id": image_id, "file_name": f"{image_id}.jpg"}
    queries = ["words"] * len(expressions)
    inputs = [{**image, "query": queries, "expressions": expressions}]
    return inputs, [{"instances": asked, "detector": alone}]


def box(left, top, width=100.0, height=100.0):
    return [left, top, left + width, top + height]


A, B, C = box(0, 0), box(150, 0), box(300, 0)


def hand_made():
    """Two expressions on one image.

    The detector ranks FAR, A, B; VL-NMS ranks A, C for the first and C, FAR for the second, whose
    referent is B: no proposal for it hits.
    """
    expressions = [expression(1, A, [B, C]), expression(2, B, [C], manner="refcocog")]
    alone = proposals([FAR, A, B], [0.9, 0.8, 0.3])
    asked = proposals([A, C, C, FAR], [0.7, 0.2, 0.6, 0.5], [0, 0, 1, 1])
    return batch(7, expressions, alone, asked)


def evaluated(*batches, **kwargs):
    evaluator = ProposalRecallEvaluator("toy", **kwargs)
    evaluator.reset()
    for one in batches:
        evaluator.process(*one)
    return evaluator, evaluator.evaluate()


def test_by_hand_at_n():
    evaluator, _ = evaluated(hand_made())
    top = evaluator.results["overall"]["top"]
    # The detector hits A and B, never C: contextual shares 1/2 and 0.
    assert top["detector"] == {
        "referent": 100.0,
        "context": 25.0,
        "proposals": 3.0,
        "best_iou": 1.0,
    }
    # VL-NMS hits A but not B; of the context C twice: shares 1/2 and 1.
    assert top["vlnms"] == {"referent": 50.0, "context": 75.0, "proposals": 2.0, "best_iou": 0.5}
    assert top["misses_cut"]["referent"] is None
    assert top["misses_cut"]["context"] == pytest.approx(100 * 50 / 75)


def test_by_hand_at_the_real_operating_point():
    thresholds = {"detector": 0.5, "vlnms": 0.5}
    evaluator, flat = evaluated(hand_made(), thresholds=thresholds)
    real = evaluator.results["overall"]["real"]
    # Above 0.5: FAR and A, for both expressions.
    assert real["detector"] == {
        "referent": 50.0,
        "context": 0.0,
        "proposals": 2.0,
        "best_iou": 0.5,
    }
    # Above 0.5: A for the first, C for the second (FAR is at the threshold, not above it).
    assert real["vlnms"] == {"referent": 50.0, "context": 50.0, "proposals": 1.0, "best_iou": 0.5}
    assert real["misses_cut"] == {"referent": 0.0, "context": 50.0}
    # One proposal each for the detector too: FAR.
    matched = real["detector_matched"]
    assert (matched["referent"], matched["context"], matched["proposals"]) == (0.0, 0.0, 1.0)
    assert real["misses_cut_matched"] == {"referent": 50.0, "context": 50.0}
    assert flat["recall"]["real_vlnms_context"] == 50.0
    assert flat["recall"]["real_vlnms_referent-refcoco"] == 100.0
    assert flat["recall"]["real_vlnms_referent-refcocog"] == 0.0
    assert flat["recall"]["threshold_vlnms"] == 0.5


def test_the_best_proposal_is_always_kept():
    evaluator, _ = evaluated(hand_made(), thresholds={"detector": 1.0, "vlnms": 1.0})
    real = evaluator.results["overall"]["real"]
    assert real["detector"]["proposals"] == real["vlnms"]["proposals"] == 1.0
    assert real["vlnms"]["referent"] == 50.0


def test_only_the_first_n_proposals_count():
    evaluator, flat = evaluated(hand_made(), num_proposals=2)
    top = evaluator.results["overall"]["top"]
    assert top["detector"]["proposals"] == 2.0
    assert top["detector"]["referent"] == 50.0
    assert flat["recall"]["top2_detector_referent"] == 50.0


@pytest.mark.parametrize(("width", "hit"), [(50.0, False), (50.1, True)])
def test_a_hit_needs_an_iou_above_one_half(width, hit):
    asked = proposals([box(0, 0, width)] * 2, [0.9, 0.8], [0, 0])
    one = batch(1, [expression(1, A, [A])], proposals([], []), asked)
    evaluator, _ = evaluated(one)
    vlnms = evaluator.results["overall"]["top"]["vlnms"]
    assert vlnms["referent"] == vlnms["context"] == 100.0 * hit


def test_no_proposals_at_all():
    one = batch(1, [expression(1, A, [B])], proposals([], []), proposals([], [], []))
    evaluator, flat = evaluated(one)
    overall = evaluator.results["overall"]
    for point in ("top", "real"):
        for method in METHODS:
            assert overall[point][method] == {
                "referent": 0.0,
                "context": 0.0,
                "proposals": 0.0,
                "best_iou": 0.0,
            }
    assert evaluator.thresholds == {"detector": 0.0, "vlnms": 0.0}
    assert flat["recall"]["real_misses_cut_referent"] == 0.0


def test_expressions_without_context_are_left_out_of_its_recall():
    expressions = [expression(1, A, []), expression(2, A, None), expression(3, A, [A, B])]
    asked = proposals([A, A, A], [0.9, 0.9, 0.9], [0, 1, 2])
    evaluator, _ = evaluated(batch(1, expressions, proposals([A], [0.5]), asked))
    overall = evaluator.results["overall"]
    assert (overall["expressions"], overall["expressions_with_context"]) == (3, 1)
    assert overall["top"]["vlnms"]["context"] == 50.0


def test_expressions_without_a_referent_are_left_out_of_its_recall():
    expressions = [expression(1, None, [A, B]), expression(2, A, []), expression(3, None, None)]
    # The first finds B, the second nothing, the third is not annotated at all.
    asked = proposals([B, FAR, FAR], [0.9, 0.9, 0.9], [0, 1, 2])
    evaluator, _ = evaluated(batch(1, expressions, proposals([A], [0.5]), asked))
    overall = evaluator.results["overall"]
    counts = {key: overall[key] for key in overall if key.startswith("expressions")}
    assert counts == {
        "expressions": 3,
        "expressions_with_referent": 1,
        "expressions_with_context": 1,
    }
    assert overall["top"]["vlnms"] == {
        "referent": 0.0,
        "context": 50.0,
        "proposals": 1.0,
        "best_iou": 0.0,
    }
    assert overall["top"]["detector"] == {
        "referent": 100.0,
        "context": 50.0,
        "proposals": 1.0,
        "best_iou": 1.0,
    }


def test_no_referent_anywhere(tmp_path):
    # An empty proposal in the corner does not hit a referent that is not there.
    alone, asked = proposals([[0, 0, 0, 0], A], [0.9, 0.8]), proposals([A, B], [0.5, 0.4], [0, 0])
    one = batch(1, [expression(1, None, [A, B], manner=None)], alone, asked)
    evaluator, flat = evaluated(one, output_dir=str(tmp_path))
    vlnms = evaluator.results["overall"]["top"]["vlnms"]
    assert (vlnms["referent"], vlnms["context"], vlnms["best_iou"]) == (None, 100.0, None)
    assert evaluator.results["overall"]["top"]["misses_cut"] == {"referent": None, "context": 100.0}
    assert np.isnan(flat["recall"]["real_vlnms_referent"])
    assert "-" in format_table(evaluator.results)
    assert json.loads((tmp_path / "recall_toy.json").read_text()) == evaluator.results


def test_expressions_without_a_referent_change_nothing_for_the_others():
    batches = random_batches(0)
    with_captions = []
    for (image,), outputs in batches:
        caption = expression(10_000 + image["image_id"], None, None, manner="caption")
        inputs, _ = batch(image["image_id"], [*image["expressions"], caption], None, None)
        with_captions.append((inputs, outputs))
    thresholds = {"detector": 0.4, "vlnms": 0.6}
    plain, _ = evaluated(*batches, thresholds=thresholds)
    more, _ = evaluated(*with_captions, thresholds=thresholds)
    for point in ("top", "real"):
        for method in METHODS:
            for key in ("referent", "context", "best_iou"):
                assert (
                    more.results["overall"][point][method][key]
                    == plain.results["overall"][point][method][key]
                )
    by_manner = {**more.results["by_manner"]}
    assert by_manner.pop("caption")["top"]["vlnms"]["referent"] is None
    assert by_manner == plain.results["by_manner"]


def test_no_context_anywhere():
    one = batch(1, [expression(1, A, None)], proposals([A], [0.5]), proposals([A], [0.5], [0]))
    evaluator, flat = evaluated(one)
    assert evaluator.results["overall"]["top"]["vlnms"]["context"] is None
    assert evaluator.results["overall"]["top"]["misses_cut"] == {"referent": None, "context": None}
    assert np.isnan(flat["recall"]["top100_vlnms_context"])
    assert "-" in format_table(evaluator.results)


def test_expressions_without_style_are_in_no_group():
    one = batch(
        1, [expression(1, A, manner=None)], proposals([A], [0.5]), proposals([A], [0.5], [0])
    )
    assert evaluated(one)[0].results["by_manner"] == {}


def random_batches(seed=0, num_images=12):
    """Images whose proposals scatter about their annotated boxes, with tied and cut-off scores."""
    rng = np.random.default_rng(seed)

    def scattered(targets, count):
        near = np.array(targets)[rng.integers(len(targets), size=count)]
        boxes = near + rng.normal(0, 18, size=(count, 4))
        return np.where(rng.random((count, 1)) < 0.3, np.array(FAR), boxes).tolist()

    def descending(count):
        return sorted(np.round(rng.random(count), 2).tolist(), reverse=True)

    sent_id, batches = 0, []
    for image_id in range(num_images):
        corners, sizes = rng.random((5, 2)) * 300, rng.random((5, 2)) * 150 + 30
        objects = [box(*xy, *size) for xy, size in zip(corners, sizes, strict=True)]
        expressions, boxes, scores, query_index = [], [], [], []
        for query in range(int(rng.integers(0, 5))):
            chosen = rng.permutation(5)[: int(rng.integers(1, 5))]
            context = None if rng.random() < 0.2 else [objects[i] for i in chosen[1:]]
            manner = ["refcoco", "refcoco+", "refcocog"][sent_id % 3]
            expressions.append(expression(sent_id, objects[chosen[0]], context, manner))
            sent_id += 1
            count = int(rng.integers(0, 30))
            boxes += scattered(objects, count)
            scores += descending(count)
            query_index += [query] * count
        count = int(rng.integers(0, 30))
        alone = proposals(scattered(objects, count), descending(count))
        batches.append(batch(image_id, expressions, alone, proposals(boxes, scores, query_index)))
    return batches


def plain_iou(a, b):
    a, b = np.float32(a), np.float32(b)
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (areas - width * height)


def plain_summary(batches, method, threshold, manner=None):
    """Everything from its definition, proposal by proposal."""
    hit, shares, counts, ious = [], [], [], []
    for (image,), (output,) in batches:
        for query, one in enumerate(image["expressions"]):
            if manner not in (None, one["manner"]):
                continue
            instances = output["detector"]
            if method == "vlnms":
                instances = output["instances"]
                instances = instances[instances.query_index == query]
            scores = instances.scores.tolist()
            kept = [
                proposal
                for i, (proposal, score) in enumerate(
                    zip(instances.pred_boxes.tensor.tolist(), scores, strict=True)
                )
                if i == 0 or threshold is None or score > threshold
            ]
            best = max((plain_iou(b, one["referent_box"]) for b in kept), default=0.0)
            hit.append(best > 0.5)
            ious.append(best)
            counts.append(len(kept))
            context = one["context_boxes"] or []
            if context:
                found = [any(plain_iou(b, target) > 0.5 for b in kept) for target in context]
                shares.append(sum(found) / len(found))
    return {
        "referent": 100 * np.mean(hit),
        "context": 100 * np.mean(shares),
        "proposals": np.mean(counts),
        "best_iou": np.mean(ious),
    }


def plain_mean_number(batches, method, threshold):
    numbers = []
    for (image,), (output,) in batches:
        for query in range(len(image["expressions"])):
            scores = output["detector"].scores
            if method == "vlnms":
                asked = output["instances"]
                scores = asked.scores[asked.query_index == query]
            numbers.append(max(int((scores > threshold).sum()), min(len(scores), 1)))
    return np.mean(numbers)


@pytest.mark.parametrize("seed", range(4))
def test_equals_a_plain_loop(seed):
    batches = random_batches(seed)
    evaluator, _ = evaluated(*batches, mean_proposals=4.0)
    results = evaluator.results
    for manner in (None, "refcoco", "refcoco+", "refcocog"):
        group = results["overall"] if manner is None else results["by_manner"][manner]
        for method in METHODS:
            top = plain_summary(batches, method, None, manner)
            assert group["top"][method] == pytest.approx(top, rel=1e-5)
            real = plain_summary(batches, method, results["thresholds"][method], manner)
            assert group["real"][method] == pytest.approx(real, rel=1e-5)
        matched = dict(group["real"]["detector_matched"])
        threshold = matched.pop("threshold")
        plain = plain_summary(batches, "detector", threshold, manner)
        assert matched == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mean_proposals", [0.0, 1.0, 2.5, 8.0, 1000.0])
def test_no_threshold_comes_closer(seed, mean_proposals):
    batches = random_batches(seed)
    evaluator, _ = evaluated(*batches, mean_proposals=mean_proposals)
    for method in METHODS:
        chosen = evaluator.results["overall"]["real"][method]["proposals"]
        closest = min(
            abs(plain_mean_number(batches, method, threshold) - mean_proposals)
            for threshold in np.arange(-0.005, 1.01, 0.005)
        )
        assert abs(chosen - mean_proposals) == pytest.approx(closest)


def test_of_two_equally_close_thresholds_the_higher_is_taken():
    match = Match(np.float32([0.9, 0.5]), np.float32([0, 0]), np.zeros(0, np.int32))
    table = MatchTable([match], 0.5)
    assert table.threshold_for(1.5) == 0.5
    assert table.threshold_for(1.6) < 0.5
    assert table.counts(table.threshold_for(1.6)).tolist() == [2]


def test_tied_scores_are_kept_or_removed_together():
    match = Match(np.float32([0.9, 0.5, 0.5]), np.zeros(3, np.float32), np.int32([2, NEVER]))
    table = MatchTable([match], 0.5)
    assert table.counts(0.4).tolist() == [3]
    assert table.counts(0.5).tolist() == [1]
    assert table.summary(table.counts(0.4))["context"] == 50.0


def test_thresholds_of_one_data_set_are_used_unchanged_on_another():
    val, _ = evaluated(*random_batches(0), mean_proposals=4.0)
    assert val.results["thresholds_chosen_here"]
    test, _ = evaluated(*random_batches(1), thresholds=val.thresholds, mean_proposals=4.0)
    assert test.results["thresholds"] == test.thresholds == val.thresholds
    assert not test.results["thresholds_chosen_here"]
    # They went through a file on the way.
    assert json.loads(json.dumps(val.thresholds)) == val.thresholds


def test_an_evaluator_chooses_anew_each_time():
    evaluator, _ = evaluated(*random_batches(0), mean_proposals=4.0)
    evaluator.reset()
    for one in random_batches(1):
        evaluator.process(*one)
    evaluator.evaluate()
    assert evaluator.results == evaluated(*random_batches(1), mean_proposals=4.0)[0].results


def test_two_processes_equal_one(monkeypatch):
    batches = random_batches(0)
    whole, flat = evaluated(*batches)
    # Padding of a sampler: the first image is processed twice.
    halves = [batches[:6], [batches[0], *batches[6:]]]
    parts = []
    for half in halves:
        part = ProposalRecallEvaluator("toy")
        for one in half:
            part.process(*one)
        parts.append(part)
    gathered = [part._records for part in parts]
    monkeypatch.setattr(comm, "gather", lambda data, dst: gathered[::-1])
    assert parts[0].evaluate() == flat
    assert parts[0].results == whole.results
    monkeypatch.setattr(comm, "gather", lambda data, dst: [])
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    assert parts[1].evaluate() == {}


def test_not_distributed_does_not_gather(monkeypatch):
    monkeypatch.setattr(comm, "gather", lambda *args, **kwargs: pytest.fail("gathered"))
    evaluated(hand_made(), distributed=False)


def test_images_may_come_in_any_order_and_in_batches_of_several():
    batches = random_batches(0)
    inputs = [one for pair in batches for one in pair[0]][::-1]
    outputs = [one for pair in batches for one in pair[1]][::-1]
    assert evaluated((inputs, outputs))[0].results == evaluated(*batches)[0].results


def test_an_expression_is_counted_once():
    evaluator, _ = evaluated(hand_made(), hand_made())
    assert evaluator.results["overall"]["expressions"] == 2


def test_sentences_of_two_styles_may_share_an_id():
    expressions = [expression(1, A), expression(1, B, manner="refcoco+")]
    asked = proposals([A, A], [0.9, 0.9], [0, 1])
    evaluator, _ = evaluated(batch(1, expressions, proposals([], []), asked))
    assert evaluator.results["overall"]["top"]["vlnms"]["referent"] == 50.0


def test_reset_forgets(caplog):
    evaluator = ProposalRecallEvaluator("toy")
    evaluator.process(*hand_made())
    evaluator.reset()
    with caplog.at_level(logging.WARNING, logger=base.__name__):
        assert evaluator.evaluate() == {}
    assert "Did not receive" in caplog.text


def test_file_and_printed_table(tmp_path, caplog):
    folder = tmp_path / "inference"
    with caplog.at_level(logging.INFO):
        evaluator, flat = evaluated(*random_batches(0), output_dir=str(folder))
        print_csv_format(flat)
    assert [path.name for path in folder.iterdir()] == ["recall_toy.json"]
    assert json.loads((folder / "recall_toy.json").read_text()) == evaluator.results
    for word in ("VL-NMS", "detector (matched)", "misses cut", "refcocog", "N=100", "real"):
        assert word in caplog.text
    assert "copypaste: Task: recall" in caplog.text
    assert all(isinstance(value, float) for value in flat["recall"].values())
    assert flat_results(evaluator.results) == flat["recall"]


def test_other_fields_are_not_moved():
    inputs, outputs = hand_made()
    for instances in outputs[0].values():
        instances.pred_masks = [object()] * len(instances)
    evaluated((inputs, outputs))


def test_misses_cut():
    cut = misses_cut({"referent": 80.77, "context": 100.0}, {"referent": 88.28, "context": 100.0})
    # The paper's numbers for RefCOCO testB: 39% fewer misses.
    assert cut["referent"] == pytest.approx(39.05, abs=0.01)
    assert cut["context"] is None


def test_input_without_expressions_names_the_file():
    (image,), outputs = hand_made()
    del image["expressions"]
    with pytest.raises(ValueError, match=r"7\.jpg.*no \"expressions\""):
        ProposalRecallEvaluator("toy").process([image], outputs)


def test_number_of_expressions_differs_from_the_queries():
    (image,), outputs = hand_made()
    image["query"] = "one query"
    with pytest.raises(ValueError, match=r"7\.jpg.*1 queries but 2 expressions"):
        ProposalRecallEvaluator("toy").process([image], outputs)


def test_image_without_the_detectors_own_proposals():
    inputs, (output,) = hand_made()
    del output["detector"]
    with pytest.raises(ValueError, match=r"7\.jpg.*no \"detector\".*predict_with_detector"):
        ProposalRecallEvaluator("toy").process(inputs, [output])


def test_image_without_queries():
    (image,), outputs = hand_made()
    del image["query"], image["expressions"]
    with pytest.raises(ValueError, match=r"7\.jpg.*no expressions"):
        ProposalRecallEvaluator("toy").process([image], outputs)


def test_output_of_a_model_without_queries():
    inputs, (output,) = hand_made()
    output["instances"] = output["detector"]
    with pytest.raises(ValueError, match="query_index"):
        ProposalRecallEvaluator("toy").process(inputs, [output])


def test_thresholds_of_other_methods():
    with pytest.raises(ValueError, match="detector, vlnms"):
        ProposalRecallEvaluator("toy", thresholds={"vlnms": 0.5})
