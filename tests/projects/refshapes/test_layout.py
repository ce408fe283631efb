from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from refshapes.layout import (
    CROWD_SHARE,
    MIN_PIXELS,
    MIN_VISIBLE,
    sample_layout,
    visible_masks,
)
from refshapes.scene import COLORS, MIN_HEIGHT, MIN_WIDTH, PATTERNS, SIZES
from vlnms_d2.data.datasets.refshapes import CATEGORIES, SPLITS

WIDTH, HEIGHT = 384, 288


def layouts(split: str, count: int, width: int = WIDTH, height: int = HEIGHT):
    return [
        sample_layout(np.random.default_rng([1, SPLITS.index(split), i]), split, width, height)
        for i in range(count)
    ]


def words(layout):
    return [(s.category, s.color, s.pattern, s.size) for s in layout if s.category is not None]


def main_share(layout) -> float:
    counts = Counter(category for category, *_ in words(layout))
    return max(counts.values()) / counts.total()


@pytest.mark.parametrize("split", SPLITS)
def test_every_object_stays_visible(split):
    for layout in layouts(split, 6):
        for shape, mask in visible_masks(layout, WIDTH, HEIGHT):
            assert mask.sum() >= MIN_PIXELS
            assert mask.sum() >= MIN_VISIBLE * shape.stamp.mask.sum()


def test_some_objects_are_covered_in_part():
    shares = [
        mask.sum() / shape.stamp.mask.sum()
        for layout in layouts("val", 10)
        for shape, mask in visible_masks(layout, WIDTH, HEIGHT)
    ]
    assert 0.05 < np.mean(np.array(shares) < 0.8) < 0.4


def test_visible_masks_are_disjoint_and_later_shapes_win():
    (layout,) = layouts("val", 1)
    pairs = visible_masks(layout, WIDTH, HEIGHT)
    assert sum(mask.astype(int) for _, mask in pairs).max() == 1
    for k, (shape, mask) in enumerate(pairs):
        full = np.zeros_like(mask)
        full[shape.window] = shape.stamp.mask
        assert not (mask & ~full).any()
        for _, later in pairs[k + 1 :]:
            assert not (later & mask).any()
    last, mask = pairs[-1]
    assert mask.sum() == last.stamp.mask.sum()


def test_counts_and_words():
    seen = layouts("train", 40)
    totals = [len(words(layout)) for layout in seen]
    assert min(totals) >= 8 and max(totals) <= 20 and len(set(totals)) > 8
    for layout in seen:
        assert 3 <= sum(s.category is None for s in layout) <= 8
        assert len(set(words(layout))) == len(words(layout)), "two objects of the same words"
    used = [set(column) for column in zip(*(w for x in seen for w in words(x)), strict=True)]
    assert used == [set(CATEGORIES), set(COLORS), set(PATTERNS), set(SIZES)]


def test_shapes_lie_inside_the_image():
    for layout in layouts("train", 5, MIN_WIDTH, MIN_HEIGHT):
        for shape in layout:
            rows, cols = shape.window
            assert rows.start >= 0 and rows.stop <= MIN_HEIGHT
            assert cols.start >= 0 and cols.stop <= MIN_WIDTH


def test_size_words_do_not_overlap_much():
    sides = {size: [] for size in SIZES}
    for layout in layouts("train", 20):
        for shape in layout:
            if shape.category is not None:
                sides[shape.size].append(shape.long_side)
    assert max(sides["small"]) < min(sides["medium"]) + 2
    assert max(sides["medium"]) < min(sides["large"])


def test_testA_is_crowds_only_and_val_and_testB_are_mixed():
    assert all(main_share(layout) >= CROWD_SHARE for layout in layouts("testA", 12))
    for split in ("val", "testB"):
        assert all(main_share(layout) < CROWD_SHARE for layout in layouts(split, 12))


def test_train_has_some_crowds():
    share = np.mean([main_share(layout) >= CROWD_SHARE for layout in layouts("train", 60)])
    assert 0.05 < share < 0.4


def test_categories_repeat_in_mixed_scenes():
    repeats = [
        count
        for layout in layouts("val", 12)
        for count in Counter(category for category, *_ in words(layout)).values()
    ]
    assert np.mean(np.array(repeats) >= 2) > 0.6


def test_unknown_split():
    with pytest.raises(ValueError, match="unknown split 'test'"):
        sample_layout(np.random.default_rng(0), "test", WIDTH, HEIGHT)


@pytest.mark.parametrize("size", [(MIN_WIDTH - 1, HEIGHT), (WIDTH, MIN_HEIGHT - 1)])
def test_too_small_an_image(size):
    with pytest.raises(ValueError, match="too small"):
        sample_layout(np.random.default_rng(0), "val", *size)
