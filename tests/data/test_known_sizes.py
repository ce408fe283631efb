"""The known sizes agree with each other, and a data set that differs is told."""

import pytest

from vlnms_d2.data.builtin import (
    CAPTION_SETS,
    KNOWN_SIZES,
    PUBLISHED_SIZES,
    REFER_SETS,
    check_counts,
)


def total(*names: str) -> tuple[int, int]:
    sizes = [KNOWN_SIZES[name] for name in names]
    return sum(size.images for size in sizes), sum(size.expressions for size in sizes)


@pytest.mark.parametrize("name", ["refcoco", "refcoco+"])
def test_the_splits_of_refcoco_make_the_whole(name):
    splits = [f"{name}_unc_{split}" for split in ("train", "val", "testA", "testB")]
    assert total(*splits) == PUBLISHED_SIZES[name]


def test_both_ways_to_split_refcocog_hold_the_same_expressions():
    umd = total(*(f"refcocog_umd_{split}" for split in ("train", "val", "test")))
    google = total(*(f"refcocog_google_{split}" for split in ("train", "val")))
    assert umd[1] == google[1] == 95_010


def test_flickr30k():
    splits = ("train", "val", "test")
    entities = total(*(f"flickr30k_entities_captions_{split}" for split in splits))
    assert entities == PUBLISHED_SIZES["flickr30k"] == (31_783, 5 * 31_783)
    images, captions = total(*(f"flickr30k_captions_{split}" for split in splits))
    assert captions == 5 * images


def test_coco():
    splits = ("train", "restval", "val", "test")
    images, captions = total(*(f"coco_captions_{split}" for split in splits))
    assert (images, captions) == (123_287, 616_767)


def test_every_name_is_registered():
    names = {f"{one.name}_{split}" for one in (*REFER_SETS, *CAPTION_SETS) for split in one.splits}
    names |= {f"flickr30k_entities_captions_{split}" for split in ("train", "val", "test")}
    assert set(KNOWN_SIZES) == names


def test_a_sentence_says_what_differs():
    assert check_counts("refcoco_unc_val", 1_500, 10_834) is None
    assert check_counts("refcoco", 19_994, 142_210) is None
    assert check_counts("my_own_val", 3, 4) is None
    assert check_counts("refcoco_google_val", 4_559, 1) is None  # the number is not known
    assert check_counts("refcoco_unc_val", 1_500, 10_000) == (
        "Data set refcoco_unc_val has 10,000 expressions where the published one has 10,834; if it "
        "should be the published one, fetch its files again."
    )
    told = check_counts("coco_captions_test", 4_999, 25_009)
    assert "4,999 images where" in told and "and 25,009 expressions where" in told
