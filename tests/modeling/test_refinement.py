"""Applying a box refinement, box after box."""

import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes

from vlnms_d2.modeling.branch import refine_boxes

BOX2BOX = Box2BoxTransform((10.0, 10.0, 5.0, 5.0))
SIZE = (60, 80)


def refine(boxes: list, deltas: torch.Tensor) -> torch.Tensor:
    return refine_boxes(torch.tensor(boxes), deltas, SIZE, BOX2BOX)


def test_each_query_and_box_by_itself():
    boxes = [[10.0, 10, 40, 30], [0, 0, 80, 60], [50, 20, 79, 59]]
    deltas = torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(0))
    found = refine(boxes, deltas)
    assert found.shape == (4, 3, 4)
    for q in range(4):
        for n in range(3):
            own = Boxes(BOX2BOX.apply_deltas(deltas[q, n][None], torch.tensor(boxes[n])[None]))
            own.clip(SIZE)
            torch.testing.assert_close(found[q, n], own.tensor[0])


def test_zeros_leave_the_box_to_the_bit_and_so_does_a_move_out_of_the_image():
    boxes = [[10.1, 10.3, 40.7, 30.9], [0.3, 0, 7.7, 9.1]]
    deltas = torch.zeros(2, 2, 4)
    deltas[1, :, 0] = 1e4
    assert torch.equal(refine(boxes, deltas), torch.tensor(boxes).expand(2, 2, 4))


def test_nothing():
    assert refine([[1.0, 2, 3, 4]], torch.zeros(0, 1, 4)).shape == (0, 1, 4)
    found = refine_boxes(torch.zeros(0, 4), torch.zeros(3, 0, 4), SIZE, BOX2BOX)
    assert found.shape == (3, 0, 4)
