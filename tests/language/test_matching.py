"""What texts mention, and how similar that is to category names."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_vectors import TableVectors, all_words

from vlnms_d2.language.matching import RULES, RULES_FILE, CategoryMatcher, MentionFinder
from vlnms_d2.language.synonyms import Synonyms

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


def test_a_synonym_of_a_category_matches_no_other():
    """By the vectors alone a puppy would be half a cat."""
    own = CategoryMatcher(NAMES, all_words, VECTORS, Synonyms(NAMES))
    (table,) = own.cosines(["puppy kitten unknown"])
    assert table.tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 0]]


def test_superordinates_fit_less_than_names_and_are_not_left_out():
    """A dog that is said outright is before all animals; a text of animals alone has them."""
    names = ["cat", "dog", "dining table"]
    rules = {"least": 0.9, "general": 0.25}
    cosines = CategoryMatcher(names, all_words, VECTORS, Synonyms(names), **rules).best_cosines
    assert cosines(["animals dog", "animals"]).tolist() == [[0.25, 1, 0], [0.25, 0.25, 0]]


def test_other_words_fit_the_last_word_of_a_name_only():
    """No hair is a hair drier, unless there are no synonyms and all words are compared."""
    names = ["cat", "desk dining"]
    with_synonyms = CategoryMatcher(names, all_words, VECTORS, Synonyms(names))
    ((found,),) = with_synonyms.cosines(["table"])
    np.testing.assert_allclose(
        found, [cosine("table", "cat"), cosine("table", "dining")], atol=1e-6
    )
    ((found,),) = matcher(names).cosines(["table"])
    np.testing.assert_allclose(found, [cosine("table", "cat"), cosine("table", "desk")], atol=1e-6)


def test_mentions_that_resemble_nothing_are_left_out():
    own = CategoryMatcher(NAMES, all_words, VECTORS, least=0.9)
    (first, second, third) = own.compare(["desk unknown dining", "unknown", ""])
    assert first[0] == ["desk", "dining"] and first[1].shape == (2, 3)
    np.testing.assert_allclose(first[1], own.cosines(["desk dining"])[0], atol=1e-6)
    assert (second[0], third[0]) == ([], []) and second[1].shape == third[1].shape == (0, 3)
    assert own.best_cosines(["unknown"]).tolist() == [[-1] * 3]


# --- mentions ----------------------------------------------------------------------------------

SYNONYMS = Synonyms(["person", "hot dog", "dog", "train", "orange", "dining table", "cup"])


class Tags:
    """Tags given with the words: "dog/NOUN"."""

    def tagged(self, texts):
        return [[tuple(word.split("/")) for word in text.split()] for text in texts]


def mentions(*texts: str) -> list[list[str]]:
    return MentionFinder(Tags(), SYNONYMS)(texts)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the/DET chef/NOUN and/CCONJ dog/NOUN", ["chef", "dog"]),
        ("a/DET hot/ADJ dog/NOUN", ["hot dog"]),
        ("train/NOUN station/NOUN", ["train", "station"]),
        ("fire/NOUN station/NOUN", ["station"]),
        ("an/DET orange/NOUN shirt/NOUN", ["shirt"]),
        ("an/DET orange/ADJ shirt/NOUN", ["shirt"]),
        ("an/DET orange/NOUN", ["orange"]),
        ("a/DET glass/NOUN cup/NOUN", ["cup"]),
        ("they/PRON train/VERB dogs/NOUN", ["they", "dogs"]),
        ("dining/NOUN table/NOUN leg/NOUN", ["dining table", "leg"]),
        ("dining/VERB tables/X", ["dining tables"]),
        ("something/PRON two/NUM of/ADP them/PRON", []),
        ("zebra/NOUN by/ADP Rome/PROPN", ["zebra", "Rome"]),
        ("a/DET chef/ADJ", ["chef"]),  # WordNet has it as a noun only
        ("a/DET train/VERB by/ADP", ["train"]),
        ("an/DET orange/ADJ on/ADP", ["orange"]),
        ("orange/ADJ and/CCONJ white/ADJ", []),
        ("a/DET group/NOUN of/ADP dogs/NOUN", ["dogs"]),
        ("a/DET dog/NOUN family/NOUN", ["dog"]),
        ("a/DET group/NOUN and/CCONJ a/DET dog/NOUN", ["group", "dog"]),
        ("a/DET cup/NOUN of/ADP dogs/NOUN", ["cup", "dogs"]),  # no group
        ("a/DET baby/NOUN dog/NOUN", ["dog"]),
        ("a/DET baby/NOUN and/CCONJ dog/NOUN", ["baby", "dog"]),
        ("a/DET baby/NOUN cup/NOUN", ["baby", "cup"]),
        ("umpire/ADJ black/ADJ shirt/NOUN", ["umpire", "shirt"]),  # a noun or a verb
        ("they/PRON umpire/VERB", ["they"]),
        ("", []),
    ],
)
def test_mentions(text, expected):
    assert mentions(text) == [expected]


def test_texts_keep_their_order():
    assert mentions("dog/NOUN", "", "cup/NOUN dog/NOUN") == [["dog"], [], ["cup", "dog"]]
    assert mentions() == []


def test_a_category_that_is_said_outright_counts_whatever_the_tagger_thinks():
    names = ["sink", "broccoli", "skateboard", "orange", "can"]
    finder = MentionFinder(Tags(), Synonyms(names))
    for name in names[:3]:
        for tag in ("VERB", "ADJ", "ADV", "ADP", "X", "INTJ"):
            assert finder([f"a/DET {name}/{tag} here/ADV"]) == [[name]], (name, tag)
    assert finder(["he/PRON can/AUX see/VERB"]) == [[]]
    assert finder(["an/DET orange/ADJ", "it/PRON is/AUX orange/ADJ"]) == [["orange"], []]


def test_the_rules_are_those_of_their_file():
    assert asdict(RULES) == json.loads(RULES_FILE.read_text())
