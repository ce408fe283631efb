"""Weights and configs run no code, and unsuitable weights are refused before any answer."""

import pickle
import re
from collections import OrderedDict

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from small_models import build, image_input

from vlnms_d2 import VLNMSPredictor
from vlnms_d2.config import load_config
from vlnms_d2.engine.checkpoint import SafeCheckpointer


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture
def case(config, tmp_path):
    """`case(change)`: a config whose weights `change` has changed in place."""

    def make(change=lambda weights: None, name="weights.pth", relatedness="FC", saved=None):
        cfg = config(relatedness=relatedness)
        if relatedness == "Category":
            cfg.MODEL.VLNMS.CATEGORY.NAMES = ("cup", "dog", "cat", "chair", "ball")
        weights = (saved or build(cfg)).state_dict()
        change(weights)
        torch.save({"model": weights}, tmp_path / name)
        cfg.MODEL.WEIGHTS = str(tmp_path / name)
        return cfg

    return make


def keep(wanted):
    def change(weights):
        for key in [key for key in weights if not wanted(key)]:
            del weights[key]

    return change


def fill(part, value):
    def change(weights):
        key = next(key for key in weights if part in key and weights[key].is_floating_point())
        weights[key].view(-1)[0] = value

    return change


def cut(weights):
    key = next(key for key in weights if key.endswith("relatedness.mlp_b.0.weight") or "mlp" in key)
    weights[key] = weights[key][:-1]


UNSUITABLE = {
    "detector only": (keep(lambda key: ".vlnms." not in key), r"lacks \d+ .*train the relatedness"),
    "branch only": (keep(lambda key: ".vlnms." in key), r"lacks \d+ .*whole model\. "),
    "foreign": (lambda weights: weights.update(x=weights.clear() or torch.ones(1)), r"lacks \d+"),
    "one is missing": (keep(lambda key: "mlp" not in key or "bias" not in key), r"lacks \d+ "),
    "cut": (cut, r"has the shape \["),
    "NaN": (fill(".vlnms.", float("nan")), "NaN or infinite"),
    "inf": (fill("backbone", float("inf")), "NaN or infinite"),
}


@pytest.mark.parametrize("what", UNSUITABLE)
def test_unsuitable_weights_are_refused_and_the_flag_allows_them(case, what):
    change, message = UNSUITABLE[what]
    cfg = case(change)
    with pytest.raises(ValueError, match=message) as error:
        VLNMSPredictor(cfg)
    assert "weights.pth" in str(error.value) and "CHECK_WEIGHTS False" in str(error.value)
    cfg.MODEL.VLNMS.CHECK_WEIGHTS = False
    VLNMSPredictor(cfg)


def test_no_weights_at_all(config):
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS, which is empty,: lacks"):
        VLNMSPredictor(config())


def test_a_detector_suffices_where_nothing_is_learned(case):
    VLNMSPredictor(case(keep(lambda key: ".vlnms." not in key), relatedness="Category"))


def test_what_is_no_weights_file(case, tmp_path):
    cfg = case()
    whole = (tmp_path / "weights.pth").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"text", pickle.dumps([1])):
        (tmp_path / "weights.pth").write_bytes(content)
        with pytest.raises(ValueError, match=r"weights\.pth"):
            VLNMSPredictor(cfg)


@pytest.mark.parametrize("suffix", ["pth", "pkl", "pyth"])
def test_weights_run_no_code(case, tmp_path, suffix):
    cfg = case()
    cfg.MODEL.WEIGHTS = str(tmp_path / f"bad.{suffix}")
    for protocol in (0, 2, 5):
        (tmp_path / f"bad.{suffix}").write_bytes(
            pickle.dumps({"model": Payload(tmp_path / "ran"), "__author__": "x"}, protocol)
        )
        with pytest.raises(ValueError, match=rf"bad\.{suffix}"):
            VLNMSPredictor(cfg)
        # Also the trainer, where `last_checkpoint` names the file.
        (tmp_path / "last_checkpoint").write_text(f"bad.{suffix}")
        checkpointer = SafeCheckpointer(build_model(cfg), str(tmp_path))
        with pytest.raises((ValueError, pickle.UnpicklingError)):
            checkpointer.resume_or_load("", resume=True)
        assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_files_of_the_model_zoo_load(config, tmp_path, protocol):
    """They are dictionaries of NumPy arrays, with or without an author."""
    cfg = config()
    source = build(cfg)
    arrays = OrderedDict((key, value.numpy()) for key, value in source.state_dict().items())
    content = {"model": arrays, "__author__": "Detectron2 Model Zoo", "scale": np.float32(1)}
    (tmp_path / "zoo.pkl").write_bytes(pickle.dumps(content, protocol))
    cfg.MODEL.WEIGHTS = str(tmp_path / "zoo.pkl")
    loaded = VLNMSPredictor(cfg).model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in source.state_dict().items())
    bare = dict(arrays) | {"x_momentum": np.zeros(2)}
    (tmp_path / "bare.pkl").write_bytes(pickle.dumps({"blobs": bare}, protocol))
    read = SafeCheckpointer(source)._load_file(str(tmp_path / "bare.pkl"))
    assert read["matching_heuristics"] and read["model"].keys() == arrays.keys()


def test_the_weights_answer_as_before(case):
    source = build(case())
    predictor = VLNMSPredictor(case(saved=source))
    with torch.no_grad():
        [a], [b] = (model([image_input(query="red cup")]) for model in (source, predictor.model))
    assert torch.equal(a["instances"].scores, b["instances"].scores)


# --- configs -----------------------------------------------------------------------------------

TAGS = [
    "!!python/object/apply:builtins.open [{ran}, w]",
    "!!python/object/new:builtins.open [{ran}, w]",
    "!!python/name:os.system",
    "!!python/tuple [1, 2]",
]


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("base", [False, True])
def test_configs_run_no_code(tmp_path, tag, base):
    tag = tag.format(ran=tmp_path / "ran")
    (tmp_path / "bad.yaml").write_text(f"MODEL:\n  WEIGHTS: {tag}\n")
    (tmp_path / "outer.yaml").write_text("_BASE_: bad.yaml\n")
    with pytest.raises(ValueError, match=r"bad\.yaml: .*line 2.* Tags such as !!python") as error:
        load_config(tmp_path / ("outer.yaml" if base else "bad.yaml"))
    assert not (tmp_path / "ran").exists() and len(str(error.value)) < 600
    (tmp_path / "good.yaml").write_text("VERSION: 2\n")
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS is .*tags are not allowed"):
        load_config(tmp_path / "good.yaml", ["MODEL.WEIGHTS", tag])


@pytest.mark.parametrize(
    "text",
    ["", "null", "- MODEL", "3", "text", "[" * 5000, "_BASE_: bad.yaml", "_BASE_: 3",
     "_BASE_: null", "SEED: " + "9" * 5000, "a: b: c", "\x00", "MODEL: [" * 2000, "_BASE_: [[1]]"],
)  # fmt: skip
@pytest.mark.parametrize("base", [False, True])
def test_what_is_no_config_is_told_with_the_name_of_the_file(tmp_path, text, base):
    (tmp_path / "bad.yaml").write_text(text)
    (tmp_path / "outer.yaml").write_text("_BASE_: bad.yaml\n")
    with pytest.raises(ValueError) as error:
        load_config(tmp_path / ("outer.yaml" if base else "bad.yaml"))
    assert re.search(r"bad\.yaml: ", str(error.value)) and len(str(error.value)) < 600


@pytest.mark.parametrize("value", ["[" * 5000, "9" * 5000, "(" * 200 + ")" * 200])
def test_overrides_that_are_too_deep_or_long(tmp_path, value):
    (tmp_path / "good.yaml").write_text("VERSION: 2\n")
    with pytest.raises(ValueError) as error:
        load_config(tmp_path / "good.yaml", ["SEED", value])
    assert "SEED" in str(error.value) and len(str(error.value)) < 600
