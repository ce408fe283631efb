"""Words of a query, and the vocabulary that numbers them."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlnms_d2.modeling.text import Vocabulary, tokenize


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Red CUP", ["red", "cup"]),
        ("  red\tcup\n", ["red", "cup"]),
        ("", []),
        (" \t ", []),
        ("?!... -- ,", []),
        ("red, (big) cup; here.", ["red", "big", "cup", "here"]),
        ("man's hat", ["man's", "hat"]),
        ("man’s hat", ["man's", "hat"]),
        ("rock'n'roll", ["rock'n'roll"]),
        ("'tis the dogs' 'cup'", ["tis", "the", "dogs", "cup"]),
        ("a''b", ["a", "b"]),
        ("t-shirt left-most", ["t", "shirt", "left", "most"]),
        ("number 23 at 3.5", ["number", "23", "at", "3", "5"]),
        ("3rd", ["3rd"]),
        ("red_cup ___", ["red", "cup"]),
        ("naïve ÉTÉ", ["naïve", "été"]),
        ("cafe\u0301", ["café"]),
        ("ﬁve cups²", ["five", "cups2"]),
        ("ＲＥＤ\u3000ｃｕｐ", ["red", "cup"]),  # full-width letters and space
        ("собака 红色的杯子", ["собака", "红色的杯子"]),
        ("cup😀dog", ["cup", "dog"]),
        ("red\u00a0cup", ["red", "cup"]),
    ],
)
def test_tokenize(text, words):
    assert tokenize(text) == words


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_words_hold_no_space_and_some_letter_or_digit(text):
    for word in tokenize(text):
        assert not any(c.isspace() for c in word)
        assert re.search(r"[^\W_]", word)


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("aB'’-_ 1é,."), max_size=20))
def test_the_words_of_a_text_are_their_own_words(text):
    words = tokenize(text)
    assert tokenize(" ".join(words)) == words


def test_ids_start_after_padding_and_unknown():
    vocabulary = Vocabulary(["red", "cup"])
    assert len(vocabulary) == 4
    assert vocabulary.words == ("<pad>", "<unk>", "red", "cup")
    assert vocabulary.encode(["cup", "zebra", "red", "cup"]) == [3, 1, 2, 3]
    assert vocabulary.encode([]) == []
    assert "cup" in vocabulary and "zebra" not in vocabulary


def test_no_query_word_is_ever_padding():
    vocabulary = Vocabulary(["pad", "unk"])
    assert 0 not in vocabulary.encode(tokenize("<pad> <unk> pad unk"))


def test_build_keeps_words_seen_often_enough_most_frequent_first():
    sentences = ["Red cup", "red dog, blue cup", "a red blue zebra", "apple dog"]
    # red 3; then, twice each, in alphabetical order
    assert Vocabulary.build(sentences).words[2:] == ("red", "blue", "cup", "dog")
    assert Vocabulary.build(sentences, min_count=3).words[2:] == ("red",)
    assert set(Vocabulary.build(sentences, min_count=1).words[2:]) == {
        *("red", "blue", "cup", "dog", "a", "zebra", "apple")
    }
    assert Vocabulary.build([]).words == Vocabulary().words


def test_a_word_twice_in_one_sentence_counts_twice():
    assert Vocabulary.build(["cup on cup"]).words[2:] == ("cup",)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.sampled_from("abc '"), max_size=8), max_size=8), st.randoms())
def test_build_does_not_depend_on_the_order_of_the_sentences(sentences, random):
    shuffled = random.sample(sentences, len(sentences))
    assert Vocabulary.build(shuffled).words == Vocabulary.build(sentences).words


def test_fingerprints_differ_by_words_and_by_order_and_fit_an_int64():
    lists = [(), ("red",), ("red", "cup"), ("cup", "red"), ("redcup",), ("r", "edcup")]
    fingerprints = [Vocabulary(words).fingerprint for words in lists]
    assert len(set(fingerprints)) == len(lists)
    assert all(0 <= f < 2**63 for f in fingerprints)
    assert Vocabulary(iter(["red", "cup"])).fingerprint == fingerprints[2]


def test_the_fingerprint_is_the_same_in_every_release():
    """It is stored in checkpoints."""
    assert Vocabulary(["red", "naïve"]).fingerprint == 1234856102593199801


@pytest.mark.parametrize("words", [["red", "cup", "red"], ["<pad>"], ["cup", "<unk>"]])
def test_a_word_twice_is_an_error_that_names_it(words):
    with pytest.raises(ValueError, match=f"'{words[-1]}' more than once"):
        Vocabulary(words)


@pytest.mark.parametrize("words", [(), ("red", "naïve", "man's", "杯", 'q"\\')])
def test_save_and_load_give_the_same_vocabulary(tmp_path, words):
    Vocabulary(words).save(tmp_path / "vocab.json")
    loaded = Vocabulary.load(str(tmp_path / "vocab.json"))
    assert loaded.words == Vocabulary(words).words
    assert loaded.fingerprint == Vocabulary(words).fingerprint
    assert [p.name for p in tmp_path.iterdir()] == ["vocab.json"]


@pytest.mark.parametrize("path", ["no.json", "."])
def test_a_missing_file_is_named_with_the_key(tmp_path, path):
    with pytest.raises(FileNotFoundError, match=r"MODEL\.VLNMS\.VOCAB") as error:
        Vocabulary.load(tmp_path / path)
    assert str(tmp_path / path) in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a vocabulary"),
        (b'{"version": 1, "words": ["re', "is not a vocabulary"),
        (b"\xff\xfe\x00", "is not a vocabulary"),
        (b'["red"]', "is not a vocabulary"),
        (b"3", "is not a vocabulary"),
        (b'{"words": ["red"]}', "is not a vocabulary"),
        (b'{"version": 1}', "is not a vocabulary"),
        (b'{"version": 2, "words": ["red"]}', "of version 2; this release reads 1"),
        (b'{"version": "1", "words": ["red"]}', "of version '1'"),
        (b'{"version": 1, "words": "red"}', "must be a list of strings"),
        (b'{"version": 1, "words": ["red", 3]}', "must be a list of strings"),
        (b'{"version": 1, "words": ["red", "cup", "red"]}', "'red' more than once"),
        (b'{"version": 1, "words": ["<unk>"]}', "'<unk>' more than once"),
    ],
)
def test_a_bad_file_is_an_error_that_names_it(tmp_path, content, message):
    path = tmp_path / "vocab.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        Vocabulary.load(path)
    assert str(path) in str(error.value)


def test_the_file_is_versioned_json(tmp_path):
    Vocabulary(["red"]).save(tmp_path / "vocab.json")
    assert json.loads((tmp_path / "vocab.json").read_text()) == {"version": 1, "words": ["red"]}
