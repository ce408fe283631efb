"""Labels, sampling and losses of the relatedness branch, against plain loops."""

import math
from collections.abc import Callable

import pytest
import torch
from closeness import FEW_LAYERS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlnms_d2.modeling.losses import (
    CandidateLabels,
    box_regression_loss,
    label_candidates,
    ranking_loss,
    relatedness_bce,
    sample_candidates,
    sample_levels,
)

FIELDS = ("labels", "weights", "iou", "matched_boxes", "regress")


def as_boxes(boxes: list[list[float]]) -> Tensor:
    return torch.tensor(boxes, dtype=torch.float32).view(-1, 4)


def as_flags(flags: list[bool]) -> Tensor:
    return torch.tensor(flags, dtype=torch.bool)


def iou(a: list[float], b: list[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (areas - width * height) if width * height else 0.0


# --- labels ------------------------------------------------------------------------------------

# Sides of 0 included. Few numbers, so that boxes overlap and are equal often.
whole_box = st.tuples(*[st.integers(0, 4), st.integers(0, 4), *[st.integers(0, 5)] * 2]).map(
    lambda t: [float(t[0]), float(t[1]), float(t[0] + t[2]), float(t[1] + t[3])]
)
whole_boxes = st.lists(whole_box, max_size=5)
queries = st.lists(st.lists(st.tuples(whole_box, st.booleans()), max_size=4), max_size=4)


def unknown_class(box: list[float]) -> int:
    return -1


def label(
    boxes: list, query_list: list, class_of: Callable = unknown_class, **kwargs
) -> CandidateLabels:
    """Labels where `class_of` says the class of a box, of either kind."""
    foreground = [as_boxes([box for box, _ in query]) for query in query_list]
    reliable = [as_flags([flag for _, flag in query]) for query in query_list]
    classes = torch.tensor([abs(class_of(box)) for box in boxes], dtype=torch.int64)
    foreground_classes = [
        torch.tensor([class_of(box) for box, _ in query], dtype=torch.int64) for query in query_list
    ]
    return label_candidates(
        as_boxes(boxes), foreground, reliable, classes, foreground_classes, **kwargs
    )


def by_height(box: list[float]) -> int:
    """Class 0 for low boxes, 1 for higher ones, and not known (candidates: 1) for the highest."""
    return (0, 0, 0, 1, 1, -1)[int(box[3] - box[1])]


@settings(max_examples=300, deadline=None)
@given(
    whole_boxes,
    queries,
    st.sampled_from([unknown_class, by_height]),
    st.sampled_from([0.0, 0.3, 0.5, 0.9]),
    st.sampled_from([0.25, 0.5, 1.0]),
)
def test_labels_equal_a_loop(boxes, query_list, class_of, threshold, soft):
    result = label(boxes, query_list, class_of, iou_threshold=threshold, unreliable_label=soft)
    for field in FIELDS:
        value = getattr(result, field)
        assert value.shape[:2] == (len(query_list), len(boxes)), field
        assert value.dtype == (torch.bool if field == "regress" else torch.float32), field
    assert result.matched_boxes.shape[2:] == (4,)
    for q, query in enumerate(query_list):
        for n, box in enumerate(boxes):
            best = max((iou(gt, box) for gt, _ in query), default=0.0)
            trusted = [gt for gt, flag in query if flag]
            best_trusted = max((iou(gt, box) for gt in trusted), default=0.0)
            positive, hard = best > threshold, best_trusted > threshold
            assert result.labels[q, n] == (1 if hard else soft if positive else 0)
            assert result.weights[q, n] == (soft if positive and not hard else 1)
            assert result.iou[q, n].item() == pytest.approx(best, abs=1e-6)
            own = [gt for gt in trusted if class_of(gt) in (-1, abs(class_of(box)))]
            best_own = max((iou(gt, box) for gt in own), default=0.0)
            assert result.regress[q, n] == (best_own > threshold)
            matched = result.matched_boxes[q, n].tolist()
            # Which of several of equal IoU is open.
            assert matched in (own or [[0.0] * 4])
            assert iou(matched, box) == best_own


def test_an_iou_at_the_threshold_is_negative_and_empty_boxes_are_too():
    boxes = [[0.0, 0, 10, 5], [0, 0, 10, 6], [3, 3, 3, 3]]
    result = label(boxes, [[([0.0, 0, 10, 10], True), ([3.0, 3, 3, 3], True)]])
    assert result.labels.tolist() == [[0, 1, 0]]
    assert result.iou[0, 2] == 0


def test_a_reliable_box_outweighs_a_better_unreliable_one():
    box, loose, far = [0.0, 0, 10, 10], [0.0, 0, 10, 6], [50.0, 50, 60, 60]
    result = label([box], [[(box, False)], [(box, False), (loose, True)], [(far, True)], []])
    assert result.labels.tolist() == [[0.5], [1], [0], [0]]
    assert result.weights.tolist() == [[0.5], [1], [1], [1]]
    assert result.iou[:2].tolist() == [[1], [1]]
    assert result.matched_boxes.tolist() == [[[0] * 4], [loose], [far], [[0] * 4]]
    assert result.regress.tolist() == [[False], [True], [False], [False]]


@pytest.mark.parametrize("index", [[True, False, True], [2, 0, 0, 1], []])
def test_indexing_takes_candidates(index):
    boxes = [[0.0, 0, 10, 10], [0, 0, 10, 6], [5, 5, 9, 9]]
    query_list = [[(boxes[0], True)], [(boxes[1], False), (boxes[2], True)]]
    index = torch.tensor(index, dtype=torch.bool if True in index[:1] else torch.int64)
    taken = label(boxes, query_list)[index]
    expected = label(as_boxes(boxes)[index].tolist(), query_list)
    for field in FIELDS:
        assert torch.equal(getattr(taken, field), getattr(expected, field)), field


def test_labels_carry_no_gradient():
    boxes = as_boxes([[0.0, 0, 10, 10]]).requires_grad_()
    one = torch.zeros(1, dtype=torch.int64)
    result = label_candidates(boxes, [boxes * 0.9], [as_flags([True])], one, [one])
    assert not any(getattr(result, field).requires_grad for field in FIELDS)


@pytest.mark.parametrize("reliable", [[], [[True]], [[True], [True, True]]])
def test_flags_that_do_not_fit_the_boxes_are_refused(reliable):
    foreground = [as_boxes([[0.0, 0, 1, 1]] * 2), as_boxes([[0.0, 0, 1, 1]])]
    flags = [as_flags(of_query) for of_query in reliable]
    right = [as_flags([True, True]), as_flags([True])]
    classes = torch.zeros(2, dtype=torch.int64)
    for first, second in ((flags, right), (right, flags)):
        with pytest.raises(ValueError, match=r"\[2, 1\] boxes per query"):
            label_candidates(foreground[0], foreground, first, classes, [f.long() for f in second])


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


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 60), st.sampled_from([(200, 0.25), (20, 0.5), (7, 1.0), (0, 0.5)]))
def test_each_level_draws_at_most_its_share(n, limits):
    iou = torch.rand(3, n)
    drawn, (size, fraction) = sample_levels(iou, *limits), limits
    share = math.floor(size * fraction / 5)
    levels = torch.ceil((iou - 0.5).clamp(min=0) / 0.1)
    for level in range(6):
        members = levels == level
        most = share if level else size - 5 * share
        expected = members.sum(dim=1).clamp(max=most)
        assert (drawn & members).sum(dim=1).tolist() == expected.tolist()


def test_levels_are_drawn_by_the_seed_and_differ_by_query():
    iou, draws = torch.full((2, 300), 0.3), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        draws.append(sample_levels(iou, 200, 0.25))
    assert draws[0].sum(dim=1).tolist() == [150, 150]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0][0], draws[0][1])


# --- binary cross-entropy ----------------------------------------------------------------------


def bce_target(labels: Tensor, weights: Tensor | None = None) -> CandidateLabels:
    return CandidateLabels(
        labels=labels,
        weights=torch.ones_like(labels) if weights is None else weights,
        iou=torch.zeros_like(labels),
        matched_boxes=labels.new_zeros(*labels.shape, 4),
        regress=torch.zeros_like(labels, dtype=torch.bool),
    )


def bce(logit: float, label: float) -> float:
    r = 1 / (1 + math.exp(-logit))
    return -label * math.log(r) - (1 - label) * math.log(1 - r)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 4), st.integers(0, 6), st.integers(0, 1000))
def test_bce_is_the_mean_over_queries_of_the_weighted_mean_over_their_drawn(q, n, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(q, n, generator=generator) * 4
    labels = torch.randint(3, (q, n), generator=generator) / 2
    weights = torch.rand(q, n, generator=generator)
    drawn = torch.rand(q, n, generator=generator) < 0.5
    means = []
    for i in range(q):
        losses = [
            weights[i, j].item() * bce(logits[i, j].item(), labels[i, j].item())
            for j in range(n)
            if drawn[i, j]
        ]
        if losses:
            means.append(sum(losses) / len(losses))
    expected = sum(means) / len(means) if means else 0.0
    loss = relatedness_bce(logits, bce_target(labels, weights), drawn)
    assert loss.item() == pytest.approx(expected, abs=1e-5)


def test_only_drawn_candidates_have_a_gradient():
    logits = torch.zeros(2, 3, requires_grad=True)
    drawn = torch.tensor([[True, False, False], [False, True, True]])
    weights = torch.tensor([[1.0, 1, 1], [1, 1, 0.5]])
    relatedness_bce(logits, bce_target(torch.ones(2, 3), weights), drawn).backward()
    # (sigmoid(0) - 1) * weight / drawn of the query / queries
    expected = torch.tensor([[-0.25, 0, 0], [0, -0.125, -0.0625]])
    torch.testing.assert_close(logits.grad, expected)


def test_extreme_logits_give_finite_losses_and_undrawn_infinite_ones_do_no_harm():
    logits = torch.tensor([[1e38, -200.0, 1e-38, math.inf]], requires_grad=True)
    labels = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    drawn = torch.tensor([[True, True, True, False]])
    loss = relatedness_bce(logits, bce_target(labels), drawn)
    loss.backward()
    assert loss.item() == pytest.approx((0 + 200 + math.log(2)) / 3)
    assert torch.isfinite(logits.grad).all()


# --- ranking -----------------------------------------------------------------------------------


def ranking_loop(
    logits: Tensor, percent: list[list[int]], drawn: Tensor, margin: float, top_h: int
) -> Tensor:
    """Eq. 5 pair by pair; `percent` is the IoU in hundredths, so that levels are whole numbers."""
    r = logits.double().sigmoid()
    levels = [[max(0, -((50 - rho) // 10)) for rho in row] for row in percent]
    pairs = []
    for q, row in enumerate(levels):
        members = [n for n in range(len(row)) if drawn[q, n]]
        for i in (n for n in members if percent[q][n] > 50):
            lower = [j for j in members if row[j] < row[i]]
            lower.sort(key=lambda j: -r[q, j].item())
            pairs += [(r[q, j] - r[q, i] + margin).clamp(min=0) for j in lower[:top_h]]
    # The zero keeps the graph where there is no pair.
    return sum(pairs, 0 * r.sum()) / max(len(pairs), 1)


@st.composite
def ranking_case(draw, values):
    q, n = draw(st.integers(0, 3)), draw(st.integers(0, 8))

    def rows(elements):
        return draw(st.lists(st.lists(elements, min_size=n, max_size=n), min_size=q, max_size=q))

    # Most of the borders, and few other numbers.
    percent = rows(st.sampled_from([0, 40, 50, 51, 60, 61, 65, 70, 80, 90, 91, 100]))
    logits = torch.tensor(rows(values), dtype=torch.float64).view(q, n)
    drawn = torch.tensor(rows(st.sampled_from([True, True, False]))).view(q, n).bool()
    margin, top_h = draw(st.sampled_from([0.0, 0.1, 1.5])), draw(st.sampled_from([1, 2, 4, 100]))
    return logits, percent, drawn, margin, top_h


def as_iou(percent: list[list[int]], like: Tensor) -> Tensor:
    return torch.tensor(percent, dtype=like.dtype).view_as(like) / 100


@settings(max_examples=300, deadline=None)
@given(ranking_case(st.sampled_from([-1e38, -90.0, -1.0, -1e-38, 0.0, 0.5, 1.0, 90.0, 1e38])))
def test_ranking_equals_a_loop_also_with_ties_and_extreme_logits(case):
    logits, percent, drawn, margin, top_h = case
    expected = ranking_loop(logits, percent, drawn, margin, top_h).item()
    logits = logits.float().requires_grad_()
    loss = ranking_loss(logits, as_iou(percent, logits), drawn, margin=margin, top_h=top_h)
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=FEW_LAYERS)
    assert torch.isfinite(logits.grad).all()


@settings(max_examples=200, deadline=None)
@given(ranking_case(st.just(0.0)), st.integers(0, 10_000))
def test_the_gradient_of_ranking_equals_that_of_the_loop(case, seed):
    logits, percent, drawn, margin, top_h = case
    # No ties, at which the gradient depends on the choice.
    logits = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed)).double()
    ours, loops = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    iou = as_iou(percent, logits)
    ranking_loss(ours, iou, drawn, margin=margin, top_h=top_h).backward()
    ranking_loop(loops, percent, drawn, margin, top_h).backward()
    torch.testing.assert_close(ours.grad, loops.grad, atol=1e-12, rtol=1e-9)


UP = [torch.nextafter(torch.tensor(x), torch.tensor(2.0)).item() for x in (0.5, 0.6, 0.7, 0.8, 0.9)]


@pytest.mark.parametrize(
    ("pair", "differ"),
    [
        *[((a, b), False) for a, b in [(0.0, 0.5), (0.3, 0.4), (0.95, 1.0), (1.0, 1.0000001)]],
        ((0.5, UP[0]), True),
        *[((border - 0.05, border), False) for border in (0.6, 0.7, 0.8, 0.9)],
        *[((border, up), False) for border, up in zip((0.6, 0.7, 0.8, 0.9), UP[1:], strict=True)],
        *[((border, border + 1e-5), True) for border in (0.6, 0.7, 0.8, 0.9)],
    ],
)
def test_borders_of_the_levels(pair, differ):
    drawn = torch.ones(1, 2, dtype=torch.bool)
    loss = ranking_loss(torch.zeros(1, 2), torch.tensor([pair]), drawn)
    assert loss.item() == pytest.approx(0.1 if differ else 0.0)


def test_half_precision_logits_rank_as_in_single():
    # The last two are the same r in half precision; only one of them is the negative.
    logits = torch.tensor([[9.0, 10.0, 9.5]]).half()
    iou, drawn = torch.tensor([[1.0, 0.0, 0.0]]), torch.ones(1, 3, dtype=torch.bool)
    loss = ranking_loss(logits, iou, drawn, top_h=1)
    assert loss.item() == ranking_loss(logits.float(), iou, drawn, top_h=1).item()


@pytest.mark.parametrize("shape", [(2, 3), (2, 0), (0, 3)])
@pytest.mark.parametrize("kind", ["bce", "ranking"])
def test_where_nothing_is_drawn_loss_and_gradient_are_zero(kind, shape):
    logits = torch.randn(shape).requires_grad_()
    drawn = torch.zeros(shape, dtype=torch.bool)
    if kind == "bce":
        loss = relatedness_bce(logits, bce_target(torch.ones(shape)), drawn)
    else:
        loss = ranking_loss(logits, torch.linspace(0, 1, logits.numel()).view(shape), drawn)
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros(shape))


# --- regression --------------------------------------------------------------------------------

offsets = st.lists(st.floats(-5, 5), min_size=4, max_size=4)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(offsets, offsets), max_size=5), st.sampled_from([1.0, 0.1]))
def test_box_regression_equals_a_loop(pairs, beta):
    total = 0.0
    for predicted, target in pairs:
        for p, t in zip(predicted, target, strict=True):
            d = abs(p - t)
            total += 0.5 * d * d / beta if d < beta else d - 0.5 * beta
    predicted = as_boxes([p for p, _ in pairs]).requires_grad_()
    target = as_boxes([t for _, t in pairs]).requires_grad_()
    loss = box_regression_loss(predicted, target, beta)
    loss.backward()
    assert loss.item() == pytest.approx(total / max(len(pairs), 1), rel=1e-5, abs=1e-5)
    expected = ((predicted - target).detach() / beta).clamp(-1, 1) / max(len(pairs), 1)
    torch.testing.assert_close(predicted.grad, expected)
    assert target.grad is None
