"""Texts on several processes, against reading them here."""

import multiprocessing
import os

import pytest

from vlnms_d2.language import many_texts
from vlnms_d2.language.many_texts import ManyTexts
from vlnms_d2.language.nouns import NounFinder


def words_and_process(texts):
    return [[*text.split(), str(os.getpid())] for text in texts]


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(many_texts, "LEAST", 4)
    monkeypatch.setattr(many_texts, "CHUNK", 3)


def test_the_nouns_of_each_text_in_order(few):
    things = ("cup", "car", "tree", "table", "man", "road", "bird")
    texts = [f"the {thing} near a dog" for thing in things]
    finder = NounFinder()
    found = ManyTexts(finder.nouns, 2)(iter(texts))
    assert found == finder.nouns(texts) and found[0] == ["cup", "dog"]


def test_processes_work_where_there_are_enough_texts(few):
    here = str(os.getpid())
    many = ManyTexts(words_and_process, 2)(["a b"] * 10)
    assert [own[:2] for own in many] == [["a", "b"]] * 10
    assert here not in {own[2] for own in many}
    for processes, count in ((2, 3), (1, 10), (2, 0)):
        assert all(
            own[2] == here for own in ManyTexts(words_and_process, processes)(["a b"] * count)
        )


def test_a_process_that_may_have_none_reads_itself(few, monkeypatch):
    monkeypatch.setattr(multiprocessing.current_process(), "_config", {"daemon": True})
    assert ManyTexts(words_and_process, 2)(["a"] * 9)[0][1] == str(os.getpid())


def fails(texts):
    raise ValueError("no such text")


def test_what_is_raised_there_is_raised_here(few):
    with pytest.raises(ValueError, match="no such text"):
        ManyTexts(fails, 2)(["a"] * 9)


def test_no_process_is_refused():
    with pytest.raises(ValueError, match="processes is 0, expected at least 1"):
        ManyTexts(words_and_process, 0)
