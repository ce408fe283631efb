"""Words: one meaning each, and misspellings that mean nothing else."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_scenes import read

from refshapes import lexicon
from refshapes.phrasing import misspell, phrase
from refshapes.resolver import Description, Pick, Relation
from refshapes.scene import COLORS, PATTERNS
from vlnms_d2.data.datasets.refshapes import CATEGORIES, STYLES


def test_the_lexicon_names_everything_a_scene_contains():
    assert set(lexicon.CATEGORY_WORDS) == set(lexicon.POSES) == set(CATEGORIES)
    assert set(lexicon.COLOR_WORDS) == set(COLORS)
    assert set(lexicon.PATTERN_BEFORE) == set(lexicon.PATTERN_AFTER) == set(PATTERNS)


def test_a_phrase_with_two_meanings_is_refused(monkeypatch):
    monkeypatch.setattr(lexicon, "FILLERS", ("mug",))
    with pytest.raises(ValueError, match="'mug' means both"):
        lexicon.phrase_meanings()


@given(st.integers(), st.sampled_from(STYLES), st.sampled_from(CATEGORIES))
def test_every_phrase_reads_back_as_what_it_says(seed, style, category):
    rng = Random(seed)
    target = Description("key", color=rng.choice(COLORS), size=rng.choice((None, "small")))
    options = [
        {"pick": Pick("side", rng.choice(list(lexicon.SIDE_BEFORE)))},
        {"pick": Pick("extreme", rng.choice(list(lexicon.EXTREME_BEFORE)))},
        {"pick": Pick("ordinal", "left", rng.choice((2, 3)))},
        {"relations": (Relation("below", (target,)), Relation("near", (Description("car"),)))},
        {"relations": (Relation("between", (target, Description("tree"))),)},
    ]
    meaning = Description(
        category,
        color=rng.choice((None, *COLORS)),
        pattern=rng.choice((None, *PATTERNS)),
        size=rng.choice((None, "small", "large")),
        hidden=rng.random() < 0.3,
        **rng.choice(options),
    )
    assert read(phrase(meaning, style, rng, [True, False])) == meaning


def test_articles_fit():
    for seed in range(40):
        text = phrase(
            Description(
                "cup",
                color="orange",
                relations=(Relation("near", (Description("key"),)),),
            ),
            "refcocog",
            Random(seed),
            [seed % 2 == 0],
        )
        assert text.startswith(("an orange ", "the orange "))
        assert (" the " in text[4:]) == (seed % 2 == 0)


def test_an_object_like_the_referent_is_another_one():
    plain = Description("bird", color="red", relations=(Relation("near", (Description("bird"),)),))
    for seed in range(20):
        text = phrase(plain, "refcocog", Random(seed), [False])
        noun = text.split()[-1]
        assert text.endswith(f"another {noun}") and text.count(noun) == 2


@given(st.integers())
def test_a_misspelling_is_one_slip_in_one_content_word(seed):
    text = "the small orange bottle to the left of a striped umbrella"
    wrong = misspell(text, Random(seed))
    pairs = zip(text.split(), wrong.split(), strict=True)
    ((right, slip),) = [(a, b) for a, b in pairs if a != b]
    assert right in lexicon.content_words()
    assert slip not in lexicon.words() and abs(len(slip) - len(right)) <= 1
    assert slip[0] == right[0]


def test_short_words_are_spelt_well():
    assert misspell("red cup on the left", Random(0)) is None
