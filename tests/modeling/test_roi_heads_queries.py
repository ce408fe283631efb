"""Queries: what reaches the head, and what must not stay there."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import (
    build,
    image_input,
    run,
    same_instances,
)
from detectron2.modeling.test_time_augmentation import GeneralizedRCNNWithTTA

from vlnms_d2 import split_by_query, use_queries


def same_scores(a, b) -> bool:
    return torch.allclose(a.scores, b.scores, rtol=1e-5)


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
    assert torch.equal(asked.pred_classes, alone.pred_classes)
    torch.testing.assert_close(asked.scores, alone.scores)
    torch.testing.assert_close(asked.pred_boxes.tensor, alone.pred_boxes.tensor)


def test_unknown_words_and_very_long_queries_are_answered(config):
    model = build(config())
    unknown, long = "zyx qwv", "red " * 5000
    (instances,) = run(model, image_input(0, query=[unknown, long, "red " * 20]))
    first, second, third = split_by_query(instances, 3)
    assert len(first) > 0
    assert same_scores(second, third)  # cut at MAX_WORDS = 20


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


def test_inference_called_directly_never_sees_old_queries(config):
    model = build(config())
    run(model, image_input(0, query="dog"))
    with torch.no_grad():
        plain = model.inference([image_input(0, query="dog")])[0]["instances"]
        assert not plain.has("query_index")
        with use_queries(model, [["dog", "cup"]]):
            asked = model.inference([image_input(0)])[0]["instances"]
            # A call of the model takes the queries of its own inputs, also in here.
            assert not run(model, image_input(0))[0].has("query_index")
            again = model.inference([image_input(0)])[0]["instances"]
        after = model.inference([image_input(0)])[0]["instances"]
    assert same_instances(asked, run(model, image_input(0, query=["dog", "cup"]))[0])
    assert same_instances(asked, again)
    assert not after.has("query_index")


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


def test_test_time_augmentation_takes_queries(config):
    cfg = config()
    cfg.TEST.AUG.MIN_SIZES = (96, 128)
    cfg.TEST.AUG.MAX_SIZE = 160
    model = build(cfg)
    augmented = GeneralizedRCNNWithTTA(cfg, model)
    numpy_input = {"image": image_input(0)["image"], "height": 96, "width": 128}
    with torch.no_grad():
        plain = augmented([dict(numpy_input)])[0]["instances"]
        with use_queries(model, "red cup", every_image=True):
            asked = augmented([dict(numpy_input)])[0]["instances"]
    assert len(plain) and len(asked)
    assert not torch.equal(plain.scores[: len(asked)], asked.scores[: len(plain)])


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
