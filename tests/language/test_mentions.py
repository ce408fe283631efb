"""Which words of a text stand for things."""

import json
from dataclasses import asdict, replace

import pytest

from vlnms_d2.language.kinds import Kinds
from vlnms_d2.language.mentions import MentionFinder
from vlnms_d2.language.rules import FILE, RULES

KINDS = Kinds(["person", "hot dog", "dog", "train", "orange", "dining table", "cup"])


class Tags:
    """Tags given with the words: "dog/NOUN"."""

    def tagged(self, texts):
        return [[tuple(word.split("/")) for word in text.split()] for text in texts]


def mentions(*texts: str, **rules) -> list[list[str]]:
    return MentionFinder(Tags(), KINDS, replace(RULES, **rules))(texts)


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
        ("they/PRON train/VERB dogs/NOUN", ["they", "dogs"]),
        ("dining/NOUN table/NOUN leg/NOUN", ["dining table", "leg"]),
        ("dining/VERB tables/X", ["dining tables"]),
        ("something/PRON two/NUM of/ADP them/PRON", []),
        ("zebra/NOUN by/ADP Rome/PROPN", ["zebra", "Rome"]),
        ("", []),
    ],
)
def test_mentions(text, expected):
    assert mentions(text) == [expected]


def test_texts_keep_their_order():
    assert mentions("dog/NOUN", "", "cup/NOUN dog/NOUN") == [["dog"], [], ["cup", "dog"]]
    assert mentions() == []


@pytest.mark.parametrize(
    ("text", "rules", "expected"),
    [
        ("train/NOUN station/NOUN", {"heads_only": True}, ["station"]),
        ("train/NOUN", {"heads_only": True}, ["train"]),
        ("dog/NOUN cup/NOUN and/CCONJ hot/ADJ dog/NOUN", {"heads_only": True}, ["cup", "hot dog"]),
        ("they/PRON train/VERB dogs/NOUN", {"nouns_only": False}, ["they", "train", "dogs"]),
        ("orange/ADJ dog/NOUN", {"nouns_only": False}, ["dog"]),
    ],
)
def test_rules(text, rules, expected):
    assert mentions(text, **rules) == [expected]


def test_the_rules_are_those_of_their_file():
    assert asdict(RULES) == json.loads(FILE.read_text())
