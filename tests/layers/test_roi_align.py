"""Tests of RoIAlign as weighted sums of rows, against torchvision's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import roi_align

from vlnms_d2.layers.roi_align import roi_align_rows

SCALES = (0.25, 0.125)
SHAPES = ((20, 24), (10, 12))


def make_maps(images: int = 2, channels: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(images, channels, *shape, generator=generator) for shape in SHAPES]


def reference(maps, boxes, image, level, size) -> torch.Tensor:
    """torchvision's RoIAlign of one box at a time."""
    pooled = [
        roi_align(
            maps[lv], torch.cat([im[None].float(), box])[None], size, SCALES[lv], 0, aligned=True
        )
        for box, im, lv in zip(boxes, image, level.tolist(), strict=True)
    ]
    return torch.cat(pooled) if pooled else maps[0].new_zeros(0, maps[0].shape[1], *size)


def check(boxes, image, level, size=(7, 7)) -> None:
    maps = make_maps()
    boxes, image, level = torch.tensor(boxes), torch.tensor(image), torch.tensor(level)
    boxes, image, level = boxes.float().view(-1, 4), image.long(), level.long()
    pooled = roi_align_rows(maps, boxes, image, level, SCALES, size)
    expected = reference(maps, boxes, image, level, size)
    assert pooled.shape == expected.shape and pooled.is_contiguous()
    torch.testing.assert_close(pooled, expected, atol=2e-5, rtol=1e-5)


coordinate = st.floats(0, 96, width=32) | st.integers(0, 24).map(lambda cell: 4.0 * cell)
box = st.tuples(coordinate, coordinate, coordinate, coordinate).map(
    lambda c: (min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]), max(c[1], c[3]))
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(box, st.integers(0, 1), st.integers(0, 1)), max_size=6))
def test_boxes_anywhere(drawn):
    check([b for b, _, _ in drawn], [i for _, i, _ in drawn], [lv for _, _, lv in drawn])


@pytest.mark.parametrize(
    "corners",
    [
        (0, 0, 96, 80),  # the whole image
        (-40, -30, 10, 200),  # beyond it on three sides
        (200, 200, 300, 300),  # outside: zeros
        (10, 20, 10, 60),  # no width
        (33, 33, 33, 33),  # no size
        (-2, -2, 1e-3, 50),  # at the edge of what counts as inside
        (0, 0, 96, 1),  # long and thin
    ],
)
@pytest.mark.parametrize("size", [(7, 7), (2, 3), (14, 1)])
def test_extremes(corners, size):
    check([corners, corners], [0, 1], [0, 1], size)


def test_several_boxes_without_a_size():
    check([(5, 5, 5, 5), (0, 0, 0, 0)], [0, 0], [1, 1])


def test_no_boxes():
    check([], [], [])
