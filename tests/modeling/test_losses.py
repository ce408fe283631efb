"""Labels, sampling and binary cross-entropy of the relatedness branch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlnms_d2.modeling.losses import label_candidates, relatedness_bce, sample_candidates


def iou(a: list[float], b: list[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (areas - width * height)


whole_boxes = st.lists(
    st.tuples(*(st.integers(0, 6), st.integers(0, 6), st.integers(1, 6), st.integers(1, 6))).map(
        lambda t: [float(t[0]), float(t[1]), float(t[0] + t[2]), float(t[1] + t[3])]
    ),
    max_size=5,
)


@settings(max_examples=100, deadline=None)
@given(whole_boxes, st.lists(whole_boxes, max_size=4), st.sampled_from([0.0, 0.3, 0.5, 0.9]))
def test_labels_equal_a_loop(boxes, foreground, threshold):
    tensors = [torch.tensor(gt).view(-1, 4) for gt in foreground]
    labels = label_candidates(torch.tensor(boxes).view(-1, 4), tensors, threshold)
    assert labels.dtype == torch.float32 and labels.shape == (len(foreground), len(boxes))
    assert labels.tolist() == [
        [float(any(iou(gt, box) > threshold for gt in query)) for box in boxes]
        for query in foreground
    ]


def test_an_iou_at_the_threshold_is_negative_and_empty_boxes_are_too():
    boxes = torch.tensor([[0.0, 0, 10, 5], [0, 0, 10, 6], [3, 3, 3, 3]])
    foreground = [torch.tensor([[0.0, 0, 10, 10], [3, 3, 3, 3]])]
    assert label_candidates(boxes, foreground, 0.5).tolist() == [[0, 1, 0]]


def test_a_query_without_foreground_has_no_positive():
    boxes = torch.tensor([[0.0, 0, 10, 10]])
    assert label_candidates(boxes, [torch.zeros(0, 4), boxes], 0.5).tolist() == [[0], [1]]


# --- sampling ----------------------------------------------------------------------------------

label_rows = st.integers(0, 12).flatmap(
    lambda n: st.lists(
        st.lists(st.sampled_from([0.0, 0.0, 1.0, 0.5]), min_size=n, max_size=n), max_size=4
    ).map(lambda rows: torch.tensor(rows).view(len(rows), n))
)


@settings(max_examples=200, deadline=None)
@given(label_rows, st.integers(0, 16), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_each_query_draws_at_most_its_share_of_positives_and_fills_up_with_negatives(
    labels, batch_size, fraction
):
    drawn = sample_candidates(labels, batch_size, fraction)
    assert drawn.dtype == torch.bool and drawn.shape == labels.shape
    for row, chosen in zip(labels > 0, drawn, strict=True):
        positives = min(int(row.sum()), int(batch_size * fraction))
        negatives = min(int((~row).sum()), batch_size - positives)
        assert int((chosen & row).sum()) == positives
        assert int((chosen & ~row).sum()) == negatives


@settings(max_examples=100, deadline=None)
@given(label_rows, st.integers(2, 40))
def test_at_half_positive_something_is_drawn_where_there_is_a_candidate(labels, batch_size):
    drawn = sample_candidates(labels, batch_size, 0.5)
    assert drawn.any(dim=1).tolist() == [labels.shape[1] > 0] * len(labels)


@pytest.mark.parametrize("batch_size", [-1, -5])
def test_a_negative_batch_size_draws_all(batch_size):
    labels = torch.tensor([[0.0, 1, 1], [1, 1, 1]])
    assert sample_candidates(labels, batch_size, 0.5).all()


def test_fewer_candidates_than_the_batch_size_are_all_drawn_up_to_the_share_of_positives():
    labels = torch.tensor([[1.0, 0, 0, 1, 0]])
    assert sample_candidates(labels, 32, 0.5).all()
    assert int(sample_candidates(torch.ones(1, 40), 32, 0.5).sum()) == 16


def test_the_draw_depends_on_the_seed_alone_and_differs_by_query():
    labels = (torch.arange(60) % 3 == 0).float().repeat(2, 1)
    draws = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        draws.append(sample_candidates(labels, 16, 0.5))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0][0], draws[0][1])


def test_every_candidate_is_drawn_equally_often():
    torch.manual_seed(0)
    # 8 positives of which 4 are drawn, 16 negatives of which 4 are drawn.
    labels = torch.tensor([1.0] * 8 + [0.0] * 16).repeat(4000, 1)
    share = sample_candidates(labels, 8, 0.5).float().mean(dim=0)
    torch.testing.assert_close(share[:8], torch.full((8,), 0.5), atol=0.04, rtol=0)
    torch.testing.assert_close(share[8:], torch.full((16,), 0.25), atol=0.04, rtol=0)


# --- binary cross-entropy ----------------------------------------------------------------------


def bce(logit: float, label: float) -> float:
    r = 1 / (1 + math.exp(-logit))
    return -label * math.log(r) - (1 - label) * math.log(1 - r)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 4), st.integers(0, 6), st.integers(0, 1000))
def test_bce_is_the_mean_over_queries_of_the_mean_over_their_drawn_candidates(q, n, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(q, n, generator=generator) * 4
    labels = torch.randint(3, (q, n), generator=generator) / 2
    drawn = torch.rand(q, n, generator=generator) < 0.5
    means = []
    for i in range(q):
        losses = [bce(logits[i, j].item(), labels[i, j].item()) for j in range(n) if drawn[i, j]]
        if losses:
            means.append(sum(losses) / len(losses))
    expected = sum(means) / len(means) if means else 0.0
    assert relatedness_bce(logits, labels, drawn).item() == pytest.approx(expected, abs=1e-5)


def test_only_drawn_candidates_have_a_gradient():
    logits = torch.zeros(2, 3, requires_grad=True)
    drawn = torch.tensor([[True, False, False], [False, True, True]])
    relatedness_bce(logits, torch.ones(2, 3), drawn).backward()
    # (sigmoid(0) - 1) / drawn of the query / queries
    expected = torch.tensor([[-0.25, 0, 0], [0, -0.125, -0.125]])
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("shape", [(2, 3), (2, 0), (0, 3)])
def test_where_nothing_is_drawn_loss_and_gradient_are_zero(shape):
    logits = torch.randn(shape).requires_grad_()
    loss = relatedness_bce(logits, torch.ones(shape), torch.zeros(shape, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros(shape))


def test_extreme_logits_give_finite_losses():
    logits = torch.tensor([[200.0, -200.0]], requires_grad=True)
    loss = relatedness_bce(logits, torch.tensor([[0.0, 1.0]]), torch.ones(1, 2, dtype=torch.bool))
    loss.backward()
    assert loss.item() == pytest.approx(200) and torch.isfinite(logits.grad).all()
