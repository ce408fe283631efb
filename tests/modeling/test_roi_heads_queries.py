"""Queries: what reaches the head, and what must not stay there."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from closeness import assert_instances_alike, assert_rounds_alike
from conftest import HEADS
from detectron2.engine import DefaultPredictor
from detectron2.modeling import GeneralizedRCNN, build_model
from detectron2.modeling.test_time_augmentation import GeneralizedRCNNWithTTA
from small_models import build, image_input, run, same_instances, stock_config

from vlnms_d2 import split_by_query, use_queries


def test_bad_queries_say_what_and_where(config):
    model = build(config())
    with pytest.raises(TypeError, match=r'batched_inputs\[1\]\["query"\] must be a string or'):
        run(model, image_input(0), image_input(0, query=7))
    with pytest.raises(TypeError, match=r'\["query"\]\[1\] must be a string, got NoneType'):
        run(model, image_input(0, query=["dog", None]))


@pytest.mark.parametrize("relatedness", ["FC", "Trans"])
@pytest.mark.parametrize("query", ["", "   ", "?!"])
def test_an_empty_query_leaves_the_detectors_boxes_and_order(config, head, relatedness, query):
    model = build(config(head, relatedness))
    alone, asked = run(model, image_input(0), image_input(0, query=query))
    assert torch.equal(asked.relatedness, torch.ones(len(asked)))
    for name in set(asked.get_fields()) - set(alone.get_fields()):
        asked.remove(name)
    assert_instances_alike(asked, alone)


def test_unknown_words_and_very_long_queries_are_answered(config):
    model = build(config())
    unknown, long = "zyx qwv", "red " * 5000
    (instances,) = run(model, image_input(0, query=[unknown, long, "red " * 20]))
    first, second, third = split_by_query(instances, 3)
    assert len(first) > 0
    assert_rounds_alike(second.scores, third.scores)  # cut at MAX_WORDS = 20


def test_queries_are_gone_after_the_forward_also_when_it_raised(config, head):
    model = build(config(head))
    run(model, image_input(0, query="dog"))
    assert model.roi_heads.current_queries(1).is_empty
    with pytest.raises(RuntimeError):
        run(model, {"image": torch.zeros(5, 40, 40), "query": "dog"})
    assert model.roi_heads.current_queries(1).is_empty
    with pytest.raises(TypeError):
        run(model, image_input(0, query=3))
    assert model.roi_heads.current_queries(1).is_empty
    (instances,) = run(model, image_input(0))
    assert not instances.has("query_index")


def test_two_models_do_not_see_each_others_queries(config):
    first, second = build(config()), build(config(), seed=1)
    hook = first.backbone.register_forward_hook(
        lambda *_: setattr(first, "inner", run(second, image_input(0))[0])
    )
    (outer,) = run(first, image_input(0, query="dog"))
    hook.remove()
    assert outer.has("query_index") and not first.inner.has("query_index")


def test_a_query_of_the_wrong_type_leaves_the_queries_of_use_queries(config):
    model = build(config())
    with use_queries(model, ["dog"]):
        with pytest.raises(TypeError):
            run(model, image_input(0, query=3))
        assert model.roi_heads.current_queries(1).queries == [["dog"]]


def test_threads_that_share_a_model_get_their_own_answers(config):
    model = build(config())
    queries = ["dog", "red cup", "left chair", "dog on the table"]
    expected = [run(model, image_input(0, query=query))[0] for query in queries]
    together = threading.Barrier(len(queries))

    def wait_for_the_others(*_):
        together.wait(timeout=60)

    # Every forward has read its queries before any reaches the head.
    hook = model.backbone.register_forward_hook(wait_for_the_others)
    with ThreadPoolExecutor(len(queries)) as pool:
        answers = list(pool.map(lambda query: run(model, image_input(0, query=query))[0], queries))
    hook.remove()
    for answer, alone in zip(answers, expected, strict=True):
        assert same_instances(answer, alone)


def test_copies_and_pickles_use_their_own_head(config, head):
    model = build(config(head))
    reference = run(model, image_input(0, query="red cup"))[0]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            twin.roi_heads.vlnms.relatedness.fc_r.bias += 1
        changed = run(twin, image_input(0, query="red cup"))[0]
        assert twin.roi_heads.current_queries(1).is_empty
        assert changed.relatedness.mean() > reference.relatedness.mean()
        assert same_instances(run(model, image_input(0, query="red cup"))[0], reference)


def test_inference_called_directly_takes_the_queries_of_its_inputs(config, head):
    model = build(config(head))
    asked = run(model, image_input(0, query=["dog", "cup"]))[0]
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            direct = each.inference([image_input(0, query=["dog", "cup"])])[0]["instances"]
            keyword = each.inference(batched_inputs=[image_input(0, query=["dog", "cup"])])
            raw = each.inference([image_input(0, query="dog")], do_postprocess=False)[0]
            # Never those of an earlier call.
            assert not each.inference([image_input(0)])[0]["instances"].has("query_index")
            with pytest.raises(TypeError, match="must be a string"):
                each.inference([image_input(0, query=3)])
        assert same_instances(direct, asked) and same_instances(keyword[0]["instances"], asked)
        assert raw.has("query_index") and each.roi_heads.current_queries(1).is_empty


def test_a_changed_copy_answers_by_its_own_inference(config):
    model = build(config())
    before = run(model, image_input(0, query="dog"))[0]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            twin.roi_heads.vlnms.relatedness.fc_r.bias += 1
            changed = twin.inference([image_input(0, query="dog")])[0]["instances"]
            original = model.inference([image_input(0, query="dog")])[0]["instances"]
        assert changed.relatedness.mean() > before.relatedness.mean()
        assert same_instances(original, before)


def test_use_queries_gives_them_to_inputs_without_any(config):
    model = build(config())
    asked = run(model, image_input(0, query=["dog", "cup"]))[0]
    single = run(model, image_input(0, query="dog"))[0]
    plain = run(model, image_input(0))[0]
    with use_queries(model, [["dog", "cup"]]), torch.no_grad():
        assert same_instances(model.inference([image_input(0)])[0]["instances"], asked)
        assert same_instances(run(model, image_input(0))[0], asked)
        # The inputs' own go first.
        assert same_instances(run(model, image_input(0, query="dog"))[0], single)
        assert same_instances(run(model, image_input(0, query=None))[0], plain)
        assert same_instances(run(model, image_input(0))[0], asked)
        with pytest.raises(ValueError, match="queries for 1 images were given but the batch has 2"):
            run(model, image_input(0), image_input(1))
    assert same_instances(run(model, image_input(0))[0], plain)


def test_the_default_predictor_inside_use_queries(config):
    predictor = DefaultPredictor(config())
    predictor.model = build(config())
    image = image_input(0)["image"].permute(1, 2, 0).numpy().astype("uint8")
    with use_queries(predictor.model, ["dog"]):
        assert predictor(image)["instances"].has("query_index")
    assert not predictor(image)["instances"].has("query_index")


def test_the_key_queries_is_an_error(config):
    model = build(config())
    for call in (model, model.inference, model.train()):
        with pytest.raises(ValueError, match=r'\[1\] has the key "queries"; expected "query"'):
            call([image_input(0), image_input(0, queries=["dog"])])
        model.eval()


@pytest.mark.parametrize(
    ("zoo_config", "arch"),
    [
        ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", "RetinaNet"),
        ("COCO-Detection/rpn_R_50_FPN_1x.yaml", "ProposalNetwork"),
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml", "SemanticSegmentor"),
    ],
)
def test_an_architecture_without_roi_heads_refuses_ours(zoo_config, arch):
    cfg = stock_config(zoo_config)
    cfg.MODEL.META_ARCHITECTURE = arch
    cfg.MODEL.SEM_SEG_HEAD.NORM = ""
    build_model(cfg)  # a stock config builds
    cfg.MODEL.ROI_HEADS.NAME = "VLNMSHead"
    with pytest.raises(ValueError, match=f"'VLNMSHead', but MODEL.META_ARCHITECTURE '{arch}' has"):
        build_model(cfg)


def test_stock_models_beside_ours_stay_as_they_are(config):
    model, stock = build(config()), build(stock_config(HEADS["VLNMSHead"]))
    assert type(model) is type(stock) is GeneralizedRCNN
    assert "inference" in vars(model) and "inference" not in vars(stock)
    assert same_instances(run(stock, image_input(0, query=3))[0], run(stock, image_input(0))[0])


def test_use_queries_checks_its_arguments(config):
    model = build(config())
    with pytest.raises(TypeError, match=r"queries\[1\]"), use_queries(model, ["a", 3]):
        pass
    with pytest.raises(ValueError, match="no VL-NMS head"), use_queries(model.backbone, ["a"]):
        pass
    with (
        pytest.raises(ValueError, match="queries for 2 images"),
        use_queries(model, ["a", "b"]),
    ):
        model.inference([image_input(0)])


@pytest.fixture
def augmentation(config):
    cfg = config()
    cfg.TEST.AUG.MIN_SIZES = (96, 128)
    cfg.TEST.AUG.MAX_SIZE = 160
    return GeneralizedRCNNWithTTA(cfg, build(cfg))


@torch.no_grad()
def test_test_time_augmentation_answers_query_by_query(augmentation):
    plain = augmentation([image_input(0)])[0]["instances"]
    assert len(plain) and not plain.has("query_index")
    both, alone = augmentation([image_input(0, query=["red cup", "dog"]), image_input(0)])
    assert same_instances(alone["instances"], plain)
    parts = split_by_query(both["instances"], 2)
    for query, part in zip(["red cup", "dog"], parts, strict=True):
        with use_queries(augmentation.model, query, every_image=True):
            single = augmentation([image_input(0)])[0]["instances"]
        assert len(single) and single.pred_masks.any()
        assert torch.equal(single.pred_boxes.tensor, part.pred_boxes.tensor)
        assert torch.equal(single.scores, part.scores)
        assert not torch.equal(plain.scores[: len(single)], single.scores[: len(plain)])
    none = augmentation([image_input(0, query=[])])[0]["instances"]
    assert len(none) == 0 and none.has("query_index")
    with (
        use_queries(augmentation.model, ["dog", "cup"]),
        pytest.raises(ValueError, match="queries for 2 images were given but the batch has 1"),
    ):
        augmentation([image_input(0)])


@torch.no_grad()
def test_mirrored_views_are_left_out_for_queries_that_speak_of_sides(augmentation):
    seen = []
    hook = augmentation.model.backbone.register_forward_pre_hook(
        lambda module, args: seen.extend(args[0])
    )

    def num_mirrored(query) -> int:
        seen.clear()
        augmentation([image_input(0, query=query)])
        rounded = {view.round().numpy().tobytes() for view in seen}
        return sum(view.flip(2).round().numpy().tobytes() in rounded for view in seen) // 2

    for query in ("dog", "a bright cup", "leather sofa", "beast of burden", "lateral"):
        assert num_mirrored(query) > 0, query
    for query in ("Left cup", "the rightmost", "topright", "on lt", "3 o'clock", "eastern"):
        assert num_mirrored(query) == 0, query
    hook.remove()
    mirrored = augmentation.tta_mapper

    def only_mirrored(image):
        return [view for view in mirrored(image) if len(view["transforms"].transforms) > 2]

    augmentation.tta_mapper = only_mirrored
    with pytest.raises(ValueError, match="all views are mirrored, but the query 'left cup'"):
        augmentation([image_input(0, query="left cup")])


class Wrapper(torch.nn.Module):
    """Stands for DistributedDataParallel: calls the model from inside."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_wrappers_and_keyword_calls(config):
    model = build(config())
    with torch.no_grad():
        wrapped = Wrapper(model)(batched_inputs=[image_input(0, query="dog")])[0]["instances"]
    assert same_instances(wrapped, run(model, image_input(0, query="dog"))[0])
