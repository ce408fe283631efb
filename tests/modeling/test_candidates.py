"""Candidates equal a plain loop over the (proposal, class) pairs."""

import pytest
import torch
from detectron2.structures import Boxes
from hypothesis import given, settings
from hypothesis import strategies as st

from vlnms_d2.modeling.candidates import clip_boxes_to_image, select_candidates

STEP = 0.005


def reference(boxes, scores, size, delta, most, least=1):
    """Rows (proposal, class, score, clipped box) in the order of proposals, then classes."""
    agnostic = boxes.shape[1] == 4
    pairs = []
    for i in range(len(scores)):
        if not (torch.isfinite(boxes[i]).all() and torch.isfinite(scores[i]).all()):
            continue
        for k in range(scores.shape[1] - 1):
            box = boxes[i] if agnostic else boxes[i, 4 * k : 4 * k + 4]
            pairs.append((i, k, scores[i, k], box))
    if not pairs:
        return []
    steps, above = 0, []
    while len(above) < min(least, len(pairs)):
        above = [pair for pair in pairs if pair[2] > delta - steps * STEP]
        steps += 1
    best = sorted(range(len(above)), key=lambda n: (-float(above[n][2]), n))[:most]
    rows = []
    for n in sorted(best):
        i, k, score, box = above[n]
        clipped = Boxes(box[None].clone())
        clipped.clip(size)
        rows.append((i, k, float(score), clipped.tensor[0].tolist()))
    return rows


def as_rows(found):
    return [
        (int(i), int(k), float(score), box.tolist())
        for i, k, score, box in zip(
            found.proposal_index, found.classes, found.scores, found.boxes, strict=True
        )
    ]


@st.composite
def problems(draw):
    """Scores on the grid that delta is lowered along: ties, and scores right at a threshold."""
    proposals, classes = draw(st.integers(0, 6)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    highest = draw(st.sampled_from([0, 1, 4, 10, 11, 30, 200]))
    levels = torch.randint(highest + 1, (proposals, classes + 1), generator=generator)
    # The products of Python, rounded to float32 like a delta that the kernels compare with.
    scores = torch.tensor([[int(n) * STEP for n in row] for row in levels]).view(levels.shape)
    per_box = 1 if draw(st.booleans()) else classes
    boxes = torch.randn(proposals, per_box * 4, generator=generator) * 60 + 30
    for i in range(proposals):
        odd = draw(st.sampled_from(["no"] * 6 + ["box", "score"]))
        bad = draw(st.sampled_from([float("nan"), float("inf"), -float("inf")]))
        if odd == "box":
            boxes[i, -1] = bad
        elif odd == "score":
            scores[i, draw(st.integers(0, classes))] = bad
    delta = draw(st.sampled_from([0.05, 0.0, 0.3, 0.7, 1.0]))
    return boxes, scores, (50, 80), delta, draw(st.sampled_from([1, 2, 5, 1000]))


@settings(max_examples=200, deadline=None)
@given(problems())
def test_equals_a_loop_over_the_pairs(problem):
    boxes, scores, size, delta, most = problem
    before = boxes.clone(), scores.clone()
    found = select_candidates(boxes, scores, size, score_thresh=delta, max_candidates=most)
    assert as_rows(found) == reference(*problem)
    assert found.boxes.shape == (len(found), 4)
    assert found.classes.dtype == found.proposal_index.dtype == torch.int64
    assert boxes.equal(before[0]) or boxes.isnan().any()
    assert scores.equal(before[1]) or scores.isnan().any()


@settings(max_examples=200, deadline=None)
@given(problems(), st.sampled_from([0, 2, 5, 32]))
def test_training_lowers_delta_until_there_are_enough(problem, least):
    *given_to_it, delta, most = problem
    found = select_candidates(
        *given_to_it, score_thresh=delta, max_candidates=most, min_candidates=least
    )
    assert as_rows(found) == reference(*problem, least=max(least, 1))


def select(scores, delta=0.05, most=1000, boxes=None):
    scores = torch.tensor(scores)
    if boxes is None:
        boxes = torch.tensor([[0.0, 0, 10, 10]]).repeat(len(scores), 1)
    return select_candidates(boxes, scores, (50, 80), score_thresh=delta, max_candidates=most)


def test_a_score_at_delta_is_no_candidate():
    found = select([[0.05, 0.06, 0.89], [0.04, 0.05, 0.91]])
    assert (found.proposal_index.tolist(), found.classes.tolist()) == ([0], [1])


def test_the_background_is_no_class():
    assert select([[0.02, 0.01, 0.97]]).classes.tolist() == [0]


@pytest.mark.parametrize("steps", range(11))
def test_a_best_score_on_a_step_of_delta_is_still_found(steps):
    """float32(0.05) is above 0.05 for Python, not for a comparison of float32 tensors."""
    at = 0.05 - steps * STEP
    found = select([[at, 0.0, 1 - at]])
    assert 0 in found.classes.tolist()
    # One step further down, and no more.
    assert all(score > at - STEP - 1e-6 for score in found.scores.tolist())


def test_the_fallback_takes_all_within_the_same_step_and_no_more():
    found = select([[0.033, 0.9], [0.031, 0.9], [0.029, 0.9]], delta=0.05)
    assert found.proposal_index.tolist() == [0, 1]  # delta became 0.03


def test_all_zero_scores_give_all_pairs():
    found = select([[0.0, 0.0, 1.0]] * 3)
    assert found.proposal_index.tolist() == [0, 0, 1, 1, 2, 2]
    assert len(select([[0.0, 0.0, 1.0]] * 3, most=4)) == 4


def test_one_proposal_of_hardly_any_confidence_is_a_candidate():
    found = select([[1e-30, 1.0]])
    assert len(found) == 1 and found.scores.tolist() == pytest.approx([1e-30])


@pytest.mark.parametrize("width", [4, 12])
def test_without_proposals_there_are_no_candidates(width):
    found = select_candidates(
        torch.zeros(0, width), torch.zeros(0, 4), (5, 5), score_thresh=0.05, max_candidates=9
    )
    assert len(found) == 0 and found.boxes.shape == (0, 4)
    assert found.classes.dtype == found.proposal_index.dtype == torch.int64


def test_only_non_finite_rows_give_no_candidates():
    boxes = torch.tensor([[0, 0, float("nan"), 10], [0, 0, 5, 5]])
    assert len(select([[0.9, 0.1], [float("inf"), 0.1]], boxes=boxes)) == 0


def test_of_tied_candidates_at_the_cap_the_first_stay():
    found = select([[0.5, 0.9, 0], [0.5, 0.5, 0], [0.9, 0.5, 0]], most=4)
    pairs = list(zip(found.proposal_index.tolist(), found.classes.tolist(), strict=True))
    assert pairs == [(0, 0), (0, 1), (1, 0), (2, 0)]
    # Sorting is stable by chance for a few, not for many.
    many = select([[0.5, 0.5]] * 3000, most=700)
    assert many.proposal_index.tolist() == list(range(700))


@pytest.mark.parametrize("most", [0, -1])
def test_a_cap_below_one_is_an_error_that_names_the_key(most):
    with pytest.raises(ValueError, match=rf"MODEL\.VLNMS\.MAX_CANDIDATES is {most}"):
        select([[0.9, 0.1]], most=most)


def test_candidates_carry_no_gradient():
    boxes = torch.rand(2, 4, requires_grad=True)
    scores = torch.rand(2, 3, requires_grad=True)
    found = select_candidates(boxes, scores, (5, 5), score_thresh=0.05, max_candidates=9)
    assert not found.boxes.requires_grad and not found.scores.requires_grad


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=4, max_size=4), max_size=5),
    st.tuples(st.integers(1, 100), st.integers(1, 100)),
)
def test_clipping_is_that_of_boxes(rows, size):
    tensor = torch.tensor(rows).view(-1, 4)
    boxes = Boxes(tensor.clone())
    boxes.clip(size)
    assert torch.equal(clip_boxes_to_image(tensor, size), boxes.tensor)
