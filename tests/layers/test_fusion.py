"""Tests of the fusion of detector confidence and relatedness."""

import pytest
import torch

from vlnms_d2.layers import FUSION_MODES, fuse_scores


def test_product_is_r_times_c_per_query():
    confidence = torch.tensor([0.5, 1.0, 0.0])
    relatedness = torch.tensor([[0.2, 0.4, 0.6], [1.0, 0.0, 0.5]])
    fused = fuse_scores(confidence, relatedness)
    expected = torch.tensor([[0.1, 0.4, 0.0], [0.5, 0.0, 0.0]])
    torch.testing.assert_close(fused, expected)


def test_weighted_sum():
    fused = fuse_scores(
        torch.tensor([0.8, 0.0]), torch.tensor([[0.4, 1.0]]), mode="weighted_sum", weight=0.25
    )
    torch.testing.assert_close(fused, torch.tensor([[0.7, 0.25]]))


def test_weighted_product():
    confidence, relatedness = torch.tensor([0.25, 0.0, 1.0]), torch.tensor([[0.81, 1.0, 0.0]])
    fused = fuse_scores(confidence, relatedness, mode="weighted_product", weight=0.5)
    torch.testing.assert_close(fused, torch.tensor([[0.45, 0.0, 0.0]]))


@pytest.mark.parametrize("mode", ["weighted_product", "weighted_sum"])
@pytest.mark.parametrize(("weight", "row"), [(0.0, 0), (1.0, 1)])
def test_with_weight_0_or_1_it_is_one_of_the_scores(mode, weight, row):
    scores = torch.rand(2, 5)
    fused = fuse_scores(scores[0], scores[1:], mode=mode, weight=weight)
    assert torch.equal(fused[0], scores[row])


@pytest.mark.parametrize("mode", FUSION_MODES)
@pytest.mark.parametrize("shape", [(4,), (0, 4), (3, 4), (2, 0), (0,)])
def test_result_has_the_shape_of_the_relatedness(mode, shape):
    fused = fuse_scores(torch.rand(shape[-1]), torch.rand(shape), mode=mode)
    assert fused.shape == shape


@pytest.mark.parametrize("mode", FUSION_MODES)
def test_gradient_reaches_the_relatedness(mode):
    relatedness = torch.rand(2, 3, requires_grad=True)
    fuse_scores(torch.rand(3) + 0.1, relatedness, mode=mode).sum().backward()
    assert (relatedness.grad > 0).all()


def test_unknown_mode_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'max'.*product, weighted_product, weighted_sum"):
        fuse_scores(torch.rand(2), torch.rand(1, 2), mode="max")


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_weight_outside_the_unit_interval(weight):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        fuse_scores(torch.rand(2), torch.rand(1, 2), mode="weighted_sum", weight=weight)


@pytest.mark.parametrize(
    ("confidence", "relatedness", "message"),
    [((2, 2), (2, 2), "expected"), ((2,), (1, 1, 2), "expected"), ((1,), (2, 3), "is for 3 boxes")],
)
def test_shapes_that_do_not_match(confidence, relatedness, message):
    with pytest.raises(ValueError, match=message):
        fuse_scores(torch.rand(confidence), torch.rand(relatedness))
