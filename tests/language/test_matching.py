"""Texts against category names, compared with a loop."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_vectors import TableVectors, all_words

from vlnms_d2.language.kinds import Kinds
from vlnms_d2.language.matching import CategoryMatcher

ANGLES = {"cat": 0, "dog": 60, "dining": 100, "table": 180, "puppy": 65, "desk": 170, "kitten": 5}
NAMES = ["cat", "dining table", "dog"]
VECTORS = TableVectors(ANGLES)


def matcher(names=NAMES) -> CategoryMatcher:
    return CategoryMatcher(names, all_words, VECTORS)


def cosine(a: str, b: str) -> float:
    if a not in ANGLES or b not in ANGLES:
        return 0.0
    return float(np.cos(np.deg2rad(ANGLES[a] - ANGLES[b])))


words = st.lists(st.sampled_from([*ANGLES, "unknown"]), max_size=4)


@settings(max_examples=100, deadline=None)
@given(st.lists(words, max_size=4), st.lists(words.filter(bool), max_size=4))
def test_cosines_equal_a_loop(texts, names):
    own = matcher([" ".join(name) for name in names])
    found = own.cosines([" ".join(text) for text in texts])
    best = own.best_cosines([" ".join(text) for text in texts])
    assert best.shape == (len(texts), len(names)) and best.dtype == np.float32
    for text, table, row in zip(texts, found, best, strict=True):
        expected = [[max(cosine(w, part) for part in name) for name in names] for w in text]
        expected = np.array(expected, dtype=np.float32).reshape(len(text), len(names))
        assert table.dtype == np.float32
        np.testing.assert_allclose(table, expected, atol=1e-6)
        np.testing.assert_allclose(row, expected.max(axis=0, initial=-1), atol=1e-6)


def test_a_name_of_several_words_fits_by_any_of_them():
    (table,) = matcher().cosines(["desk puppy"])
    assert table.argmax(axis=1).tolist() == [1, 2]
    assert table[0, 1] == pytest.approx(cosine("desk", "table"), abs=1e-6)


@pytest.mark.parametrize("name", ["dining_table", "Dining Table", "dining-table", " dining  table"])
def test_how_a_name_is_written_does_not_matter(name):
    found = matcher([name]).best_cosines(["desk"])
    assert found[0, 0] == pytest.approx(cosine("desk", "table"), abs=1e-6)


def test_texts_without_mentions_fit_nothing():
    found = matcher().best_cosines(["", "cat", " "])
    assert found[[0, 2]].tolist() == [[-1] * 3] * 2 and found[1, 0] == pytest.approx(1)


@pytest.mark.parametrize("name", ["", "  ", "--"])
def test_a_name_without_words_is_refused(name):
    with pytest.raises(ValueError, match="has no words"):
        matcher(["cat", name])


def test_a_kind_of_a_category_is_like_no_other():
    """By the vectors alone a puppy would be half a cat; a desk is no kind in the table."""
    kinds = Kinds(NAMES)
    own = CategoryMatcher(NAMES, all_words, VECTORS, kinds)
    (table,) = own.cosines(["puppy kitten unknown"])
    assert table.tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 0]]


def test_mentions_that_resemble_nothing_are_left_out():
    own = CategoryMatcher(NAMES, all_words, VECTORS, least=0.9)
    (first, second, third) = own.compare(["desk unknown dining", "unknown", ""])
    assert first[0] == ["desk", "dining"] and first[1].shape == (2, 3)
    np.testing.assert_allclose(first[1], own.cosines(["desk dining"])[0], atol=1e-6)
    assert (second[0], third[0]) == ([], []) and second[1].shape == third[1].shape == (0, 3)
    assert own.best_cosines(["unknown"]).tolist() == [[-1] * 3]
