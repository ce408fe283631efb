"""Files of boxes, and which of them a second stage sees."""

from __future__ import annotations

import pytest
import torch
from box_makers import make_regions

from second_stages.store import (
    VERSION,
    load_regions,
    real_threshold,
    regions_file,
    save_regions,
    visible_boxes,
)


def of_queries():
    """Boxes that three queries keep 3, 1 and 2 of."""
    regions = make_regions(5)
    regions.kept = torch.tensor([[4, 0, 1], [2, -1, -1], [3, 1, -1]])
    regions.kept_scores = torch.tensor([[0.9, 0.5, 0.2], [0.05, 0, 0], [0.6, 0.3, 0]])
    regions.sent_ids = torch.tensor([1, 2, 3])
    return regions


def test_what_is_written_is_read(tmp_path):
    path = regions_file(tmp_path, "some_val", "vlnms_fc")
    written = [of_queries(), make_regions(0, image_id=2)]
    save_regions(path, written)
    read = load_regions(path)
    assert list(read) == [1, 2]
    for one in written:
        for name, value in vars(one).items():
            found = getattr(read[one.image_id], name)
            if isinstance(value, torch.Tensor):
                assert torch.equal(found, value)
            else:
                assert found == value


def test_files_that_cannot_be_read(tmp_path):
    path = tmp_path / "gt.pt"
    with pytest.raises(FileNotFoundError, match="extract_second_stage"):
        load_regions(path)
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"gt\.pt cannot be read"):
        load_regions(path)
    torch.save({"version": VERSION + 1, "images": []}, path)
    with pytest.raises(ValueError, match=f"version {VERSION + 1}"):
        load_regions(path)
    torch.save({"version": VERSION, "images": [{"image_id": 1}]}, path)
    with pytest.raises(ValueError, match="has the fields"):
        load_regions(path)


def test_what_a_query_sees():
    regions = of_queries()

    def seen(threshold):
        return [kept.tolist() for kept in visible_boxes(regions, 3, threshold)]

    assert seen(None) == [[4, 0, 1], [2], [3, 1]]
    assert seen(0.3) == [[4, 0], [2], [3]]  # above, not equal; always the best
    assert seen(2.0) == [[4], [2], [3]]
    with pytest.raises(ValueError, match="image 1 has 2 expressions, but proposals for 3"):
        visible_boxes(regions, 2, None)


def test_of_the_detector_every_query_sees_the_same():
    regions = make_regions(3)
    regions.scores = torch.tensor([0.9, 0.4, 0.1])
    assert [kept.tolist() for kept in visible_boxes(regions, 2, 0.2)] == [[0, 1], [0, 1]]
    assert [kept.tolist() for kept in visible_boxes(regions, 2, None)] == [[0, 1, 2]] * 2


@pytest.mark.parametrize("wanted", [1.0, 4 / 3, 5 / 3, 2.0])
def test_the_threshold_leaves_as_many_as_wanted(wanted):
    images = {1: of_queries()}
    dicts = [{"image_id": 1, "expressions": [{}] * 3}]
    threshold = real_threshold(images, dicts, wanted)
    counts = [len(kept) for kept in visible_boxes(images[1], 3, threshold)]
    assert sum(counts) / 3 == pytest.approx(wanted)


def test_too_few_stored_boxes_are_an_error():
    dicts = [{"image_id": 1, "expressions": [{}] * 3}]
    with pytest.raises(ValueError, match=r"2\.00 boxes per expression are stored, .* --floor"):
        real_threshold({1: of_queries()}, dicts, 8.0)
