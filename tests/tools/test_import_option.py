"""`--import`: data sets and components of a file outside the repository, in every tool."""

import json
import os
import sys
from pathlib import Path

import dataset_folders
import exported
import pytest
from bad_input import run_tool
from conftest import REPO

from benchmarks.base import in_fresh_process

TOOLS = [
    "benchmark",
    "calibrate_words",
    "demo",
    "export_pairs",
    "export_proposals",
    "extract_second_stage",
    "prepare_data",
    "rerank",
    "run_ablations",
    "score_pairs",
    "second_stage_masks",
    "train_net",
    "train_second_stage",
    "train_tagger",
]
OWN = """
from pathlib import Path

from vlnms_d2 import RELATEDNESS_REGISTRY
from vlnms_d2.data import register_refer
from vlnms_d2.modeling.relatedness import FC

ROOT = Path(__file__).parent / "datasets"
register_refer(ROOT / "refer" / "refcoco", "own", image_root=ROOT / "coco" / "train2014")


@RELATEDNESS_REGISTRY.register()
class OwnFC(FC):
    pass
"""


def run(tool, *words, check=True, cwd=REPO):
    """Run a tool in a process of its own; returns its standard error."""
    status, error = in_fresh_process(run_in, cwd, tool, words)
    assert (status == 0) == check, error
    return error


def run_in(cwd, tool, words):
    # Without the folders that pytest adds, and the current one, which a script does not search.
    added = [REPO / name for name in ("tools", "projects", "tests")]
    sys.path[:] = [p for p in sys.path if p and not any(map(Path(p).is_relative_to, added))]
    sys.path.insert(0, str(REPO / "tools"))
    os.chdir(cwd)
    os.environ.pop("VLNMS_D2_IMPORT", None)
    return run_tool(tool, words)


@pytest.fixture
def own(tmp_path):
    """A file that describes a data set and a relatedness module."""
    dataset_folders.make_refer_folder(tmp_path / "datasets")
    path = tmp_path / "own_things.py"
    path.write_text(OWN)
    return path


def test_an_own_data_set_is_prepared_trained_evaluated_and_exported(own, config, tmp_path):
    (tmp_path / "glove.txt").write_text("cup 1 0\ndog 0 1\n")
    vectors = ["--word-vectors", tmp_path / "glove.txt", "--gamma", "0.4", "--vocab-min-count", "1"]
    prepared = tmp_path / "prepared"
    imported = ["--import", own]
    run("prepare_data", *imported, "--datasets", "own_train", "--out", prepared, *vectors)
    assert (prepared / "own_train" / "pseudo_gt.json").is_file()
    cfg = config()
    file = exported.save_model(cfg, tmp_path).config_file
    opts = ["MODEL.VLNMS.RELATEDNESS", "OwnFC", "DATALOADER.NUM_WORKERS", "0"]
    lists = ["DATASETS.TRAIN", "('own_train',)", "DATASETS.TEST", "('own_val',)"]
    sizes = ["INPUT.MIN_SIZE_TRAIN", "(60,)", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "2"]
    folders = ["OUTPUT_DIR", tmp_path / "output", "MODEL.VLNMS.PSEUDO_GT.DIR", prepared]
    # By its name, as the file is in the current folder.
    words = ["--import", "own_things", "--config-file", file, "--num-gpus", "0"]
    run("train_net", *words, *opts, *lists, *sizes, *folders, cwd=tmp_path)
    assert list((tmp_path / "output").rglob("recall_own_val.json"))
    trained = ["MODEL.WEIGHTS", tmp_path / "output" / "model_final.pth"]
    words = ["--config-file", file, "--dataset", "own_val", "own_testA", "--block-size", "1"]
    out = ["--processes", "2", "--num-gpus", "0", "--out", tmp_path / "exported", "--opts"]
    run("export_proposals", *imported, *words, *out, *opts, *trained)
    lines = (tmp_path / "exported" / "proposals.jsonl").read_text().splitlines()
    assert len(lines) == 4 and all(json.loads(line)["proposals"] for line in lines)
    status, error = run_tool("export_proposals", [*words, *out, *opts, *trained])
    assert status and "'own_val' is no registered data set" in error and "--import" in error


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_that_reads_data_sets_or_builds_models_has_it(tool):
    words = ["rec"] if tool == "train_second_stage" else []
    error = run(tool, *words, "--import", "nothing.py", check=False)
    assert error.splitlines()[-1].endswith(
        "--import nothing.py: no such file, expected a Python file or a module"
    )


def test_a_file_with_the_name_of_another_module_is_not_taken_for_it(tmp_path):
    (tmp_path / "json.py").write_text("")
    error = run("prepare_data", "--import", tmp_path / "json.py", "--datasets", "x", check=False)
    assert "json.py: " in error and "has the same name; give your file another one" in error


def test_a_module_that_does_not_exist_is_named():
    error = run("train_net", "--import", "no_module_of_this.name", check=False)
    assert "--import no_module_of_this.name: no such module" in error
