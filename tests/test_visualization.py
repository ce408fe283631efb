"""Tests of the pictures and of what is said about proposals."""

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st

from vlnms_d2.visualization import (
    BLUE,
    ORANGE,
    PANEL_MAX_HEIGHT,
    PANEL_WIDTH,
    draw_comparison,
    hits,
    place_label,
    proposal_records,
    short_number,
    word_weights,
)

CLASSES = ("cup", "chair", "dog")
GROUND = np.array((90, 160, 120), np.uint8)  # BGR


def proposals(boxes, *, query: bool, size=(60, 80), **fields) -> Instances:
    n = len(boxes)
    instances = Instances(size)
    instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).view(-1, 4))
    instances.scores = torch.linspace(0.9, 0.2, n)
    instances.pred_classes = torch.arange(n) % 4
    if query:
        instances.cls_scores = torch.linspace(0.95, 0.4, n)
        instances.relatedness = torch.linspace(0.99, 0.5, n)
    for name, value in fields.items():
        instances.set(name, value)
    return instances


def plain_image(height=60, width=80) -> np.ndarray:
    return np.full((height, width, 3), GROUND, np.uint8)


def draw(detector_boxes, aware_boxes, *, image=None, query="red cup", attention=None, **kwargs):
    image = plain_image() if image is None else image
    size = image.shape[:2]
    detector = proposals(detector_boxes, query=False, size=size)
    aware = proposals(aware_boxes, query=True, size=size)
    asked = (query, query.split(), attention)
    return draw_comparison(image, *asked, detector, aware, CLASSES, **kwargs)


def halves(picture):
    middle = picture.shape[1] // 2
    return picture[:, :middle], picture[:, middle:]


def panels(picture) -> list[np.ndarray]:
    """The two images in a picture of `plain_image`, found by their colour."""
    found = []
    for half in halves(picture):
        rows, columns = np.nonzero((half == GROUND).all(axis=2))
        found.append(half[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1])
    return found


def count(image, color) -> int:
    """Pixels of an RGB colour."""
    return int((image == np.array(color[::-1], np.uint8)).all(axis=2).sum())


def is_line(panel, x, y, color) -> bool:
    """Whether the line of a box in this RGB colour passes near (x, y), of a 60 x 80 image."""
    scale = PANEL_WIDTH / 80
    row, column = round(y * scale), round(x * scale)
    return count(panel[max(row - 3, 0) : row + 4, max(column - 3, 0) : column + 4], color) > 0


# --- the picture -------------------------------------------------------------------------------

LEFT_BOX, RIGHT_BOX, LOW_BOX = (5, 20, 25, 40), (50, 20, 70, 40), (30, 44, 40, 56)


def test_boxes_are_coloured_by_what_the_other_side_has():
    left, right = panels(draw([LEFT_BOX, RIGHT_BOX], [LEFT_BOX, LOW_BOX]))
    assert left.shape == right.shape == (480, 640, 3)
    for panel in (left, right):
        assert is_line(panel, 5, 30, BLUE) and is_line(panel, 25, 30, BLUE)
        assert is_line(panel, 15, 40, BLUE)
    assert is_line(right, 30, 50, ORANGE) and is_line(right, 40, 50, ORANGE)
    assert not is_line(right, 50, 30, BLUE) and not is_line(right, 50, 30, ORANGE)
    assert count(left, ORANGE) == 0
    assert (left[240, 399:402] != GROUND).any() and not is_line(left, 50, 30, BLUE)


def test_only_as_many_of_the_detector_as_the_query_keeps():
    more = draw([LEFT_BOX, RIGHT_BOX, LOW_BOX], [LEFT_BOX])
    assert np.array_equal(more, draw([LEFT_BOX], [LEFT_BOX]))


def test_a_gained_box_is_one_beyond_the_detectors_first_k():
    _, right = panels(draw([LEFT_BOX, RIGHT_BOX], [RIGHT_BOX]))
    assert is_line(right, 50, 30, ORANGE) and count(right, BLUE) == 0


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (1200, 1600), (7, 5)])
def test_any_image_fits_panels_of_one_width(size):
    height, width = size
    box = (0, 0, width, height)
    picture = draw([box], [box], image=plain_image(height, width), referent=box)
    assert picture.dtype == np.uint8 and picture.flags["C_CONTIGUOUS"]
    assert picture.shape[1] >= 2 * 640
    assert picture.shape[0] <= PANEL_MAX_HEIGHT + 250
    assert count(halves(picture)[1], BLUE) > 0


def test_no_proposals_at_all():
    left, right = panels(draw([], [], referent=LEFT_BOX))
    assert count(left, BLUE) == count(right, ORANGE) == 0
    assert draw([LEFT_BOX], []).shape == draw([], []).shape


def test_no_proposals_of_the_detector():
    left, right = panels(draw([], [LEFT_BOX]))
    assert is_line(right, 5, 30, ORANGE)
    assert count(left, BLUE) == count(left, ORANGE) == count(right, BLUE) == 0


def test_crowds_are_drawn_and_labels_are_limited():
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 40, (100, 2))
    boxes = np.hstack([corners, corners + rng.uniform(5, 20, (100, 2))]).tolist()
    assert draw(boxes, boxes).shape == draw(boxes[:1], boxes[:1]).shape


def test_the_referent_is_outlined_and_judged_on_both_sides():
    without = draw([LEFT_BOX], [RIGHT_BOX])
    judged = draw([LEFT_BOX], [RIGHT_BOX], referent=RIGHT_BOX)
    swapped = draw([RIGHT_BOX], [LEFT_BOX], referent=RIGHT_BOX)
    for one, other in zip(panels(without), panels(judged), strict=True):
        assert (other == 0).all(axis=2).sum() > (one == 0).all(axis=2).sum() + 100
    green = (0, 130, 90)
    assert [count(half, green) > 0 for half in halves(judged)] == [False, True]
    assert [count(half, green) > 0 for half in halves(swapped)] == [True, False]


def test_masks_are_drawn_on_request():
    mask = torch.zeros(1, 60, 80, dtype=torch.bool)
    mask[:, 25:35, 10:20] = True
    detector = proposals([LEFT_BOX], query=False, pred_masks=mask)
    aware = proposals([LEFT_BOX], query=True, pred_masks=mask)
    arguments = (plain_image(), "cup", ["cup"], None, detector, aware, CLASSES)
    inside = [panel[240, 120] for panel in panels(draw_comparison(*arguments, masks=True))]
    assert all((pixel != GROUND).any() for pixel in inside)
    without = draw_comparison(*arguments)
    assert all((panel[240, 120] == GROUND).all() for panel in panels(without))
    aware.remove("pred_masks")
    detector.remove("pred_masks")
    assert np.array_equal(draw_comparison(*arguments, masks=True), without)


def test_inputs_are_left_alone():
    image, detector = plain_image(), proposals([LEFT_BOX, RIGHT_BOX], query=False)
    draw_comparison(image, "a", ["a"], None, detector, proposals([LOW_BOX], query=True), CLASSES)
    assert np.array_equal(image, plain_image()) and len(detector) == 2


# --- the query ---------------------------------------------------------------------------------


def header(**kwargs) -> np.ndarray:
    picture = draw([LEFT_BOX], [LEFT_BOX], **kwargs)
    height = picture.shape[0] - draw([LEFT_BOX], [LEFT_BOX], query="").shape[0]
    return picture[: height + 36]


def test_the_word_with_more_attention_is_darker():
    left = header(query="aa aa", attention=np.array([0.9, 0.1]))
    right = header(query="aa aa", attention=np.array([[0.1, 0.9]]))
    assert count(left, BLUE) > 500
    blue_at = [np.nonzero((h == np.array(BLUE[::-1])).all(axis=2))[1].mean() for h in (left, right)]
    assert blue_at[0] < blue_at[1]


def test_letters_beyond_ascii_are_drawn_as_they_are():
    heads = [header(query=query) for query in ("чашка", "?????", "tasse", "τάσσε")]
    assert len({head.tobytes() for head in heads}) == 4
    assert not np.array_equal(header(query="é"), header(query="e"))


def test_long_queries_wrap():
    short, long = header(query="red cup"), header(query=" ".join(["umbrella"] * 40))
    assert long.shape[1] == short.shape[1] and long.shape[0] > short.shape[0] + 56
    endless = header(query="x" * 5000)
    assert endless.shape == short.shape


def test_what_was_typed_is_shown_where_the_model_reads_something_else():
    arguments = (["red"], None, proposals([], query=False), proposals([], query=True))
    cut_off = draw_comparison(plain_image(), "red cup", *arguments)
    whole = draw_comparison(plain_image(), "Red.", *arguments)
    assert cut_off.shape[0] == whole.shape[0] + 20


def test_word_weights():
    linear, is_mean = word_weights(np.array([[0.2, 0.8, 0.0]] * 3), 2)
    assert linear.tolist() == pytest.approx([0.2, 0.8]) and not is_mean
    additive, is_mean = word_weights(np.array([[0.2, 0.8], [0.6, 0.4]]), 2)
    assert additive.tolist() == pytest.approx([0.4, 0.6]) and is_mean
    assert word_weights(np.array([0.3, 0.7]), 2)[0].tolist() == pytest.approx([0.3, 0.7])
    for nothing in (None, np.zeros((0, 2))):
        assert word_weights(nothing, 2) == (None, False)
    assert word_weights(np.zeros((3, 4)), 0) == (None, False)


# --- labels ------------------------------------------------------------------------------------

rectangles = st.tuples(*(st.integers(0, most) for most in (600, 470, 300, 300))).map(
    lambda r: (r[0], r[1], min(r[0] + r[2], 639), min(r[1] + r[3], 479))
)


@settings(max_examples=200, deadline=None)
@given(rectangles, st.lists(rectangles, max_size=6), st.lists(rectangles, max_size=6))
def test_labels_stay_inside_and_apart(box, placed, others):
    spot = place_label(box, (150, 18), (640, 480), placed, others)
    if spot is None:
        assert placed
        return
    x1, y1, x2, y2 = spot
    assert min(x1, y1) >= 0 and x2 < 640 and y2 < 480
    assert (x2 - x1, y2 - y1) == (150, 18)
    for a, b, c, d in placed:
        assert x2 <= a or c <= x1 or y2 <= b or d <= y1 or a == c or b == d


def test_a_label_avoids_other_boxes_where_it_can():
    box, above = (100, 100, 300, 200), (100, 70, 300, 99)
    assert place_label(box, (150, 18), (640, 480), [], [])[3] == 100
    moved = place_label(box, (150, 18), (640, 480), [], [above])
    assert moved[1] >= 100


def test_short_numbers():
    assert [short_number(v) for v in (0.834, 1.0, 0.0, 0.996)] == [".83", "1.0", ".00", "1.0"]


# --- records ---------------------------------------------------------------------------------


def test_a_hit_needs_an_iou_above_one_half():
    assert not hits(proposals([(0, 0, 10, 10)], query=False), (0, 0, 10, 20))
    assert hits(proposals([(0, 0, 10, 10)], query=False), (0, 0, 10, 19))
    assert not hits(proposals([], query=False), (0, 0, 10, 10))


def test_the_class_is_a_number_where_it_has_no_name():
    records = proposal_records(proposals([LEFT_BOX] * 4, query=True), CLASSES)
    assert [record["class"] for record in records] == ["cup", "chair", "dog", "3"]
