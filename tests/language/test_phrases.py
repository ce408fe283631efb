"""Phrases and cues of what people say."""

import json

import pytest

from vlnms_d2.language import phrases
from vlnms_d2.language.phrases import CUES, RELATIONS, TABLE, join_phrases, split_phrases
from vlnms_d2.language.synonyms import Synonyms

NAMES = ["person", "car", "bus", "couch", "cat", "orange", "hot dog", "banana", "chair", "bed"]
NAMES += ["parking meter", "dining table"]
SYNONYMS = Synonyms(NAMES)


def read(text: str):
    """The objects of an expression; words name a category if the table of synonyms says so."""
    split = split_phrases(text, SYNONYMS)
    return join_phrases(split, [bool(SYNONYMS.find(phrase.words)) for phrase in split])


@pytest.mark.parametrize(
    ("text", "words", "cues"),
    [
        ("far right person ...cut in half", ["person"], {"right": 1, "right_order": 1, "cut": 1}),
        ("lady on left blue shirty", ["lady"], {"left": 1, "blue_upper": 1}),
        ("second from the right", [], {"right_order": 2}),
        ("2nd man from left", ["man"], {"left_order": 2}),
        ("last guy on the right", ["guy"], {"right_order": 1}),
        ("the second man", ["man"], {"left_order": 2}),
        ("person in red", ["person"], {"red_whole": 1}),
        ("person in orange", ["person"], {"orange_whole": 1}),
        ("orange on the left", ["orange"], {"orange_whole": 1, "left": 1}),
        ("girl in middle", ["girl"], {"middle": 1}),
        ("very front botom", [], {"front": 1, "bottom": 1}),
        ("dude behind everyone", [], {"back": 1}),
        ("bike closest to camera", ["bike"], {"front": 1}),
        ("closest bike", ["bike"], {"front": 1}),
        ("the car on the left of the picture", ["car"], {"left": 1}),
        ("woman in white top on left", ["woman"], {"white_upper": 1, "left": 1}),
        ("black and white cat", ["cat"], {"black_whole": 1, "white_whole": 1}),
        ("lady with blonde hair", ["lady"], {"yellow_head": 1}),
        ("man in red t - shirt and black shorts", ["man"], {"red_upper": 1, "black_lower": 1}),
        ("tallest chair", ["chair"], {"tall": 1}),
        ("right most banana", ["banana"], {"right": 1, "right_order": 1}),
        ("cow on left edge", ["cow"], {"left": 1, "left_order": 1, "cut": 1}),
        ("guy orange sleeves", ["guy"], {"orange_upper": 1}),
        ("bottle w/o the red candles", ["bottle"], {}),
        ("car with no red bus on the left", ["car"], {"left": 1}),
        ("not the big one", [], {"big": 1}),
        ("other coast theirs", [], {}),  # not "others", "coat", "their"
        ("hot dog at the top", ["hot dog"], {"top": 1}),
        ("parking meter on the left", ["parking meter"], {"left": 1}),
        ("man facing left", ["man"], {}),
        ("yellow car at top", ["car"], {"yellow_whole": 1, "top": 1}),
        ("closed car there", ["car"], {}),  # not "close" and "theyre"
        ("she on the left", ["person"], {"left": 1}),
        ("couple of cats on the left", ["cats"], {"left": 1}),
        ("", [], {}),
    ],
)
def test_one_object(text, words, cues):
    [meant] = read(text)
    assert meant.cues == cues
    assert all(word in meant.words for name in words for word in name.split())


@pytest.mark.parametrize(
    ("text", "cues", "other", "relation", "other_cues"),
    [
        ("man next to the red bus", {}, "bus", "near_it", {"red_whole": 1}),
        ("man next to the left car", {}, "car", "near_it", {"left": 1}),
        ("man behind the couch on left", {"left": 1}, "couch", "behind_it", {}),
        ("the chair to the left of the bed", {}, "bed", "on_left", {}),
        ("man by a parking meter", {}, "meter", "near_it", {}),
        ("cat on a dining room table", {}, "dining", "touching_it", {}),
        ("cat on top of the couch", {}, "couch", "above_it", {}),
        ("cat in front of car", {}, "car", "before_it", {}),
        ("car near a man in blue jeans", {}, "man", "near_it", {"blue_lower": 1}),
        ("man on couch in green shirt", {"green_upper": 1}, "couch", "touching_it", {}),
        ("second man from the left next to the bus", {"left_order": 2}, "bus", "near_it", {}),
        ("cat in front of the second car", {}, "car", "before_it", {"left_order": 2}),
        ("driver of the red bus", {}, "bus", "touching_it", {"red_whole": 1}),
        ("the couch the black cat is on", {}, "cat", "touching_it", {"black_whole": 1}),
        ("car that the man in red drives", {"red_whole": 1}, "man", "touching_it", {}),
        ("thing he is holding", {}, "person", "touching_it", {}),
        ("car next to him", {}, "person", "near_it", {}),
    ],
)
def test_two_objects(text, cues, other, relation, other_cues):
    meant, landmark = read(text)
    assert meant.cues == cues and not meant.relation
    assert other in landmark.words and landmark.relation == relation
    assert landmark.cues == other_cues


@pytest.mark.parametrize(
    ("text", "is_caption"),
    [
        ("a dog in front of a white cat", True),
        ("dog in front of a white cat", False),
        ("a dog on the left of a white cat", False),
        ("second dog in a row of dogs and cats", False),
        ("the bus is driving down the street in the rain", True),
        ("the man in the red shirt is sitting on a couch", True),
        ("the couch the man in the red shirt is sitting on", False),
        ("the man who is sitting on the left of the couch", False),
        ("the dog on the left of the cat on the right", False),
        ("a dog right next to a big white cat", True),
        ("a dog in a row of dogs closest to the camera", False),
        ("a boy in a blue shirt holding a cat", False),
        ("a boy in a blue shirt is holding a cat", True),
    ],
)
def test_a_long_text_is_a_caption_unless_it_means_one_object(text, is_caption):
    phrases = split_phrases(text, SYNONYMS)
    assert (phrases[0].cues.get("caption") == 1) == is_caption
    assert not is_caption or [phrase.words for phrase in phrases] == [[text]]


@pytest.mark.parametrize("text", ["dude in shirt", "wearing a hat", "blond hair", "hand on left"])
def test_who_has_clothes_is_a_person(text):
    assert read(text)[0].is_person


def test_what_is_in_a_hand_is_nobody():
    assert not read("thing in his hand")[0].is_person


def test_names_of_categories_are_not_taken_for_misspelled_cues():
    assert SYNONYMS.knows("banana") and SYNONYMS.knows("giraffe") and not SYNONYMS.knows("midle")
    assert read("banana")[0].words == ["banana"]  # not "bandana"
    assert read("midle car")[0].cues == {"middle": 1}


def test_all_entries_of_the_table_have_a_use_and_are_found():
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    columns = {cue.split("_")[0] for cue in CUES} | set(phrases.PARTS) | set(RELATIONS)
    columns |= set(phrases.ORDINALS) | {"person", "scene", "weak", "nothing", "noun_ing"}
    columns |= {"limb", "pronoun", "begins_clause", "outermost", "without", "refers"}
    assert set(table) <= columns
    for entries in table.values():
        for words in entries:
            assert phrases._WORD.findall(words) == words.split() and len(words.split()) <= 6


def test_any_text_is_read():
    for text in (
        "?!",
        "left left left",
        "in in of the with",
        "second",
        "a" * 3000,
        "é ü 李",
        "and",
    ):
        for phrase in read(text):
            assert set(phrase.cues) <= set(CUES)
