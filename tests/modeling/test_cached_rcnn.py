"""`CachedRCNN` against `GeneralizedRCNN` with the same weights, and what it keeps in its folder."""

import copy

import pytest
import torch
from closeness import WHOLE_MODEL, assert_instances_alike, assert_rounds_alike
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import GeneralizedRCNN, build_model
from detectron2.structures import Instances
from small_models import build, image_input, run, run_raw, same_instances, targets

from vlnms_d2.modeling import CachedRCNN

QUERIES = ["red cup", "", "the left dog of the cup"]


@pytest.fixture
def without_masks(config):
    """`without_masks(head, relatedness)`: a config whose results can be cached."""

    def make(*names):
        cfg = config(*names)
        cfg.MODEL.MASK_ON = False
        return cfg

    return make


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


def cached(cfg, folder, model=None) -> CachedRCNN:
    """A `CachedRCNN` of this config, with the weights of `model`."""
    cfg = cfg.clone()
    cfg.MODEL.META_ARCHITECTURE = "CachedRCNN"
    cfg.MODEL.VLNMS.CACHE_DIR = str(folder)
    torch.manual_seed(0)
    twin = build_model(cfg).eval()
    assert type(twin) is CachedRCNN
    if model is not None:
        twin.load_state_dict(model.state_dict())
    return twin


@pytest.fixture
def twins(without_masks, folder):
    """A `GeneralizedRCNN`, and a `CachedRCNN` of the same weights."""
    cfg = without_masks()
    plain = build(cfg)
    return plain, cached(cfg, folder, plain)


def looks(model) -> list:
    """Grows by one whenever the backbone runs."""
    calls = []
    model.backbone.register_forward_hook(lambda *_: calls.append(1))
    return calls


def files(folder) -> list:
    return sorted(path for path in folder.rglob("*") if path.is_file())


VARIANTS = pytest.mark.parametrize(
    ("head_name", "relatedness", "visual_encoder"),
    [
        (head_name, relatedness, visual_encoder)
        for head_name in ("VLNMSHead", "VLNMSCascadeHead")
        for relatedness in ("FC", "Trans")
        for visual_encoder in ("finetune", "shared")
    ],
)


# --- the same as GeneralizedRCNN ---------------------------------------------------------------


@VARIANTS
def test_results_are_those_of_the_plain_model(
    without_masks, folder, head_name, relatedness, visual_encoder
):
    cfg = without_masks(head_name, relatedness)
    cfg.MODEL.VLNMS.VISUAL_ENCODER = visual_encoder
    cfg.MODEL.VLNMS.OUTPUT_ATTENTION = True
    plain = build(cfg)
    ours = cached(cfg, folder, plain)
    unasked, asked = image_input(0), image_input(1, height=80, query=QUERIES)
    resized = {**image_input(2, query="dog"), "height": 48, "width": 200}
    resized_unasked = {**image_input(2), "height": 48, "width": 200}
    for inputs in ([unasked], [asked], [unasked, asked, resized, resized_unasked]):
        for _ in range(2):  # the second time from the folder
            for forward in (run, run_raw):
                # One at a time: in a batch, rounding differs, and with it the NMS at times.
                expected = [forward(plain, alone)[0] for alone in inputs]
                for a, b in zip(forward(ours, *inputs), expected, strict=True):
                    assert_instances_alike(a, b)


@VARIANTS
def test_losses_and_gradients_are_those_of_the_plain_model(
    without_masks, folder, head_name, relatedness, visual_encoder
):
    cfg = without_masks(head_name, relatedness)
    cfg.MODEL.VLNMS.VISUAL_ENCODER = visual_encoder
    cfg.MODEL.VLNMS.TRAIN_CANDIDATES = 25
    cfg.MODEL.VLNMS.FC.DROPOUT = 0.3
    # Of a seed whose proposals have no nearly equal scores: these could change places in a batch,
    # and others would be drawn.
    plain = build(cfg, seed=3).train()
    ours = cached(cfg, folder, plain).train()
    inputs = [
        image_input(0, query=["red cup", "dog"], query_targets=targets(2)),
        image_input(1),
        image_input(2, query="the blue cup", query_targets=targets(1)),
        image_input(3, query=[], query_targets=[]),
    ]
    for _ in range(2):
        losses = []
        for model in (plain, ours):
            model.zero_grad()
            torch.manual_seed(5)
            losses.append(model(inputs))
            sum(losses[-1].values()).backward()
        expected, own = losses
        assert own.keys() == expected.keys()
        for name, value in expected.items():
            # The plain model runs its detector on the batch at once, which rounds differently.
            assert_rounds_alike(own[name], value, WHOLE_MODEL)
            assert value > 0
        gradients = dict(ours.named_parameters())
        for name, parameter in plain.named_parameters():
            learns = ".vlnms." in name
            assert (gradients[name].grad is not None) == learns, name
            if learns:
                difference = (gradients[name].grad - parameter.grad).norm()
                assert difference <= 2e-3 * parameter.grad.norm() + 1e-5, name


def test_an_image_with_an_empty_list_of_queries_gets_nothing(twins):
    for _ in range(2):
        own, expected = (run(model, image_input(0, query=[]))[0] for model in reversed(twins))
        assert len(own) == 0 and own.get_fields().keys() == expected.get_fields().keys()


def test_training_says_what_is_missing(twins):
    ours = twins[1].train()
    with pytest.raises(ValueError, match="FREEZE_DETECTOR is True and no image"):
        ours([image_input(0)])
    with pytest.raises(ValueError, match='no "query_targets"'):
        ours([image_input(0, query="dog")])


def test_the_frozen_detector_looks_in_eval_mode(twins, folder):
    plain, ours = twins
    ours.train()
    ours([image_input(0, query="dog", query_targets=targets(1))])
    assert ours.roi_heads.training and not ours.backbone.training
    calls = looks(ours.eval())
    assert_instances_alike(*(run(model, image_input(0, query="dog"))[0] for model in (ours, plain)))
    assert calls == [] and len(files(folder)) == 1


@pytest.mark.parametrize("way", ["config", "attribute"])
def test_masks_take_the_plain_path(config, folder, way):
    cfg = config()
    plain = build(cfg)
    cfg.MODEL.MASK_ON = True
    ours = cached(cfg, folder, plain)
    calls = looks(ours)
    if way == "attribute":  # as the trainer does for evaluating recall
        plain.roi_heads.mask_on = ours.roi_heads.mask_on = False
    for _ in range(2):
        for inputs in ([image_input(0)], [image_input(0, query=QUERIES)]):
            own, expected = run(ours, *inputs)[0], run(plain, *inputs)[0]
            assert own.has("pred_masks") == (way == "config")
            if way == "config":
                assert same_instances(own, expected)
            else:
                assert_instances_alike(own, expected)
    assert len(calls) == (4 if way == "config" else 1)
    assert len(files(folder)) == (0 if way == "config" else 1)


def test_given_boxes_take_the_plain_path(twins, folder):
    boxes = run_raw(twins[0], image_input(0))[0]
    given = Instances(boxes.image_size, pred_boxes=boxes.pred_boxes)
    given.pred_classes = boxes.pred_classes
    with torch.no_grad():
        (result,) = twins[1].inference([image_input(0)], [given], do_postprocess=False)
    assert torch.equal(result.pred_boxes.tensor, boxes.pred_boxes.tensor)
    assert files(folder) == []


# --- the folder --------------------------------------------------------------------------------


def test_an_image_is_looked_at_once(twins, folder):
    ours = twins[1]
    calls = looks(ours)
    first = run(ours, image_input(0, query="dog"), image_input(0))
    assert len(calls) == len(files(folder)) == 1
    again = run(ours, image_input(0, query="dog"), image_input(0, query=None))
    ours.train()([image_input(0, query="cup", query_targets=targets(1))])
    assert len(calls) == 1
    for a, b in zip(first, again, strict=True):
        assert same_instances(a, b)
    other = image_input(0)
    other["image"][0, 0, 0] += 1
    run(ours.eval(), other)
    assert len(calls) == len(files(folder)) == 2


def test_models_of_one_detector_share_a_folder(twins, without_masks, folder):
    plain, first = twins
    run(first, image_input(0))
    cfg = without_masks("VLNMSHead", "Trans")  # another branch
    second = cached(cfg, folder)
    weights = {k: v for k, v in plain.state_dict().items() if ".vlnms." not in k}
    second.load_state_dict(weights, strict=False)
    first_calls, second_calls = looks(first), looks(second)
    run(second, image_input(0, query="dog"), image_input(1, query="dog"))
    run(first, image_input(0, query="dog"), image_input(1, query="dog"))
    assert len(second_calls) == 1 and first_calls == []
    assert len(files(folder)) == 2 and len(list(folder.iterdir())) == 1


def test_another_weight_of_the_detector_is_another_folder(twins, folder):
    plain, ours = twins
    calls = looks(ours)
    run(ours, image_input(0))
    weights = copy.deepcopy(plain.state_dict())
    names = [name for name in weights if weights[name].is_floating_point()]
    [branch] = [name for name in names if name.endswith("vlnms.relatedness.fc_r.bias")]
    weights[branch] += 1
    ours.load_state_dict(weights)
    run(ours, image_input(0))
    assert len(calls) == len(list(folder.iterdir())) == 1
    for number, part in enumerate(("backbone", "proposal_generator", "roi_heads.box_head"), 2):
        changed = next(name for name in names if name.startswith(part))
        weights[changed].view(-1)[0] += 0.1
        ours.load_state_dict(weights)
        plain.load_state_dict(weights)
        assert_instances_alike(
            *(run(model, image_input(0, query="dog"))[0] for model in (ours, plain))
        )
        assert len(calls) == len(list(folder.iterdir())) == number
    ours.load_state_dict(weights)
    run(ours, image_input(0))
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("key", "value", "same"),
    [
        ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.1, False),
        ("MODEL.ROI_HEADS.NMS_THRESH_TEST", 0.3, False),
        ("MODEL.RPN.POST_NMS_TOPK_TEST", 30, False),
        ("MODEL.PIXEL_MEAN", [1.0, 2.0, 3.0], False),
        ("MODEL.VLNMS.MAX_CANDIDATES", 7, False),
        ("MODEL.VLNMS.VISUAL_ENCODER", "shared", False),
        ("TEST.DETECTIONS_PER_IMAGE", 5, False),
        ("INPUT.FORMAT", "RGB", False),
        ("MODEL.WEIGHTS", "other.pth", True),
        ("MODEL.VLNMS.PRECISION", "bfloat16", True),
        ("MODEL.VLNMS.FUSION", "weighted_sum", True),
        ("MODEL.VLNMS.TRAIN_CANDIDATES", 9, True),
        ("MODEL.VLNMS.TRAIN_MIN_CANDIDATES", 900, True),
        ("MODEL.VLNMS.RELATEDNESS", "Trans", True),
        ("MODEL.VLNMS.LOSS", "ranking", True),
        ("SOLVER.BASE_LR", 3.0, True),
    ],
)
def test_another_setting_of_the_detector_is_another_folder(without_masks, folder, key, value, same):
    cfg = without_masks()
    first = cached(cfg, folder)
    run(first, image_input(0, query="dog"))
    cfg.merge_from_list([key, value])
    second = cached(cfg, folder)
    weights = {k: v for k, v in first.state_dict().items() if ".vlnms." not in k}
    second.load_state_dict(weights, strict=False)
    calls = looks(second)
    run(second, image_input(0, query="dog"))
    assert len(calls) == (0 if same else 1)
    assert len(list(folder.iterdir())) == (1 if same else 2)


def test_training_with_more_candidates_has_files_of_its_own(without_masks, folder):
    cfg = without_masks()
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.9
    cfg.MODEL.VLNMS.TRAIN_MIN_CANDIDATES = 40
    model = cached(cfg, folder)
    first = run(model, image_input(0, query="dog"))
    [evaluated] = files(folder)
    for _ in range(2):
        model.train()([image_input(0, query="dog", query_targets=targets(1))])
        assert len(files(folder)) == 2 and len(list(folder.iterdir())) == 1
        assert_instances_alike(run(model.eval(), image_input(0, query="dog"))[0], first[0])
    [trained] = {*files(folder)} - {evaluated}
    counts = [len(torch.load(path)["candidates"]["scores"]) for path in (evaluated, trained)]
    assert counts[0] < 40 <= counts[1]


SPOILED = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "all but a byte": lambda content: content[:-1],
    "garbage": lambda content: b"garbage" * 100,
    "start overwritten": lambda content: b"\0" * 200 + content[200:],
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED.keys())
def test_a_spoiled_file_is_named_and_made_anew_once_deleted(twins, folder, spoil):
    ours = twins[1]
    (before,) = run(ours, image_input(0, query="dog"))
    [path] = files(folder)
    path.write_bytes(spoil(path.read_bytes()))
    for inputs in (image_input(0), image_input(0, query="dog")):
        with pytest.raises(ValueError, match="cannot be read") as error:
            run(ours, inputs)
        assert str(path) in str(error.value) and "CACHE_DIR" in str(error.value)
    path.unlink()
    assert same_instances(run(ours, image_input(0, query="dog"))[0], before)
    assert files(folder) == [path]


@pytest.mark.parametrize(
    "content", [{}, [], torch.ones(2), {"image_size": (96, 128)}, {"candidates": {}}]
)
def test_a_file_of_something_else_is_named(twins, folder, content):
    ours = twins[1]
    run(ours, image_input(0))
    [path] = files(folder)
    torch.save(content, path)
    with pytest.raises(ValueError, match="cannot be read") as error:
        run(ours, image_input(0))
    assert str(path) in str(error.value)


def test_a_broken_off_write_leaves_nothing(twins, folder, monkeypatch):
    ours = twins[1]

    def save_half(content, file):
        file.write(b"half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(torch, "save", save_half)
        run(ours, image_input(0))
    assert files(folder) == []
    assert_instances_alike(*(run(model, image_input(0))[0] for model in reversed(twins)))


# --- building and checkpoints ------------------------------------------------------------------


def test_what_cannot_be_cached_is_refused(without_masks, folder):
    with pytest.raises(ValueError, match=r"MODEL\.VLNMS\.CACHE_DIR is empty"):
        cached(without_masks(), "")
    for key, value, message in (
        (
            "MODEL.ROI_HEADS.NAME",
            "StandardROIHeads",
            "with StandardROIHeads, expected .* VLNMSHead",
        ),
        ("MODEL.VLNMS.FREEZE_DETECTOR", False, r"set MODEL\.VLNMS\.FREEZE_DETECTOR to True"),
        (
            "MODEL.PROPOSAL_GENERATOR.NAME",
            "PrecomputedProposals",
            r"PROPOSAL_GENERATOR\.NAME is PrecomputedProposals",
        ),
    ):
        cfg = without_masks()
        cfg.merge_from_list([key, value])
        with pytest.raises(ValueError, match=message):
            cached(cfg, folder)


@pytest.mark.parametrize("from_cached", [True, False])
def test_checkpoints_of_the_one_load_in_the_other(without_masks, folder, tmp_path, from_cached):
    cfg = without_masks("VLNMSCascadeHead", "Trans")
    trained = build(cfg, seed=3)
    ours, plain = cached(cfg, folder, trained), build(cfg)
    if not from_cached:
        ours.load_state_dict(plain.state_dict())
        plain.load_state_dict(trained.state_dict())
    source, sink = (ours, plain) if from_cached else (plain, ours)
    assert isinstance(ours, GeneralizedRCNN) and type(plain) is GeneralizedRCNN
    before = run(sink, image_input(0, query=QUERIES))[0]
    DetectionCheckpointer(source, str(tmp_path)).save("trained")
    rest = DetectionCheckpointer(sink)._load_model(
        {"model": torch.load(tmp_path / "trained.pth", weights_only=True)["model"]}
    )
    assert not rest.missing_keys and not rest.unexpected_keys
    after = run(sink, image_input(0, query=QUERIES))[0]
    assert not same_instances(before, after)
    assert_instances_alike(after, run(source, image_input(0, query=QUERIES))[0])
