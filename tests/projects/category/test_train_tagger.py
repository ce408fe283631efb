"""Training of the pipeline that finds nouns, on a treebank of one kind of sentence."""

import importlib.util
import itertools
import json
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import spacy
from conftest import REPO

from category_study import tagger
from vlnms_d2.language import NounFinder

_SPEC = importlib.util.spec_from_file_location("train_tagger", REPO / "tools" / "train_tagger.py")
train_tagger = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(train_tagger)

ADJECTIVES = ("red", "blue", "small", "wooden", "parked")
NOUNS = ("car", "dog", "House", "umbrella", "ship", "cat")
VERBS = ("sits", "stands", "sleeps")


def sentence(adjective: str, subject: str, verb: str, place: str) -> str:
    """CoNLL-U of "The ADJ NOUN VERBs in the NOUN."."""
    verb_form = "VerbForm=Fin|Tense=Pres"
    rows = [
        ("The", "DET", "_", 3, "det"),
        (adjective, "VERB" if adjective == "parked" else "ADJ", "VerbForm=Part", 3, "amod"),
        (subject, "NOUN", "Number=Sing", 4, "nsubj"),
        (verb, "VERB", verb_form, 0, "root"),
        ("in", "ADP", "_", 7, "case"),
        ("the", "DET", "_", 7, "det"),
        (place, "NOUN", "Number=Sing", 4, "obl"),
        (".", "PUNCT", "_", 4, "punct"),
    ]
    return "".join(
        "\t".join([str(i), word, word.lower(), pos, "_", feats if pos != "ADJ" else "_", str(head),
                   dep, "_", "SpaceAfter=No" if i == 7 else "_"]) + "\n"
        for i, (word, pos, feats, head, dep) in enumerate(rows, start=1)
    )  # fmt: skip


@pytest.fixture(scope="module")
def treebank(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("treebank")
    every = list(itertools.product(ADJECTIVES, NOUNS, VERBS, NOUNS))
    Random(0).shuffle(every)
    for split, part in (("train", every[:60]), ("dev", every[60:80]), ("test", every[80:100])):
        text = "".join(f"# sent_id = {i}\n{sentence(*s)}\n" for i, s in enumerate(part))
        (folder / f"en_ewt-ud-{split}.conllu").write_text(text)
    return folder


@pytest.fixture(scope="module")
def docs(treebank):
    return tagger.read_treebank(treebank, "dev")


def test_a_pipeline_is_trained_measured_and_saved(treebank, tmp_path, capsys):
    out = tmp_path / "tiny_pos"
    train_tagger.main(["--treebank", str(treebank), "--out", str(out), "--epochs", "10"])
    finder = NounFinder(str(out))
    assert finder.nouns(["blue ship in umbrella", "The cat"]) == [["ship", "umbrella"], ["cat"]]
    assert finder.noun_chunks(["the parked car in the house"]) == [["the parked car", "the house"]]

    meta = json.loads((out / "meta.json").read_text())
    assert meta["name"] == "tiny_pos" and meta["license"] == "CC BY-SA 4.0"
    printed = capsys.readouterr().out
    again = tagger.evaluate(spacy.load(out), tagger.read_treebank(treebank, "test"))
    assert meta["performance"]["test"] == again
    assert set(again) == {
        f"{text}_{what}" for text in ("as_is", "lower", "fragments") for what in ("pos", "nouns")
    }
    for split in ("dev", "test"):
        for key, value in meta["performance"][split].items():
            assert 95 < value <= 100
            assert f"{split:5}{key:17}{value:6.2f}" in printed


def test_the_same_seed_gives_the_same_pipeline(docs):
    runs = [tagger.train(docs[:8], epochs=1, seed=seed) for seed in (3, 3, 4)]
    first, second, other = (nlp.get_pipe("morphologizer").model.to_bytes() for nlp in runs)
    assert first == second
    assert first != other


def test_accuracy_counts_right_words(docs):
    nlp = spacy.blank("en")

    @spacy.Language.component("tests_all_nouns")
    def all_nouns(doc):
        for token in doc:
            token.pos_ = "NOUN"
        return doc

    nlp.add_pipe("tests_all_nouns")
    scores = tagger.evaluate(nlp, docs)
    # Of eight words two are nouns; of a fragment, one of two or three.
    assert scores["as_is_pos"] == scores["lower_nouns"] == 25
    phrases = Counter(len(phrase) for doc in docs for phrase in tagger.noun_phrases(doc))
    assert set(phrases) == {2, 3}
    assert 100 / 3 < scores["fragments_pos"] < 50


def test_noun_phrases_leave_out_what_links_them(docs):
    for doc in docs:
        words = [token.text for token in doc]
        found = [[token.text for token in phrase] for phrase in tagger.noun_phrases(doc)]
        assert found == [words[:3], words[5:7]]


def test_texts_keep_tags_and_spaces(docs):
    doc, nlp = docs[0], spacy.blank("en")
    assert tagger.as_text(nlp, list(doc), lower=False).text == doc.text.strip()
    phrase = tagger.without_articles(list(doc))
    text = tagger.as_text(nlp, phrase, lower=True)
    assert text.text == " ".join(w for w in doc.text.lower().split() if w != "the")
    assert [t.pos_ for t in text] == [t.pos_ for t in phrase]
    assert [t.text for t in tagger.without_end(list(doc))] == [t.text for t in doc][:-1]
    punctuation = [doc[len(doc) - 1]]
    assert tagger.without_end(punctuation) == punctuation


def test_only_forms_of_verbs_are_kept(docs):
    kept = {(token.pos_, str(token.morph)) for doc in docs for token in doc if str(token.morph)}
    assert kept == {("VERB", "VerbForm=Part")}


def test_an_epoch_has_every_sentence_and_fragments_in_both_cases(docs):
    nlp = spacy.blank("en")
    epochs = [[t.text for t in tagger.Augmenter(docs, Random(s)).epoch(nlp)] for s in (0, 0, 1)]
    assert epochs[0] == epochs[1] != epochs[2]
    texts = epochs[0]
    whole = sorted(text.lower().rstrip(".") for text in texts if len(text.split()) == 7)
    assert whole == sorted(doc.text.lower().rstrip(". ") for doc in docs)
    assert len(texts) == 3 * len(docs)  # each has two noun phrases
    assert any(text.endswith(".") for text in texts)
    assert any(text == text.lower() for text in texts)
    assert any(text.startswith("The ") for text in texts)
    assert any(len(text.split()) == 1 for text in texts)  # without its article


def test_rare_words_become_unknown_ones_alike_in_front_and_at_the_end(docs, monkeypatch):
    monkeypatch.setattr(tagger, "BLURRED_SHARE", 1.0)
    augmenter = tagger.Augmenter(docs[:1], Random(0))
    for token in docs[0]:
        word, blurred = token.text, augmenter._blur(token)
        rare = augmenter.counts[token.text.lower()] == 1 and len(word) >= 5
        assert (blurred != word) == rare
        assert (blurred[0], len(blurred)) == (word[0], len(word))
        assert blurred[-3:] == word[-3:]


# --- errors ------------------------------------------------------------------------------------


def failure(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as error:
        train_tagger.main(list(arguments))
    assert error.value.code == 2
    return capsys.readouterr().err


def test_a_missing_file_says_where_it_comes_from(tmp_path, capsys):
    message = failure(capsys, "--treebank", str(tmp_path), "--out", str(tmp_path / "out"))
    assert f"{tmp_path / 'en_ewt-ud-train.conllu'}: no such file" in message
    assert "https://universaldependencies.org" in message and "UD_English-EWT" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["", "word\tword\n", "1\tcup\tcup\t_\t_\t_\t0\troot\t_\t_\n"])
def test_a_file_that_is_no_treebank_is_named(tmp_path, content, capsys):
    path = tmp_path / "en_ewt-ud-train.conllu"
    path.write_text(content)
    message = failure(capsys, "--treebank", str(tmp_path), "--out", str(tmp_path / "out"))
    assert f"{path}: expected" in message and "UD_English-EWT" in message


def test_no_epochs_are_refused(treebank, tmp_path, capsys):
    args = ["--treebank", str(treebank), "--out", str(tmp_path / "out"), "--epochs", "0"]
    assert "--epochs is 0, expected at least 1" in failure(capsys, *args)
