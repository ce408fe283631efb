from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from refshapes.backgrounds import BACKGROUNDS
from refshapes.icons import ICONS, random_distractor
from refshapes.layout import MIN_CONTRAST, PlacedShape, sample_layout, visible_masks
from refshapes.painter import make_scene, mask_box, mask_polygons, paint, role_colors, second_tone
from refshapes.raster import Role, rasterise
from refshapes.scene import COLORS, PATTERNS
from vlnms_d2.data.datasets.refshapes import CATEGORIES

WIDTH, HEIGHT = 384, 288


def decode(polygons, height: int, width: int) -> np.ndarray:
    runs = coco_mask.frPyObjects([list(p) for p in polygons], height, width)
    return coco_mask.decode(coco_mask.merge(runs)).astype(bool)


def share_in_common(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()


def place(category: str, color: str = "red", pattern: str = "plain", contrast: float = 1.0):
    stamp = rasterise(ICONS[category], 60)
    return PlacedShape(
        category, color, pattern, "large", stamp, 60, 20, 20, contrast, blur=0, shadow=0
    )


def test_boxes_areas_and_polygons_equal_the_visible_masks():
    for index in range(3):
        rng = np.random.default_rng([2, index])
        layout = sample_layout(rng, "train", WIDTH, HEIGHT)
        _, objects = paint(layout, rng, WIDTH, HEIGHT)
        pairs = visible_masks(layout, WIDTH, HEIGHT)
        assert [o.id for o in objects] == list(range(1, len(pairs) + 1))
        for o, (shape, mask) in zip(objects, pairs, strict=True):
            y, x = np.nonzero(mask)
            assert o.box == (x.min(), y.min(), x.max() + 1, y.max() + 1)
            assert o.area == mask.sum()
            assert o.visible == pytest.approx(mask.sum() / shape.stamp.mask.sum(), abs=1e-4)
            assert (o.category, o.color, o.pattern, o.size) == (
                shape.category,
                shape.color,
                shape.pattern,
                shape.size,
            )
            assert all(len(p) >= 6 and len(p) % 2 == 0 for p in o.segmentation)
            assert share_in_common(decode(o.segmentation, HEIGHT, WIDTH), mask) > 0.93


def test_same_arguments_give_the_same_image_and_others_another():
    one, scene = make_scene(5, "val", 3, 9, WIDTH, HEIGHT)
    two, same = make_scene(5, "val", 3, 9, WIDTH, HEIGHT)
    assert np.array_equal(one, two) and scene == same
    assert one.shape == (HEIGHT, WIDTH, 3) and one.dtype == np.uint8
    assert (scene.image_id, scene.split, scene.width, scene.height) == (9, "val", WIDTH, HEIGHT)
    for other in ((6, "val", 3), (5, "testB", 3), (5, "val", 4)):
        assert make_scene(*other, 9, WIDTH, HEIGHT)[1].objects != scene.objects


def test_the_image_id_does_not_change_the_picture():
    one, _ = make_scene(5, "val", 3, 9, WIDTH, HEIGHT)
    two, _ = make_scene(5, "val", 3, 10, WIDTH, HEIGHT)
    assert np.array_equal(one, two)


def test_unknown_split():
    with pytest.raises(ValueError, match="unknown split 'minival'"):
        make_scene(0, "minival", 0, 1, WIDTH, HEIGHT)


def test_every_category_has_an_icon_of_long_side_one():
    assert tuple(ICONS) == CATEGORIES
    for category, parts in ICONS.items():
        rows, cols = mask_extent(rasterise(parts, 100).mask)
        assert max(rows, cols) == pytest.approx(100, abs=2), category


def mask_extent(mask: np.ndarray) -> tuple[int, int]:
    x1, y1, x2, y2 = mask_box(mask)
    return int(y2 - y1), int(x2 - x1)


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_shows_on_every_icon_and_leaves_the_colour_in_view(category, pattern):
    for long_side in (26, 70):
        stamp = rasterise(ICONS[category], long_side, angle=15)
        body = stamp.labels == Role.BODY
        marked = second_tone(pattern, stamp, long_side, np.random.default_rng(3)) & body
        share = marked.sum() / body.sum()
        assert body.sum() > 0.3 * (stamp.labels > 0).sum()
        assert share == 0 if pattern == "plain" else 0.15 < share < 0.7


def test_unknown_pattern():
    with pytest.raises(ValueError, match="unknown pattern 'furry'"):
        second_tone("furry", rasterise(ICONS["cup"], 30), 30, np.random.default_rng(0))


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("grey", [90, 130, 160])
def test_a_colour_stays_nearest_to_its_word_at_the_least_contrast(color, grey):
    def lab(bgr: np.ndarray) -> np.ndarray:
        return cv2.cvtColor(np.float32(bgr).reshape(1, 1, 3) / 255, cv2.COLOR_BGR2LAB).ravel()

    def bodies(name: str) -> np.ndarray:
        rng = np.random.default_rng(1)
        return np.mean([role_colors(name, rng)[0][Role.BODY] for _ in range(50)], axis=0)

    alpha = MIN_CONTRAST[color]
    seen = lab(alpha * bodies(color) + (1 - alpha) * grey)
    distances = {name: np.linalg.norm(lab(bodies(name)) - seen) for name in COLORS}
    assert min(distances, key=distances.get) == color


@pytest.mark.parametrize("category", CATEGORIES)
def test_painting_changes_the_object_and_nothing_far_from_it(category):
    def image(layout):
        # The same draws for background and camera: only the shape's own draws come in between,
        # so compare the means over regions.
        return paint(layout, np.random.default_rng(8), 160, 120)[0].astype(float)

    red, green = image([place(category, "red")]), image([place(category, "green")])
    stamp = place(category).stamp
    inside = np.zeros((120, 160), bool)
    inside[20 : 20 + stamp.mask.shape[0], 20 : 20 + stamp.mask.shape[1]] = stamp.mask
    apart = np.abs(red - green).mean(2)
    assert apart[inside].mean() > 20
    assert apart[:, 110:].mean() < 3


def test_low_contrast_lies_nearer_the_background():
    plain = paint([], np.random.default_rng(8), 160, 120)[0].astype(float)
    strong, weak = (
        paint([place("ball", contrast=c)], np.random.default_rng(8), 160, 120)[0].astype(float)
        for c in (1.0, 0.5)
    )
    at = (slice(30, 70), slice(30, 70))
    assert np.abs(weak - plain)[at].mean() < 0.75 * np.abs(strong - plain)[at].mean()


def test_blur_and_shadow_at_the_border_stay_in_the_image():
    shape = replace(place("house"), left=0, top=0, blur=2.0, shadow=0.5)
    rows, cols = shape.stamp.mask.shape
    image, (o,) = paint([shape], np.random.default_rng(0), cols, rows)
    assert image.shape == (rows, cols, 3) and o.visible == 1


def test_a_key_keeps_the_hole_in_its_mask_and_polygons():
    stamp = rasterise(ICONS["key"], 80)
    polygons = mask_polygons(stamp.mask)
    assert len(polygons) >= 2
    assert share_in_common(decode(polygons, *stamp.mask.shape), stamp.mask) > 0.95


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(3, 30), st.integers(3, 30), st.floats(0.8, 4))
def test_polygons_cover_any_smooth_mask(seed, height, width, smooth):
    field = np.random.default_rng(seed).standard_normal((height, width)).astype(np.float32)
    mask = cv2.GaussianBlur(field, (0, 0), smooth) > 0
    if not mask.any():
        return
    decoded = np.zeros_like(mask)
    for polygon in mask_polygons(mask):
        points = np.array(polygon).reshape(-1, 2)
        assert (points >= 0).all() and (points <= (width, height)).all()
        decoded |= decode([polygon], height, width)
    # Simplified outlines move a border by less than a pixel: nothing beyond the mask's rim is
    # added, and within it pixels go missing only where a cut through a hole was simplified too.
    core = cv2.erode(np.pad(mask, 2).astype(np.uint8), np.ones((3, 3)))[2:-2, 2:-2] > 0
    reach = cv2.dilate(mask.astype(np.uint8), np.ones((3, 3))) > 0
    assert (core & ~decoded).sum() <= 0.02 * mask.sum()
    assert not (decoded & ~reach).any()


def test_empty_mask():
    with pytest.raises(ValueError, match="empty"):
        mask_box(np.zeros((4, 4), bool))


def test_distractors_can_be_drawn():
    rng = np.random.default_rng(0)
    for _ in range(100):
        assert rasterise(random_distractor(rng), 40, angle=30).mask.any()


@pytest.mark.parametrize("kind", BACKGROUNDS)
def test_backgrounds_are_medium_and_textured(kind):
    for seed in range(3):
        image = BACKGROUNDS[kind](np.random.default_rng(seed), 120, 160)
        assert image.shape == (120, 160, 3)
        # 'white' and 'black' objects stand out only from medium surfaces.
        assert 60 < image.mean() < 200
        assert image.std(axis=(0, 1)).mean() > 2
