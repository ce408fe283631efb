"""How close results must be when the same numbers are computed in another order.

One image or a batch, padded or unpadded words, one chunk or several: the formulas are the same, but
matrix products of other shapes are summed in another order. The order also depends on the
processor's instruction set and on the number of threads. Each float32 operation rounds by up to
`EPS` of the magnitude of its values, the errors of layers accumulate, and differences of nearly
equal numbers (variances, IoUs, box deltas) amplify them. Results are therefore compared within a
multiple of `EPS` of their magnitude, and proposals of nearly equal scores may change places.

Where the same operations run on the same shapes, results are equal to the bit, and tests use
`torch.equal`.
"""

from __future__ import annotations

import torch
from detectron2.structures import Instances, ROIMasks

EPS = torch.finfo(torch.float32).eps  # 1.2e-7
FEW_LAYERS = 1000 * EPS  # 1.2e-4: one module of a few layers
WHOLE_MODEL = 5000 * EPS  # 6e-4: from the image to the output; 0.08 pixels in 128


def assert_rounds_alike(
    found: torch.Tensor,
    expected: torch.Tensor,
    tolerance: float = FEW_LAYERS,
    magnitude: float | None = None,
) -> None:
    """Assert that two tensors differ by no more than rounding in float32 explains.

    Args:
        found, expected: tensors of the same shape and dtype.
        tolerance: largest difference, as a share of the magnitude.
        magnitude: that of the values that were added up; None takes the largest of `expected`.
    """
    if magnitude is None:
        magnitude = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, atol=tolerance * magnitude, rtol=0)


def assert_instances_alike(
    found: Instances, expected: Instances, tolerance: float = WHOLE_MODEL
) -> None:
    """Assert that two results of a model are the same up to rounding in float32.

    Proposals whose scores differ by no more than rounding may change places. Of the pixels of the
    masks, which are cut at a threshold, one in a thousand may differ.
    """
    assert found.image_size == expected.image_size and len(found) == len(expected)
    names = expected.get_fields().keys()
    assert found.get_fields().keys() == names
    if "scores" in names:
        assert_rounds_alike(found.scores, expected.scores, tolerance)
    place = _same_proposals(found, expected)
    for name in names:
        a, b = (_tensor(each.get(name)) for each in (found, expected))
        if a.dtype == b.dtype == torch.bool:
            assert a.shape == b.shape
            assert not len(a) or (a[place] ^ b).float().mean() < 1e-3, name
        elif b.dtype.is_floating_point:
            assert_rounds_alike(a[place], b, tolerance)
        else:
            assert torch.equal(a[place], b), name


def _same_proposals(found: Instances, expected: Instances) -> torch.Tensor:
    """For each proposal of `expected` the index of the one of `found` with its class and query
    that is nearest to it."""
    distance = torch.cdist(*(each.pred_boxes.tensor for each in (expected, found)), p=torch.inf)
    for name in ("pred_classes", "query_index"):
        if expected.has(name):
            distance[expected.get(name)[:, None] != found.get(name)] = torch.inf
    place = distance.argmin(dim=1) if len(found) else torch.zeros(0, dtype=torch.int64)
    assert len(place.unique()) == len(place), "not the same proposals"
    return place


def _tensor(value: object) -> torch.Tensor:
    """The field as a tensor with a row per proposal."""
    if isinstance(value, ROIMasks) and hasattr(value, "index"):
        return value.tensor[value.index]  # of distinct boxes
    return getattr(value, "tensor", value)
