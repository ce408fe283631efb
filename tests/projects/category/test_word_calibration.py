"""Numbers chosen by how well cosines tell what an expression speaks of."""

import numpy as np
import pytest
from plain_vectors import TableVectors, all_words

from category_study.calibration import (
    ClassPairs,
    Pairs,
    collect_class_pairs,
    collect_pairs,
    fit_curve,
    try_gammas,
)
from vlnms_d2.language.matching import CategoryMatcher

NAMES = ["cat", "dog"]
MATCHER = CategoryMatcher(NAMES, all_words, TableVectors({"cat": 0, "dog": 90, "puppy": 80}))


def image(*expressions: tuple, image_id: int = 1) -> dict:
    annotations = [
        {"id": 1, "bbox": [0, 0, 10, 10], "bbox_mode": 1, "category_id": 0},
        {"id": 2, "bbox": [20, 0, 10, 10], "bbox_mode": 1, "category_id": 1},
        {"id": 3, "bbox": [20, 0, 10, 9.9], "bbox_mode": 1, "category_id": 1},
    ]
    return {
        "image_id": image_id,
        "annotations": annotations,
        "expressions": [
            {"sent_id": i, "query": query, "ann_id": ann_id, "context_ann_ids": context}
            for i, (query, ann_id, context) in enumerate(expressions)
        ],
    }


def test_pairs_of_expressions_and_objects():
    pairs = collect_pairs([image(("cat", 1, [2]), ("", 2, [])), image(("puppy", 2, []))], MATCHER)
    close = np.cos(np.deg2rad(10))
    far = np.cos(np.deg2rad(80))
    expected = [1, 0, 0, -1, -1, -1, far, close, close]
    np.testing.assert_allclose(pairs.cosines, expected, atol=1e-6)
    # The third object has the box of the second.
    assert pairs.referent.astype(int).tolist() == [1, 0, 0, 0, 1, 1, 0, 1, 1]
    assert pairs.foreground.astype(int).tolist() == [1, 1, 0, 0, 1, 1, 0, 1, 1]


def test_expressions_without_annotated_context_are_refused():
    with pytest.raises(ValueError, match=r"sentence 0 of image 1.*refshapes_train"):
        collect_pairs([image(("cat", 1, None))], MATCHER)


def test_pairs_of_expressions_and_categories():
    images = [image(("cat", 1, [2]), ("", 2, [])), image(("puppy", 2, [3]))]
    found = collect_class_pairs(images, MATCHER)
    close, far = np.cos(np.deg2rad(10)), np.cos(np.deg2rad(80))
    np.testing.assert_allclose(found.cosines, [1, 0, -1, -1, far, close], atol=1e-6)
    assert found.named.astype(int).tolist() == [1, 1, 0, 1, 0, 1]
    assert collect_class_pairs([], MATCHER).named.shape == (0,)


def class_pairs(cosines, named) -> ClassPairs:
    return ClassPairs(np.array(cosines, np.float32), np.array(named, bool))


def pairs(cosines, foreground, referent=None) -> Pairs:
    referent = [0] * len(cosines) if referent is None else referent
    return Pairs(
        np.array(cosines, np.float32), np.array(foreground, bool), np.array(referent, bool)
    )


def test_precision_and_recall_leave_the_referents_out():
    given = pairs([0.9, 0.8, 0.6, 0.4, 0.95], [1, 0, 1, 1, 1], [0, 0, 0, 0, 1])
    low, mid, high, none = try_gammas(given, [0.3, 0.6, 0.85, 0.99])
    assert (low.precision, low.recall) == (0.75, 1)
    assert (mid.precision, mid.recall) == (0.5, pytest.approx(1 / 3))
    assert (high.precision, high.recall, high.f1) == (1, pytest.approx(1 / 3), pytest.approx(0.5))
    assert (none.precision, none.recall, none.f1) == (1, 0, 0)


def test_without_contexts_nothing_is_missed():
    (result,) = try_gammas(pairs([0.5], [0]), [0.6])
    assert (result.precision, result.recall) == (1, 1)


@pytest.mark.parametrize(("slope", "midpoint"), [(8.0, 0.4), (20.0, 0.6), (-3.0, 0.1)])
def test_the_curve_that_the_data_came_from_is_found(slope, midpoint):
    rng = np.random.default_rng(0)
    cosines = rng.uniform(-0.2, 1, 200_000)
    foreground = rng.random(200_000) < 1 / (1 + np.exp(-slope * (cosines - midpoint)))
    found = fit_curve(class_pairs(cosines, foreground))
    assert found == (pytest.approx(slope, rel=0.03), pytest.approx(midpoint, abs=0.02))


def test_separable_data_has_a_curve_too():
    slope, midpoint = fit_curve(class_pairs([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1]))
    assert np.isfinite(slope) and slope > 5 and 0.2 < midpoint < 0.8


@pytest.mark.parametrize(("cosines", "named"), [([], []), ([0.1, 0.9], [1, 1]), ([1, 1], [0, 1])])
def test_nothing_to_fit_is_refused(cosines, named):
    with pytest.raises(ValueError, match="cannot fit"):
        fit_curve(class_pairs(cosines, named))
