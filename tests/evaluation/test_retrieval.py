"""Retrieval recall, against hand-computed cases and a plain loop."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from detectron2.utils import comm

from vlnms_d2.evaluation.retrieval import (
    RANKS,
    RetrievalEvaluator,
    five_fold_recall,
    report,
    retrieval_recall,
)


def plain_recall(similarities, image_of_caption):
    """By sorting each query's list, matches last among equals."""
    images, captions = similarities.shape
    recall = {}
    for k in RANKS:
        hits = 0
        for i in range(images):
            order = sorted(
                range(captions), key=lambda c: (-similarities[i, c], image_of_caption[c] == i)
            )
            hits += any(image_of_caption[c] == i for c in order[:k])
        recall[f"sentence_r@{k}"] = 100 * hits / images
        hits = 0
        for c in range(captions):
            order = sorted(
                range(images), key=lambda i: (-similarities[i, c], image_of_caption[c] == i)
            )
            hits += image_of_caption[c] in order[:k]
        recall[f"image_r@{k}"] = 100 * hits / captions
    recall["r@sum"] = sum(recall.values())
    return recall


@pytest.mark.parametrize("distinct", [1000, 4])  # with 4 values nearly all is a tie
@pytest.mark.parametrize("seed", range(3))
def test_against_a_plain_loop(seed, distinct):
    rng = np.random.default_rng(seed)
    image_of_caption = np.repeat(np.arange(20), rng.integers(1, 6, 20))
    similarities = rng.integers(0, distinct, (20, len(image_of_caption))) / distinct
    recall = retrieval_recall(similarities, image_of_caption)
    expected = plain_recall(similarities, image_of_caption)
    assert recall.keys() == expected.keys()
    for key, value in expected.items():
        assert recall[key] == pytest.approx(value)


def test_by_hand():
    # Image 0 finds its second caption first; image 1 finds both of its captions behind two others.
    similarities = np.array([[0.1, 0.9, 0.5, 0.4], [0.8, 0.7, 0.6, 0.2]])
    recall = retrieval_recall(similarities, np.array([0, 0, 1, 1]))
    assert (recall["sentence_r@1"], recall["sentence_r@5"]) == (50.0, 100.0)
    # Captions 1 and 2 find their image first, 0 and 3 do not.
    assert (recall["image_r@1"], recall["image_r@5"]) == (50.0, 100.0)
    assert recall["r@sum"] == 50.0 + 100.0 * 2 + 50.0 + 100.0 * 2


def test_a_perfect_and_a_blind_model():
    owners = np.repeat(np.arange(30), 5)
    perfect = (np.arange(30)[:, None] == owners).astype(float)
    assert retrieval_recall(perfect, owners)["r@sum"] == 600.0
    assert retrieval_recall(np.zeros((30, 150)), owners)["r@sum"] == 0.0


def test_one_image_with_one_caption():
    assert retrieval_recall(np.array([[0.3]]), np.array([0]))["r@sum"] == 600.0


def test_folds_are_the_mean_of_retrievals_of_their_own():
    rng = np.random.default_rng(3)
    owners = np.repeat(np.arange(20), 2)
    similarities = rng.random((20, 40)) + (np.arange(20)[:, None] == owners)
    similarities[:4] = rng.random((4, 40))
    recall = five_fold_recall(similarities, owners, fold=4)
    parts = [
        plain_recall(similarities[i : i + 4, 2 * i : 2 * i + 8], np.repeat(np.arange(4), 2))
        for i in range(0, 20, 4)
    ]
    for key in recall:
        assert recall[key] == pytest.approx(np.mean([part[key] for part in parts]))


def test_errors():
    with pytest.raises(ValueError, match=r"\[2, 3\] do not fit \[2\] captions"):
        retrieval_recall(np.zeros((2, 3)), np.array([0, 1]))
    with pytest.raises(ValueError, match="not finite"):
        retrieval_recall(np.array([[np.nan]]), np.array([0]))
    with pytest.raises(ValueError, match="image number 1 has no caption"):
        retrieval_recall(np.zeros((2, 1)), np.array([0]))
    with pytest.raises(ValueError, match="3 images make no whole folds of 2"):
        five_fold_recall(np.zeros((3, 3)), np.arange(3), fold=2)


# --- the evaluator -----------------------------------------------------------------------------


def captions(images, each=2):
    return [
        {"image_id": 100 + i, "expressions": [{"sent_id": 10 * i + k} for k in range(each)]}
        for i in range(images)
    ]


def rows(images, each=2, seed=0):
    return np.random.default_rng(seed).random((images, images * each), dtype=np.float32)


def shown(evaluator, similarities, order):
    for i in order:
        evaluator.process(
            [{"image_id": 100 + i}], [{"similarities": torch.from_numpy(similarities[i])}]
        )


def test_the_evaluator_takes_images_in_any_order_and_once(tmp_path):
    similarities = rows(8)
    evaluator = RetrievalEvaluator("toy", captions(8), output_dir=str(tmp_path), fold=4)
    evaluator.reset()
    shown(evaluator, similarities, [3, 0, 7, 1, 2, 6, 5, 4, 3])
    flat = evaluator.evaluate()["retrieval"]
    owners = np.repeat(np.arange(8), 2)
    assert evaluator.caption_ids[:3] == [0, 1, 10]
    assert evaluator.results["all"] == retrieval_recall(similarities, owners)
    assert evaluator.results["folds_of_4"] == five_fold_recall(similarities, owners, 4)
    assert flat["r@sum-folds_of_4"] == evaluator.results["folds_of_4"]["r@sum"]
    assert json.loads((tmp_path / "retrieval_toy.json").read_text()) == evaluator.results
    assert "folds_of_4" in report(evaluator.results)[0]


@pytest.mark.parametrize("images", [4, 6])  # one fold, and no whole number of them
def test_folds_only_where_there_are_several_whole_ones(images):
    evaluator = RetrievalEvaluator("toy", captions(images), fold=4)
    shown(evaluator, rows(images), range(images))
    evaluator.evaluate()
    assert "folds_of_4" not in evaluator.results


def published_recall(similarities, image_of_caption):
    """As SCAN evaluates: five captions of each image, image i having columns 5i to 5i + 4."""
    columns = [np.flatnonzero(image_of_caption == i)[:5] for i in range(len(similarities))]
    five = similarities[:, np.concatenate(columns)]
    ranks = []
    for i, row in enumerate(five):
        order = np.argsort(row)[::-1]
        ranks.append(min(np.flatnonzero(order == 5 * i + k)[0] for k in range(5)))
    inverse = []
    for c in range(five.shape[1]):
        inverse.append(np.flatnonzero(np.argsort(five[:, c])[::-1] == c // 5)[0])
    recall = {f"sentence_r@{k}": 100 * np.mean(np.array(ranks) < k) for k in RANKS}
    recall |= {f"image_r@{k}": 100 * np.mean(np.array(inverse) < k) for k in RANKS}
    return recall | {"r@sum": sum(recall.values())}


def test_five_captions_an_image_are_ranked_as_published_or_all_of_them():
    each = [5, 7, 5, 6, 5, 5, 5, 5]
    sets = [{"image_id": 100 + i, "expressions": [{"sent_id": 10 * i + k} for k in range(n)]}
            for i, n in enumerate(each)]  # fmt: skip
    owners = np.repeat(np.arange(8), each)
    similarities = np.random.default_rng(0).random((8, sum(each)), dtype=np.float32)
    published = RetrievalEvaluator("toy", sets, fold=4)
    shown(published, similarities, range(8))
    published.evaluate()
    assert (published.results["images"], published.results["captions"]) == (8, 40)
    assert len(published.caption_ids) == 43
    assert published.results["all"] == pytest.approx(published_recall(similarities, owners))
    halves = [published_recall(similarities[:4, :23], owners[:23]),
              published_recall(similarities[4:, 23:], owners[23:] - 4)]  # fmt: skip
    mean = {key: np.mean([half[key] for half in halves]) for key in halves[0]}
    assert published.results["folds_of_4"] == pytest.approx(mean)
    of_all = RetrievalEvaluator("toy", sets, captions_per_image=None)
    shown(of_all, similarities, range(8))
    of_all.evaluate()
    assert of_all.results["captions"] == 43
    assert of_all.results["all"] == retrieval_recall(similarities, owners)


def test_two_processes_equal_one(monkeypatch):
    similarities = rows(5)
    whole = RetrievalEvaluator("toy", captions(5))
    shown(whole, similarities, range(5))
    whole.evaluate()
    parts = [RetrievalEvaluator("toy", captions(5)) for _ in range(2)]
    shown(parts[0], similarities, [0, 1, 2])
    shown(parts[1], similarities, [3, 4, 0])
    gathered = [part._records for part in parts]
    monkeypatch.setattr(comm, "gather", lambda data, dst: gathered[::-1])
    parts[0].evaluate()
    assert parts[0].results == whole.results
    monkeypatch.setattr(comm, "gather", lambda data, dst: [])
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    assert parts[1].evaluate() == {}


def test_images_that_are_missing_or_do_not_fit(caplog):
    evaluator = RetrievalEvaluator("toy", captions(3))
    with caplog.at_level(logging.WARNING):
        assert evaluator.evaluate() == {}
    assert "Did not receive any images" in caplog.text
    shown(evaluator, rows(3), [0, 2])
    with pytest.raises(ValueError, match="1 of the 3 images of toy are missing, such as 101"):
        evaluator.evaluate()
    with pytest.raises(ValueError, match=r"image 100: .* expected one for each of the 6 captions"):
        evaluator.process([{"image_id": 100}], [{"similarities": torch.zeros(5)}])
