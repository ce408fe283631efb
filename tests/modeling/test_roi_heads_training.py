"""Training a query-conditioned head, and loading its weights."""

import copy
import multiprocessing
import pickle
from datetime import timedelta

import pytest
import torch
from closeness import WHOLE_MODEL, assert_rounds_alike
from conftest import HEADS
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.structures import BitMasks
from detectron2.utils.events import EventStorage
from small_models import build, image_input, run, stock_config, targets

from vlnms_d2.modeling.text import Vocabulary


def test_the_frozen_detector_stays_in_eval_mode_and_does_not_move(config, head):
    model = build(config(head))
    before = copy.deepcopy(model.state_dict())
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        losses = model([image_input(0, query=["red cup", "dog"], query_targets=targets(2))])
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not model.backbone.training and not model.proposal_generator.training
    assert model.roi_heads.training and model.roi_heads.vlnms.training
    for name, value in model.state_dict().items():
        if ".vlnms." not in name:
            assert torch.equal(value, before[name]), name
    moved = [n for n, v in model.state_dict().items() if not torch.equal(v, before[n])]
    assert any("visual_encoder" in n for n in moved) and any("text_encoder" in n for n in moved)


def test_training_uses_the_candidates_of_inference(config, head):
    """In training mode too: CascadeROIHeads would drop boxes between its stages."""
    model = build(config(head))
    seen = []
    select = model.roi_heads._select
    model.roi_heads._select = lambda *args: seen.extend(select(*args)) or seen[-1:]
    run(model, image_input(0, query="dog"))
    model.train()
    model([image_input(0, query="dog", query_targets=targets(1))])
    assert torch.equal(seen[0].boxes, seen[1].boxes)
    assert torch.equal(seen[0].scores, seen[1].scores)


def test_delta_is_lowered_in_training_only(config, head):
    cfg = config(head)
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.9
    cfg.MODEL.VLNMS.TRAIN_MIN_CANDIDATES = 32
    model = build(cfg)
    counts, select = [], model.roi_heads._select

    def counted(*args):
        found = select(*args)
        counts.extend(map(len, found))
        return found

    model.roi_heads._select = counted
    run(model, image_input(0, query="dog"))
    model.train()([image_input(0, query="dog", query_targets=targets(1))])
    assert counts[0] < 32 <= counts[1]


def test_training_errors_say_what_is_missing(config):
    model = build(config()).train()
    for nothing in ({}, {"query": [], "query_targets": []}):
        with pytest.raises(ValueError, match="FREEZE_DETECTOR is True and no image"):
            model([image_input(0, **nothing)])
    with pytest.raises(ValueError, match='no "query_targets"'):
        model([image_input(0, query="dog")])
    with pytest.raises(ValueError, match="2 queries but query_targets has 1"):
        model([image_input(0, query=["dog", "cup"], query_targets=targets(1))])


def test_an_unfrozen_detector_trains_with_its_own_losses(config, head):
    cfg = config(head)
    cfg.MODEL.VLNMS.FREEZE_DETECTOR = False
    model = build(cfg).train()
    ground_truth = targets(1)[0]
    ground_truth.gt_classes = torch.tensor([1, 2])
    ground_truth.gt_masks = BitMasks(torch.ones(2, 96, 128, dtype=torch.bool))
    inputs = [
        image_input(0, query=["dog"], query_targets=targets(1), instances=ground_truth),
    ]
    with EventStorage():
        losses = model(inputs)
    assert "loss_relatedness" in losses and "loss_rpn_cls" in losses and "loss_mask" in losses
    assert any(name.startswith("loss_cls") for name in losses)
    assert model.backbone.training


@pytest.fixture
def one_process(tmp_path):
    """A group of one process; DistributedDataParallel then checks as it does with many."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("relatedness", "fusion"), [("FC", "joint"), ("Trans", "joint"), ("Trans", "co_attention")]
)
def test_a_frozen_detector_trains_under_distributed_data_parallel(
    config, head, relatedness, fusion, one_process
):
    """Queries pass the wrapper; no frozen parameter is waited for, and every other has a part."""
    cfg = config(head, relatedness)
    cfg.MODEL.VLNMS.TRANS.FUSION = fusion
    model = build(cfg)
    parallel = torch.nn.parallel.DistributedDataParallel(model).train()
    for _ in range(2):  # the second iteration fails if the first left parameters unused
        losses = parallel([image_input(0, query=["red cup"], query_targets=targets(1))])
        sum(losses.values()).backward()
    assert not model.backbone.training
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".vlnms." in name), name


@pytest.mark.parametrize("relatedness", ["FC", "Trans"])
def test_batches_without_queries_under_distributed_data_parallel(config, relatedness, one_process):
    """It refuses the next batch where a parameter had no gradient in the one before."""
    cfg = config("VLNMSHead", relatedness)
    cfg.MODEL.VLNMS.FREEZE_DETECTOR = False
    cfg.MODEL.MASK_ON = False
    parallel = torch.nn.parallel.DistributedDataParallel(build(cfg).train())
    ground_truth = targets(1)[0]
    ground_truth.gt_classes = torch.tensor([1, 2])
    asked = image_input(0, query="dog", query_targets=targets(1), instances=ground_truth)
    alone = image_input(0, instances=ground_truth)
    losses = []
    blank = image_input(0, query=["", ""], query_targets=targets(2), instances=ground_truth)
    for inputs in ([alone], [asked, alone], [alone, alone], [blank], [asked]):
        with EventStorage():
            losses.append(parallel(inputs))
        sum(losses[-1].values()).backward()
    # Detectron2's trainer reads the losses that the first process has from all.
    assert all(each.keys() == losses[0].keys() for each in losses)
    assert losses[0]["loss_relatedness"] == 0 < losses[1]["loss_relatedness"]


# In each iteration the batches of two processes: with queries on both, on one of them, on none.
ROUNDS = [("alone", "asked"), ("asked", "asked"), ("asked", "alone"), ("alone", "alone")]


def _losses(model, kind: str, seed: int) -> torch.Tensor:
    ground_truth = targets(1)[0]
    ground_truth.gt_classes = torch.tensor([1, 2])
    inputs = image_input(seed, instances=ground_truth)
    if kind == "asked":
        inputs |= {"query": "dog", "query_targets": targets(1)}
    torch.manual_seed(seed)  # of what is sampled
    with EventStorage():
        return sum(model([inputs]).values())


def _train_one_of_two(rank: int, cfg, folder) -> None:
    torch.set_num_threads(1)
    group = {"init_method": f"file://{folder}/group", "timeout": timedelta(seconds=60)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, **group)
    model = build(cfg).train()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    optimizer, gradients = torch.optim.SGD(model.parameters(), lr=1e-4), None
    for number, kinds in enumerate(ROUNDS):
        optimizer.zero_grad()
        _losses(parallel, kinds[rank], 2 * number + rank).backward()
        if gradients is None:
            gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        optimizer.step()
    torch.save((gradients, dict(model.named_parameters())), folder / f"{rank}.pth")
    torch.distributed.destroy_process_group()


def test_two_processes_of_which_one_has_no_query(config, tmp_path):
    """Gradients are the mean of those of the two batches, and the processes stay alike."""
    cfg = config()
    cfg.MODEL.VLNMS.FREEZE_DETECTOR = False
    cfg.MODEL.MASK_ON = False
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=_train_one_of_two, args=(r, cfg, tmp_path)) for r in (0, 1)]
    for process in processes:
        process.start()
    expected = build(cfg).train()
    for rank, kind in enumerate(ROUNDS[0]):
        (_losses(expected, kind, rank) / 2).backward()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    (gradients, state), (others, other_state) = (torch.load(tmp_path / f"{r}.pth") for r in (0, 1))
    for name, value in state.items():
        assert torch.equal(value, other_state[name]), name
    assert any(".vlnms." in name and value.any() for name, value in gradients.items())
    for name, parameter in expected.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(gradients[name], others[name])
            assert_rounds_alike(gradients[name], parameter.grad, WHOLE_MODEL)


def test_a_detector_that_learns_needs_ground_truth(config):
    cfg = config()
    cfg.MODEL.VLNMS.FREEZE_DETECTOR = False
    with pytest.raises(ValueError, match=r'batched_inputs lack "instances".*FREEZE_DETECTOR'):
        build(cfg).train()([image_input(0, query="dog", query_targets=targets(1))])


# --- loading -----------------------------------------------------------------------------------


def copy_equals_head(model) -> bool:
    head = model.roi_heads
    source = head.get_submodule(head.visual_encoder_source).state_dict()
    own = head.vlnms.visual_encoder.state_dict()
    return source.keys() == own.keys() and all(torch.equal(own[k], source[k]) for k in own)


@pytest.mark.parametrize("matching_heuristics", [False, True])
def test_a_stock_checkpoint_starts_the_copy_from_the_detectors_head(
    config, head, tmp_path, matching_heuristics
):
    stock = build(stock_config(HEADS[head]), seed=3)
    content = {"model": stock.state_dict(), "matching_heuristics": matching_heuristics}
    content["model"] = {k: v.numpy() for k, v in content["model"].items()}
    (tmp_path / "stock.pkl").write_bytes(
        pickle.dumps({"__author__": "Detectron2 Model Zoo", **content})
    )
    model = build(config(head))
    DetectionCheckpointer(model).load(str(tmp_path / "stock.pkl"))
    assert copy_equals_head(model)
    loaded = model.state_dict()
    for name, value in stock.state_dict().items():
        assert torch.equal(loaded[name], value), name


def test_without_a_checkpoint_the_copy_starts_as_the_head(config, head):
    model = build(config(head))
    assert copy_equals_head(model)


def test_a_checkpoint_with_a_copy_of_its_own_wins(config, head, tmp_path):
    trained = build(config(head), seed=3)
    with torch.no_grad():
        for parameter in trained.roi_heads.vlnms.visual_encoder.parameters():
            parameter.add_(1)
    torch.save({"model": trained.state_dict()}, tmp_path / "trained.pth")
    model = build(config(head))
    DetectionCheckpointer(model).load(str(tmp_path / "trained.pth"))
    assert not copy_equals_head(model)
    loaded = model.state_dict()
    for name, value in trained.state_dict().items():
        assert torch.equal(loaded[name], value), name


def test_a_vocabulary_that_does_not_fit_the_checkpoint_is_an_error(config, tmp_path):
    trained = build(config())
    torch.save({"model": trained.state_dict()}, tmp_path / "trained.pth")
    cfg = config()
    cfg.MODEL.VLNMS.VOCAB = str(tmp_path / "other.json")
    Vocabulary(["some", "other", "words"]).save(cfg.MODEL.VLNMS.VOCAB)
    with pytest.raises(ValueError, match="another vocabulary"):
        DetectionCheckpointer(build(cfg)).load(str(tmp_path / "trained.pth"))
