"""The table of kinds, and finding them among words."""

import pytest
from detectron2.data import MetadataCatalog
from hypothesis import given
from hypothesis import strategies as st

from vlnms_d2.language.kinds import Kinds, Mention, _read_table, singular, words_of

COCO = MetadataCatalog.get("coco_2017_val").thing_classes
KINDS = Kinds(COCO)


def found(text: str) -> list[tuple[str, list[str]]]:
    words = text.split()
    return [
        (" ".join(words[start:end]), [COCO[c] for c in classes])
        for start, end, classes in KINDS.find(words)
    ]


def test_the_table_is_of_cocos_categories():
    table = _read_table()
    assert {" ".join(words_of(name)) for name in COCO} == set(table)
    for name, kinds in table.items():
        assert kinds == sorted(set(kinds)), name
        assert all(kind == " ".join(words_of(kind)) for kind in kinds), name


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
def test_kinds_are_found(text, expected):
    assert found(text) == expected


def test_kinds_of_several_categories():
    assert Kinds(["mouse", "computer mouse", "car", "car"]).find(["mouse", "cars"]) == [
        Mention(0, 1, (0,)),
        Mention(1, 2, (2, 3)),
    ]


def test_names_that_the_table_lacks_are_kinds_of_themselves():
    kinds = Kinds(["grand_piano", "aardvark"])
    assert kinds.find(["two", "grand", "pianos"]) == [Mention(1, 3, (0,))]
    assert kinds.classes_of("aardvarks") == (1,)
    assert kinds.classes_of("man") == kinds.classes_of("") == ()


def test_names_of_open_vocabularies():
    """As LVIS and Open Images write them."""
    names = ["fire_hydrant", "baseball_bat", "cup_(drink)", "Human face", "bow_(weapon)", "mug"]
    kinds = Kinds([*names, "bow_(decorative_ribbons)", "cup", "(x)"])
    assert kinds.find(["two", "fire", "hydrants"]) == [Mention(1, 3, (0,))]
    assert kinds.find(["Human", "Faces"]) == [Mention(0, 2, (3,))]
    assert kinds.classes_of("baseball bats") == (1,)
    assert kinds.classes_of("cups") == (2, 7) and kinds.classes_of("bow") == (4, 6)
    assert kinds.classes_of("mug") == (5,)  # of its own category, no cup
    assert kinds.classes_of("teacup") == (2, 7)  # no category of its own
    assert words_of("(x)") == ["x"] and words_of("()") == []


@pytest.mark.parametrize("name", COCO)
def test_every_name_is_a_kind_of_its_category_only(name):
    assert [COCO[i] for i in KINDS.classes_of(name)] == [name]


@given(st.lists(st.sampled_from(["hot", "dog", "dogs", "of", "wine", "glass", "men"]), max_size=7))
def test_the_longest_at_each_place(words):
    """Against a plain scan that tries every length."""
    expected, start = [], 0
    while start < len(words):
        lengths = [
            n for n in range(1, len(words) - start + 1)
            if KINDS.classes_of(" ".join(words[start : start + n]))
        ]  # fmt: skip
        if lengths:
            end = start + lengths[-1]
            expected.append((start, end, KINDS.classes_of(" ".join(words[start:end]))))
            start = end
        else:
            start += 1
    assert [tuple(mention) for mention in KINDS.find(words)] == expected


@pytest.mark.parametrize(
    ("plural", "one"),
    [
        ("dogs", "dog"), ("benches", "bench"), ("puppies", "puppy"), ("glasses", "glass"),
        ("boxes", "box"), ("women", "woman"), ("children", "child"), ("pies", "pie"),
        ("horses", "horse"), ("vases", "vase"), ("taxis", "taxi"), ("shoes", "shoe"),
    ],
)  # fmt: skip
def test_singular(plural, one):
    assert singular(plural) == one == singular(one)
