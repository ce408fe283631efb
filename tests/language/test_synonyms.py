"""The table of synonyms, and finding them among words."""

import json
import re

import pytest
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.lvis_v1_categories import LVIS_CATEGORIES
from hypothesis import given
from hypothesis import strategies as st

from vlnms_d2.language.synonyms import TABLE, Mention, Synonyms, singular, words_of

COCO = MetadataCatalog.get("coco_2017_val").thing_classes
LVIS = [category["name"] for category in LVIS_CATEGORIES]
LICENCE = TABLE.parent / "WORDNET_LICENCE.txt"
SYNONYMS = Synonyms(COCO)


def find(text: str) -> list[tuple[str, list[str]]]:
    words = text.split()
    return [
        (" ".join(words[start:end]), [COCO[c] for c in classes])
        for start, end, classes in SYNONYMS.find(words)
    ]


def test_the_table_has_the_categories_of_coco_and_lvis():
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    assert "WordNet 3.0" in table["licence"] and LICENCE.is_file()
    names = {name for of_category in table["names"] for name in of_category.split("|")}
    assert {" ".join(words_of(name)) for name in COCO} < names
    assert {re.sub(r"[\W_]+", " ", name.lower()).strip() for name in LVIS} < names
    for key, words in table["words"].items():
        assert re.fullmatch(r"(\d+(>\d+)*)?(<\d+(,\d+)*)?", key), key
        assert words.split("|") == sorted(set(words.split("|")), key=lambda word: word.rstrip("*+"))


@pytest.mark.parametrize(
    ("word", "category"),
    [
        ("baker", "person"), ("skier", "person"), ("egret", "bird"), ("purse", "handbag"),
        ("plumber", "person"), ("heron", "bird"), ("dachshund", "dog"), ("bat", "baseball bat"),
        ("pitcher", "person"), ("he", "person"), ("smartphone", "cell phone"),
        ("schoolbus", "bus"), ("kitchen table", "dining table"), ("goats", "sheep"),
    ],
)  # fmt: skip
def test_kinds_that_nobody_wrote_down(word, category):
    assert [COCO[i] for i in SYNONYMS.classes_of(word)] == [category]


def test_superordinates_stand_for_all_their_kinds():
    vehicles = {COCO[i] for i in SYNONYMS.classes_of("vehicles")}
    assert {"car", "bus", "truck", "train"} <= vehicles and "person" not in vehicles
    animals = {COCO[i] for i in SYNONYMS.classes_of("animal")}
    assert {"dog", "zebra", "bird"} <= animals and "teddy bear" not in animals
    appliances = {COCO[i] for i in SYNONYMS.classes_of("appliances")}
    assert {"oven", "microwave", "refrigerator"} <= appliances
    for word in ("animals", "appliances", "fruit"):
        assert SYNONYMS.is_general(word), word
    for word in ("dog", "puppy", "table", "sports ball", "unknown"):
        assert not SYNONYMS.is_general(word), word


def test_colours_and_function_words_are_no_things():
    words = ("white", "black", "it", "in", "us", "who", "glasses", "front", "second", "desk")
    for word in (*words, "stand in", "high up", "has been", "walk in"):
        assert SYNONYMS.classes_of(word) == (), word


def test_lvis_finds_the_nearest_category_and_both_homonyms():
    lvis = Synonyms(LVIS)

    def named(word: str) -> set[str]:
        return {LVIS[i] for i in lvis.classes_of(word)}

    assert named("merganser") == {"duck"} and named("warbler") == {"bird"}
    assert named("bat") == {"bat_(animal)", "baseball_bat"}
    assert named("baseball bat") == {"baseball_bat"}
    assert named("orange") == {"orange_(fruit)"} and named("skier") == {"person"}


def test_phrases_that_mean_something_else_than_their_last_word():
    """Nobody's list of categories has to name them."""
    assert Synonyms(["dog"]).find(["hot", "dog", "dog"]) == [Mention(0, 2, ()), Mention(2, 3, (0,))]
    assert Synonyms(["bat_(animal)"]).find(["a", "baseball", "bat"]) == [Mention(1, 3, ())]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a chef and two puppies", [("chef", ["person"]), ("puppies", ["dog"])]),
        ("man in a taxi", [("man", ["person"]), ("taxi", ["car"])]),
        ("women at tables", [("women", ["person"]), ("tables", ["dining table"])]),
        ("a hot dog", [("hot dog", ["hot dog"])]),
        ("hot dogs and dogs", [("hot dogs", ["hot dog"]), ("dogs", ["dog"])]),
        ("glasses of wine", [("glasses of wine", ["wine glass"])]),
        ("a teddy bear", [("teddy bear", ["teddy bear"])]),
        ("Polar BEARS", [("Polar BEARS", ["bear"])]),
        ("buses skis sheep geese knives", [
            ("buses", ["bus"]), ("skis", ["skis"]), ("sheep", ["sheep"]), ("geese", ["bird"]),
            ("knives", ["knife"]),
        ]),
        ("blue sky over there", []),
        ("", []),
    ],
)  # fmt: skip
def test_synonyms_are_found(text, expected):
    assert find(text) == expected


def test_synonyms_of_several_categories():
    assert Synonyms(["mouse", "computer mouse", "car", "car"]).find(["mouse", "cars"]) == [
        Mention(0, 1, (0,)),
        Mention(1, 2, (2, 3)),
    ]


def test_names_that_are_not_in_the_table_match_themselves():
    synonyms = Synonyms(["grand_piano", "aardvark"])
    assert synonyms.find(["two", "grand", "pianos"]) == [Mention(1, 3, (0,))]
    assert synonyms.classes_of("aardvarks") == (1,)
    assert synonyms.classes_of("man") == synonyms.classes_of("") == ()


def test_names_of_open_vocabularies():
    """As LVIS and Open Images write them."""
    names = ["fire_hydrant", "baseball_bat", "cup_(drink)", "Human face", "bow_(weapon)", "mug"]
    synonyms = Synonyms([*names, "bow_(decorative_ribbons)", "cup", "(x)"])
    assert synonyms.find(["two", "fire", "hydrants"]) == [Mention(1, 3, (0,))]
    assert synonyms.find(["Human", "Faces"]) == [Mention(0, 2, (3,))]
    assert synonyms.classes_of("baseball bats") == (1,)
    assert synonyms.classes_of("cups") == (2, 7) and synonyms.classes_of("bow") == (4, 6)
    assert synonyms.classes_of("mug") == (5,)  # has a category of its own, so it is no cup
    assert synonyms.classes_of("teacup") == (2, 7)  # has no category of its own
    assert words_of("(x)") == ["x"] and words_of("()") == []


@pytest.mark.parametrize("name", COCO)
def test_every_name_matches_its_category_only(name):
    also = {"bear": ["teddy bear"]}  # as people say
    assert [COCO[i] for i in SYNONYMS.classes_of(name)] == [name, *also.get(name, [])]


def test_what_people_call_otherwise_than_wordnet():
    for word, names in {
        "glass": ["wine glass", "cup"], "water glass": ["wine glass", "cup"],
        "wine glasses": ["wine glass"], "bags": ["backpack", "handbag", "suitcase"],
        "board": ["snowboard", "skateboard", "surfboard"], "computer": ["tv", "laptop"],
    }.items():  # fmt: skip
        found = SYNONYMS.find(word.split())[-1].classes
        assert [COCO[i] for i in found] == names, word
    lvis = Synonyms(LVIS)
    assert "teddy_bear" in {LVIS[i] for i in lvis.classes_of("bear")}


@given(st.lists(st.sampled_from(["hot", "dog", "dogs", "of", "wine", "glass", "men"]), max_size=7))
def test_the_longest_at_each_place(words):
    """Against a plain scan that tries every length."""
    expected, start = [], 0
    while start < len(words):
        lengths = [
            n for n in range(1, len(words) - start + 1)
            if SYNONYMS.classes_of(" ".join(words[start : start + n]))
        ]  # fmt: skip
        if lengths:
            end = start + lengths[-1]
            expected.append((start, end, SYNONYMS.classes_of(" ".join(words[start:end]))))
            start = end
        else:
            start += 1
    assert [tuple(mention) for mention in SYNONYMS.find(words)] == expected


@pytest.mark.parametrize(
    ("plural", "one"),
    [
        ("dogs", "dog"), ("benches", "bench"), ("puppies", "puppy"), ("glasses", "glasses"),
        ("boxes", "box"), ("women", "woman"), ("children", "child"), ("pies", "pie"),
        ("horses", "horse"), ("vases", "vase"), ("taxis", "taxi"), ("shoes", "shoe"),
    ],
)  # fmt: skip
def test_singular(plural, one):
    assert singular(plural) == one == singular(one)
