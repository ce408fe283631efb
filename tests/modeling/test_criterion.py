"""Which candidates take part in a training step, and the total loss, against plain loops."""

import pytest
import torch
from closeness import FEW_LAYERS, assert_rounds_alike
from detectron2.config import get_cfg
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from torch import Tensor

from vlnms_d2 import add_vlnms_config
from vlnms_d2.modeling.candidates import Candidates
from vlnms_d2.modeling.losses import Criterion, ranking_loss, relatedness_bce
from vlnms_d2.modeling.relatedness import RelatednessOutput

WEIGHTS = (10.0, 10.0, 5.0, 5.0)
GROUND_TRUTH = [[10.0, 10, 50, 50], [60, 20, 120, 90]]


def random_boxes(num: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(num, 2, generator=generator) * 60
    return torch.cat([corner, corner + 10 + torch.rand(num, 2, generator=generator) * 50], dim=1)


def make_candidates(boxes: Tensor) -> Candidates:
    """Candidates that can be told apart by their `proposal_index`."""
    number = torch.arange(len(boxes))
    pooled = number[:, None].float() * 10
    return Candidates(boxes, number / 100.0, number % 3, number, pooled)


def near(boxes: list[list[float]], num: int, seed: int = 0) -> Tensor:
    """`num` boxes around each, of an IoU from about 0.4 to 1."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.tensor(boxes).repeat_interleave(num, dim=0)
    return whole + torch.rand(whole.shape, generator=generator) * 20 - 10


def target(
    boxes: list[list[float]],
    reliable: list[bool] | None = None,
    classes: list[int] | None = None,
) -> Instances:
    instances = Instances((100, 130), gt_boxes=Boxes(torch.tensor(boxes).view(-1, 4)))
    if reliable is not None:
        instances.gt_reliable = torch.tensor(reliable, dtype=torch.bool)
    if classes is not None:
        instances.gt_classes = torch.tensor(classes)
    return instances


def output(samples, seed: int = 0, refine: bool = True) -> RelatednessOutput:
    """What a relatedness module could say of the samples candidates, as leaves."""
    generator = torch.Generator().manual_seed(seed)
    shape = samples.sampled.shape
    logits = torch.randn(shape, generator=generator).requires_grad_()
    deltas = (torch.randn(*shape, 4, generator=generator) * 2).requires_grad_()
    return RelatednessOutput(logits, deltas=deltas if refine else None)


def batch(criterion: Criterion) -> list:
    """Two images, of different numbers of candidates, queries and positives."""
    first = make_candidates(torch.cat([near(GROUND_TRUTH, 12), random_boxes(10)]))
    second = make_candidates(torch.cat([near(GROUND_TRUTH[:1], 5, seed=1), random_boxes(6, 1)]))
    return [
        criterion.sample(first, [target(GROUND_TRUTH, [True, False]), target(GROUND_TRUTH)], True),
        criterion.sample(
            second, [target(GROUND_TRUTH[:1]), target([]), target(GROUND_TRUTH)], True
        ),
    ]


# --- drawing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("most", "expected"), [(1, 1), (7, 7), (20, 20), (21, 20), (-1, 20)])
def test_at_most_so_many_candidates_take_part(most, expected):
    criterion = Criterion(max_candidates=most, batch_size_per_query=-1)
    candidates = make_candidates(random_boxes(20))
    samples = criterion.sample(candidates, [target(GROUND_TRUTH)], keep_others=True)
    assert len(samples.candidates) == samples.labels.labels.shape[1] == expected
    assert samples.sampled.shape == (1, expected) and samples.sampled.all()
    index = samples.candidates.proposal_index
    assert index.unique().tolist() == index.tolist()  # none twice, in the order that they had
    for field in ("boxes", "scores", "classes", "pooled"):
        own, all_of_them = getattr(samples.candidates, field), getattr(candidates, field)
        assert torch.equal(own, all_of_them[index]), field


def test_the_candidates_that_take_part_are_drawn_uniformly():
    torch.manual_seed(0)
    criterion = Criterion(max_candidates=5)
    # Some of them positive: no matter here.
    candidates = make_candidates(torch.cat([near(GROUND_TRUTH, 4), random_boxes(12)]))
    counts = torch.zeros(20)
    for _ in range(2000):
        samples = criterion.sample(candidates, [target(GROUND_TRUTH)], keep_others=True)
        counts[samples.candidates.proposal_index] += 1
    torch.testing.assert_close(counts / 2000, torch.full((20,), 0.25), atol=0.05, rtol=0)


def test_the_draw_depends_on_the_seed_alone():
    criterion = Criterion(max_candidates=12, batch_size_per_query=4)
    candidates = make_candidates(random_boxes(40))
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        samples = criterion.sample(candidates, [target(GROUND_TRUTH)], keep_others=False)
        draws.append(samples.candidates.proposal_index.tolist())
    assert draws[0] == draws[1] != draws[2]


def test_candidates_that_no_query_drew_stay_on_demand():
    criterion = Criterion(batch_size_per_query=6)
    candidates = make_candidates(torch.cat([near(GROUND_TRUTH, 10), random_boxes(20)]))
    targets = [target(GROUND_TRUTH[:1]), target(GROUND_TRUTH[1:])]
    draws = []
    for keep_others in (True, False):
        torch.manual_seed(4)
        draws.append(criterion.sample(candidates, targets, keep_others))
    everything, used = draws
    assert len(everything.candidates) == 40
    assert everything.sampled.sum(dim=1).tolist() == [6, 6]
    index = used.candidates.proposal_index
    assert index.tolist() == everything.sampled.any(dim=0).nonzero()[:, 0].tolist()
    assert torch.equal(used.sampled, everything.sampled[:, index])
    for field in ("labels", "weights", "iou", "matched_boxes", "regress"):
        own, all_of_them = getattr(used.labels, field), getattr(everything.labels, field)
        assert torch.equal(own, all_of_them[:, index]), field


def test_ranking_draws_from_each_level():
    # Four boxes of each IoU: none, then of the levels 1 to 5.
    widths = torch.tensor([20.0, 5.5, 6.5, 7.5, 8.5, 10]).repeat(4)
    boxes = torch.stack([widths * 0, widths * 0, widths, torch.full((24,), 10.0)], dim=1)
    boxes[::6] += 50
    candidates, targets = make_candidates(boxes), [target([[0.0, 0, 10, 10]])] * 2
    criterion = Criterion(loss="ranking", batch_size_per_query=20, positive_fraction=0.75)
    sampled = criterion.sample(candidates, targets, True).sampled  # [2, 24]
    assert sampled.view(2, 4, 6).sum(dim=1).tolist() == [[4, 3, 3, 3, 3, 3]] * 2
    everything = Criterion(loss="ranking", batch_size_per_query=-1)
    assert everything.sample(candidates, targets, True).sampled.all()
    # Otherwise the levels do not matter.
    criterion.loss = "bce"
    assert criterion.sample(candidates, targets, True).sampled.sum(dim=1).tolist() == [19, 19]


def test_the_share_of_positives_and_their_threshold():
    # IoU 0.6 and 1 with the ground truth, and none.
    boxes = torch.tensor([[0.0, 0, 10, 6], [0, 0, 10, 10], [50, 50, 60, 60]]).repeat(10, 1)
    foreground = [target([[0.0, 0, 10, 10]])]
    for threshold, num_positive in ((0.5, 20), (0.7, 10)):
        everything = Criterion(batch_size_per_query=-1, iou_threshold=threshold)
        samples = everything.sample(make_candidates(boxes), foreground, keep_others=True)
        assert int(samples.labels.labels.sum()) == num_positive
    few = Criterion(batch_size_per_query=8, positive_fraction=0.25, iou_threshold=0.5)
    samples = few.sample(make_candidates(boxes), foreground, keep_others=False)
    assert samples.labels.labels[samples.sampled].sum() == 2 and samples.sampled.sum() == 8


@pytest.mark.parametrize("soft", [0.5, 0.25])
def test_unreliable_foreground_has_a_soft_label_and_weight_and_no_regression(soft):
    sure, pseudo = [0.0, 0, 10, 10], [40.0, 40, 60, 60]
    candidates = make_candidates(torch.tensor([sure, pseudo, [80.0, 0, 90, 10]]))
    criterion = Criterion(batch_size_per_query=-1, unreliable_label=soft)
    targets = [target([sure, pseudo], [True, False]), target([sure, pseudo])]
    labels = criterion.sample(candidates, targets, keep_others=True).labels
    assert labels.labels.tolist() == [[1, soft, 0], [1, 1, 0]]
    assert labels.weights.tolist() == [[1, soft, 1], [1, 1, 1]]
    assert labels.regress.tolist() == [[True, False, False], [True, True, False]]


def test_only_candidates_of_the_class_of_the_box_are_regressed():
    box, loose, other = [0.0, 0, 10, 10], [0.0, 0, 10, 7], [40.0, 40, 60, 60]
    candidates = make_candidates(torch.tensor([box, box, loose, other]))  # of classes 0, 1, 2, 0
    criterion = Criterion(batch_size_per_query=-1)
    targets = [
        target([box, other], classes=[1, -1]),
        target([box, loose], classes=[0, 2]),
        target([loose, box, other], [True, False, True], classes=[1, 0, 1]),
    ]
    labels = criterion.sample(candidates, targets, keep_others=True).labels
    assert labels.labels.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert labels.regress.int().tolist() == [[0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 0]]
    assert labels.matched_boxes[1].tolist() == [box, [0.0] * 4, loose, box]


# --- losses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reg_weight", [1.0, 0.3])
@pytest.mark.parametrize("beta", [1.0, 0.1])
@pytest.mark.parametrize("batch_size", [-1, 8])
def test_refinement_equals_a_loop(reg_weight, beta, batch_size):
    """All positives that take part are regressed, samples or not."""
    criterion = Criterion(reg_weight=reg_weight, reg_beta=beta, batch_size_per_query=batch_size)
    box2box = Box2BoxTransform(WEIGHTS)
    samples = batch(criterion)
    outputs = [output(own, seed) for seed, own in enumerate(samples)]
    total, count, per_image = 0.0, 0, []
    for said, own in zip(outputs, samples, strict=True):
        before = count
        for q in range(own.sampled.shape[0]):
            for n in range(own.sampled.shape[1]):
                if not own.labels.regress[q, n]:
                    continue
                box, matched = own.candidates.boxes[n], own.labels.matched_boxes[q, n]
                wanted = box2box.get_deltas(box[None], matched[None])[0]
                for k in range(4):
                    d = abs(said.deltas[q, n, k].item() - wanted[k].item())
                    total += 0.5 * d * d / beta if d < beta else d - 0.5 * beta
                count += 1
        per_image.append(count - before)
    assert min(per_image) > 2 and per_image[0] != per_image[1]
    losses = criterion.losses(outputs, samples, box2box)
    assert set(losses) == {"loss_relatedness", "loss_refinement"}
    assert losses["loss_refinement"].item() == pytest.approx(
        reg_weight * total / count, rel=FEW_LAYERS
    )

    losses["loss_refinement"].backward()
    for said, own in zip(outputs, samples, strict=True):
        assert torch.equal(said.deltas.grad.abs().sum(dim=2) > 0, own.labels.regress)
        assert said.logits.grad is None


def test_a_refinement_onto_the_foreground_costs_nothing():
    """The targets are in the parameterisation by which boxes are moved."""
    criterion, box2box = Criterion(batch_size_per_query=-1), Box2BoxTransform(WEIGHTS)
    candidates = make_candidates(near(GROUND_TRUTH[:1], 6))
    samples = criterion.sample(candidates, [target(GROUND_TRUTH[:1])], keep_others=True)
    deltas = box2box.get_deltas(samples.candidates.boxes, samples.labels.matched_boxes[0])[None]
    deltas = deltas.nan_to_num(0.0)
    losses = criterion.losses(
        [RelatednessOutput(deltas[..., 0], deltas=deltas)], [samples], box2box
    )
    assert samples.labels.regress.sum() > 2
    assert losses["loss_refinement"].item() == pytest.approx(0.0, abs=1e-6)
    moved = box2box.apply_deltas(deltas[0], samples.candidates.boxes)[samples.labels.regress[0]]
    assert_rounds_alike(moved, torch.tensor(GROUND_TRUTH[:1]).expand(len(moved), 4))


@pytest.mark.parametrize("boxes", [[], [[0.0, 0, 1, 1]], GROUND_TRUTH])
def test_without_reliable_positives_refinement_is_zero_with_a_gradient_of_zero(boxes):
    criterion = Criterion()
    candidates = make_candidates(torch.tensor(GROUND_TRUTH))
    samples = criterion.sample(candidates, [target(boxes, [False] * len(boxes))], keep_others=True)
    said = output(samples)
    losses = criterion.losses([said], [samples], Box2BoxTransform(WEIGHTS))
    sum(losses.values()).backward()
    assert losses["loss_refinement"].item() == 0
    assert torch.equal(said.deltas.grad, torch.zeros_like(said.deltas))


@pytest.mark.parametrize("loss", ["bce", "ranking"])
def test_relatedness_is_the_mean_over_images(loss):
    criterion = Criterion(loss=loss, rank_margin=0.3, rank_top_h=3)
    samples = batch(criterion)
    outputs = [output(own, seed, refine=False) for seed, own in enumerate(samples)]
    each = [
        relatedness_bce(said.logits, own.labels, own.sampled)
        if loss == "bce"
        else ranking_loss(said.logits, own.labels.iou, own.sampled, margin=0.3, top_h=3)
        for said, own in zip(outputs, samples, strict=True)
    ]
    assert each[0] != each[1] and min(each) > 0
    losses = criterion.losses(outputs, samples, Box2BoxTransform(WEIGHTS))
    assert set(losses) == {"loss_relatedness"}
    torch.testing.assert_close(losses["loss_relatedness"], sum(each) / 2)


# --- building ----------------------------------------------------------------------------------


def test_an_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="'Sphinx', expected 'bce' or 'ranking'"):
        Criterion(loss="Sphinx")


def test_no_candidates_to_train_on_are_refused():
    with pytest.raises(ValueError, match=r"MODEL\.VLNMS\.TRAIN_CANDIDATES is 0"):
        Criterion(max_candidates=0)


@pytest.mark.parametrize(
    ("key", "value", "attribute"),
    [
        ("LOSS", "ranking", "loss"),
        ("RANK_MARGIN", 0.7, "rank_margin"),
        ("RANK_TOP_H", 13, "rank_top_h"),
        ("REG_WEIGHT", 0.2, "reg_weight"),
        ("TRAIN_CANDIDATES", 17, "max_candidates"),
        ("TRAIN_MIN_CANDIDATES", 19, "min_candidates"),
        ("BATCH_SIZE_PER_QUERY", 11, "batch_size_per_query"),
        ("POSITIVE_FRACTION", 0.1, "positive_fraction"),
        ("IOU_THRESHOLD", 0.6, "iou_threshold"),
        ("PSEUDO_GT.UNRELIABLE_LABEL", 0.3, "unreliable_label"),
    ],
)
def test_every_key_of_the_config_arrives(key, value, attribute):
    cfg = get_cfg()
    add_vlnms_config(cfg)
    before = vars(Criterion(cfg))
    # The paper's values, which are also those of a criterion that is built by hand.
    assert before == vars(Criterion())
    cfg.merge_from_list([f"MODEL.VLNMS.{key}", value])
    assert vars(Criterion(cfg)) == {**before, attribute: value}
