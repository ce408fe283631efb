"""Places of boxes, against a plain loop."""

from __future__ import annotations

import pytest
import torch
from box_makers import SIZE, make_regions

from second_stages.rec_matcher import NUM_NEIGHBOURS, BoxBatch, lay_out


def laid_out(*images):
    batch = BoxBatch.of(list(images))
    return batch, lay_out(batch.boxes, batch.classes, batch.mask, batch.sizes)


def plain_offset(box, other):
    x1, y1, x2, y2 = box
    w, h = x2 - x1, y2 - y1
    ox1, oy1, ox2, oy2 = other
    area = (ox2 - ox1) * (oy2 - oy1) / (w * h)
    return [(ox1 - x1) / w, (oy1 - y1) / h, (ox2 - x2) / w, (oy2 - y2) / h, area]


def plain_neighbours(regions, i, same):
    """The nearest boxes of the same class, or of another, by the distance of the centres."""
    centres = (regions.boxes[:, :2] + regions.boxes[:, 2:]) / 2
    found = [
        j
        for j in range(len(regions))
        if j != i and bool(regions.classes[j] == regions.classes[i]) == same
    ]
    return sorted(found, key=lambda j: float((centres[j] - centres[i]).norm()))[:NUM_NEIGHBOURS]


@pytest.mark.parametrize("counts", [(9, 3), (1, 12), (2, 2)])
def test_against_a_plain_loop(counts):
    images = [make_regions(n, seed=n, image_id=k) for k, n in enumerate(counts, 1)]
    _, around = laid_out(*images)
    for b, regions in enumerate(images):
        for i, box in enumerate(regions.boxes.tolist()):
            height, width = SIZE
            x1, y1, x2, y2 = box
            share = (x2 - x1) * (y2 - y1) / (width * height)
            place = [x1 / width, y1 / height, x2 / width, y2 / height, share]
            torch.testing.assert_close(around.place[b, i], torch.tensor(place))
            same = plain_neighbours(regions, i, same=True)
            expected = torch.zeros(NUM_NEIGHBOURS, 5)
            for k, j in enumerate(same):
                expected[k] = torch.tensor(plain_offset(box, regions.boxes[j].tolist()))
            torch.testing.assert_close(around.same[b, i], expected, rtol=1e-4, atol=1e-4)
            others = plain_neighbours(regions, i, same=False)
            assert around.is_other[b, i].tolist() == [
                k < len(others) for k in range(NUM_NEIGHBOURS)
            ]
            assert around.others[b, i, : len(others)].tolist() == others
            for k, j in enumerate(others):
                offset = torch.tensor(plain_offset(box, regions.boxes[j].tolist()))
                torch.testing.assert_close(around.offsets[b, i, k], offset, rtol=1e-4, atol=1e-4)


def test_a_box_without_area_gives_finite_numbers():
    regions = make_regions(4)
    regions.boxes[1, 2:] = regions.boxes[1, :2]
    _, around = laid_out(regions)
    for numbers in (around.place, around.same, around.offsets):
        assert numbers.isfinite().all()


def test_no_box_at_all():
    _, around = laid_out(make_regions(0))
    assert around.place.shape == (1, 0, 5)
    assert around.others.shape == (1, 0, NUM_NEIGHBOURS)
