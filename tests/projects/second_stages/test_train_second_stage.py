"""The second stages' tools, from a data set to the table, with a model of random weights."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from conftest import REPO
from detectron2.data import DatasetCatalog, MetadataCatalog
from small_models import build

from second_stages import rec_training, retrieval, table
from second_stages.optimisation import Schedule
from second_stages.store import load_regions, regions_file
from vlnms_d2.data import register_flickr30k_entities
from vlnms_d2.data.datasets.refshapes import SPLITS

ONE_EPOCH = Schedule(epochs=1, images_per_batch=3, lr=1e-3)
CAPTIONS = "tiny_entities"


def tool(name: str):
    spec = importlib.util.spec_from_file_location(name, REPO / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


captions_tool, extract_tool = tool("make_refshapes_captions"), tool("extract_second_stage")
train_tool, masks_tool = tool("train_second_stage"), tool("second_stage_masks")
table_tool = tool("second_stage_table")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(rec_training.train_matcher, "__defaults__", (ONE_EPOCH,))
    monkeypatch.setattr(retrieval.train_cross_attention, "__defaults__", (ONE_EPOCH,))


@pytest.fixture
def config_file(config, tmp_path) -> Path:
    cfg = config()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 16
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    torch.save({"model": build(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
    path = tmp_path / "model.yaml"
    path.write_text(cfg.dump())
    return path


@pytest.fixture
def captions(tiny_refshapes, tmp_path):
    root = Path(DatasetCatalog.get(f"{tiny_refshapes}_val")[0]["file_name"]).parents[1]
    out = tmp_path / "entities"
    captions_tool.main(["--refshapes", str(root), "--out", str(out)])
    register_flickr30k_entities(out, CAPTIONS, image_root=out / "images", splits=SPLITS)
    yield
    for name in [name for name in DatasetCatalog.list() if name.startswith(CAPTIONS)]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_from_images_to_tables(quick, config_file, captions, tiny_refshapes, tmp_path, capsys):
    cache, train, val = tmp_path / "cache", f"{tiny_refshapes}_train", f"{tiny_refshapes}_val"
    phrases, sentences = f"{CAPTIONS}_val", f"{CAPTIONS}_captions_val"

    def extract(*options):
        own = ["--proposals", f"vlnms_fc={config_file}", "--out", str(cache)]
        extract_tool.main([*options, *own])

    extract("--what", "gt", "--datasets", train)
    extract("--what", "gt", "detector", "vlnms_fc", "--floor", "0", "--datasets", val)
    extract("--what", "vlnms_fc", "--floor", "0", "--datasets", phrases)
    extract("--what", "vlnms_fc", "--top", "4", "--datasets", sentences)
    pairs = load_regions(regions_file(cache, sentences, "vlnms_fc"))
    num_captions = sum(len(one["expressions"]) for one in DatasetCatalog.get(sentences))
    assert {tuple(one.kept.shape) for one in pairs.values()} == {(num_captions, 4)}

    sources = ["--sources", "gt", "detector", "vlnms_fc", "--cache", str(cache)]
    same = ["--same-images", f"{CAPTIONS}_captions_train={train}"]
    same += [f"{phrases}={val}", f"{sentences}={val}"]
    for seed in ("0", "1"):
        out = ["--seed", seed, "--out", str(tmp_path / f"seed{seed}"), *sources, *same]
        rec = ["rec", "--train", train, "--test", val, "--phrases", phrases]
        train_tool.main([*rec, "--mean-proposals", "3", *out])
        retrieval = ["retrieval", "--train", f"{CAPTIONS}_captions_train", "--test", sentences]
        train_tool.main([*retrieval, "--num-boxes", "4", *out])
    first = (tmp_path / "seed0" / "gt" / f"choices_{val}.json").read_text()
    rec = ["rec", "--train", train, "--test", val, "--sources", "gt", "--cache", str(cache)]
    train_tool.main([*rec, "--seed", "0", "--out", str(tmp_path / "seed0"), "--eval-only"])
    assert (tmp_path / "seed0" / "gt" / f"choices_{val}.json").read_text() == first

    runs = [str(tmp_path / f"seed{k}" / name) for k in (0, 1) for name in ("gt", "detector")]
    masks_tool.main(["--config-file", str(config_file), "--datasets", val, "--runs", *runs])

    folders = [str(tmp_path / "seed0"), str(tmp_path / "seed1")]
    table_tool.main(["--runs", *folders, "--out", str(tmp_path / "docs" / "table")])
    text = (tmp_path / "docs" / "table.md").read_text()
    for heading in (f"expressions, {val}†", f"grounding, {phrases}†", f"Retrieval, {sentences}"):
        assert heading in text
    results = json.loads((tmp_path / "docs" / "table.json").read_text())
    accuracies = [
        json.loads((tmp_path / f"seed{k}" / "gt" / f"rec_{val}.json").read_text()) for k in (0, 1)
    ]
    found = results["rec"][val]["gt"]
    assert [found["seed0"], found["seed1"]] == accuracies
    # The JSON has the content of every result file, and the tables follow from it.
    for path in (tmp_path / "seed0" / "gt").iterdir():
        kind = next((kind for kind in table.KINDS if path.name.startswith(f"{kind}_")), None)
        if kind is not None:
            dataset = path.stem.removeprefix(f"{kind}_")
            assert results[kind][dataset]["gt"]["seed0"] == json.loads(path.read_text())
    assert text.startswith("\n\n".join(table.parts(results)))


@pytest.mark.parametrize(
    "name", ["second_stages", "retrieval_own", "retrieval_top5", "rec_pseudo_gt"]
)
def test_the_tables_of_the_docs_follow_from_their_json(name):
    stem = REPO / "docs" / "results" / f"refshapes_{name}"
    results = json.loads(stem.with_suffix(".json").read_text())
    text = stem.with_suffix(".md").read_text()
    assert text.startswith("\n\n".join(table.parts(results)))


def test_retrieval_learns_from_the_boxes_it_is_tested_on(
    quick, config_file, captions, tiny_refshapes, tmp_path
):
    cache, sentences = tmp_path / "cache", f"{CAPTIONS}_captions_train"
    own = ["--proposals", f"vlnms_fc={config_file}", "--out", str(cache), "--top", "4"]
    what = ["--what", "detector", "vlnms_fc", "--datasets", sentences]
    extract_tool.main([*what, *own, "--group", "2"])
    dicts = DatasetCatalog.get(sentences)
    pairs = load_regions(regions_file(cache, sentences, "vlnms_fc"))
    for start in range(0, len(dicts), 2):
        group = dicts[start : start + 2]
        asked = [e["sent_id"] for one in group for e in one["expressions"]]
        for one in group:
            assert pairs[one["image_id"]].sent_ids.tolist() == asked
            assert len(pairs[one["image_id"]].kept) == len(asked)

    extract_tool.main([*what, *own, "--overwrite"])  # a test asks all of them
    out = ["--out", str(tmp_path / "out"), "--cache", str(cache), "--num-boxes", "4"]
    out += ["--train", sentences, "--test", sentences, "--sources", "detector", "vlnms_fc"]
    train_tool.main(["retrieval", "--train-boxes", "own", *out])
    weights = [
        torch.load(tmp_path / "out" / source / "retrieval.pth", weights_only=True)
        for source in ("detector", "vlnms_fc")
    ]
    assert not torch.equal(*(one["project.weight"] for one in weights))
    result = tmp_path / "out" / "vlnms_fc" / f"retrieval_{sentences}.json"
    first = result.read_text()
    train_tool.main(["retrieval", "--train-boxes", "own", "--eval-only", *out])
    assert result.read_text() == first


def test_gains_are_of_the_same_seeds():
    of_seeds = {"seed0": 50.0, "seed1": 60.0, "seed2": 90.0}
    base = {"seed1": 40.0, "seed0": 40.0}
    assert table.gain(of_seeds, base) == "+15.00 ± 7.07"
    assert table.gain(base, of_seeds) == "-15.00 ± 7.07"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--what", "other"], "--what other: expected gt, detector or a name"),
        (["--what", "gt", "--proposals", "model.yaml"], "expected NAME=CONFIG"),
        (["--what", "gt", "--proposals", "gt=model.yaml"], "expected NAME=CONFIG"),
        (["--what", "gt", "--group", "2"], "--group 2: expected a positive number, and --top N"),
        (["--what", "gt", "--top", "2", "--group", "0"], "--group 0: expected a positive number"),
    ],
)
def test_extract_says_what_is_wrong(options, message, config_file, tmp_path, capsys):
    with pytest.raises(SystemExit):
        extract_tool.main(
            ["--datasets", "x", "--out", str(tmp_path), "--proposals", f"a={config_file}", *options]
        )
    assert message in capsys.readouterr().err


def test_the_other_tools_say_what_is_wrong(tiny_refshapes, tmp_path, capsys):
    val = f"{tiny_refshapes}_val"
    run = ["rec", "--train", val, "--test", val, "--sources", "gt", "--cache", str(tmp_path)]
    for options, message in (
        ([], "gt.pt: no such file"),
        (["--same-images", val], f"--same-images {val}: expected NAME=OTHER"),
    ):
        with pytest.raises(SystemExit):
            train_tool.main([*run, "--out", str(tmp_path / "out"), *options])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        table_tool.main(["--runs", str(tmp_path), "--out", str(tmp_path / "table")])
    assert "no results there" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        captions_tool.main(["--refshapes", str(tmp_path), "--out", str(tmp_path / "new")])
    assert "instances.json: no such file" in capsys.readouterr().err
