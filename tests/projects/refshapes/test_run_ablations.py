"""Tests of the ablations: the runs with stand-ins for training, the table, and one real run."""

import fcntl
import importlib.util
import json
import multiprocessing
import os
import shlex
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import REPO

from ablations import runner
from ablations.runs import Run, check_settings, plan, settings
from ablations.table import markdown

_SPEC = importlib.util.spec_from_file_location("run_ablations", REPO / "tools" / "run_ablations.py")
run_ablations = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(run_ablations)

DATASETS = ("x_val", "x_testB")
MANNERS = ("refcoco", "refcocog")


def group(rng, detector):
    def numbers(referent):
        context, proposals, best_iou = rng.uniform([10, 1, 0], [90, 20, 1])
        numbers = {"context": context, "proposals": proposals, "best_iou": best_iou}
        return {"referent": referent, **numbers}

    points = {
        point: {
            "detector": dict.fromkeys(numbers(0), detector),
            "vlnms": numbers(rng.uniform(0, 50)),
        }
        for point in ("top", "real")
    }
    return {"expressions": 10, **points}


def results(dataset, seed, detector=0.6):
    rng = np.random.default_rng([seed, len(dataset)])
    return {
        "version": 1,
        "dataset": dataset,
        "num_proposals": 100,
        "mean_proposals": 8.0,
        "iou_threshold": 0.5,
        "thresholds": {"detector": 0.5, "vlnms": 0.5},
        "thresholds_chosen_here": dataset.endswith("val"),
        "overall": group(rng, detector),
        "by_manner": {manner: group(rng, detector) for manner in MANNERS},
    }


@pytest.fixture
def config_files(tmp_path):
    files = []
    for name in ("one", "two"):
        path = tmp_path / f"{name}.yaml"
        path.write_text(
            f"_BASE_: {REPO / 'configs/refshapes/vlnms_fc.yaml'}\n"
            f"MODEL: {{WEIGHTS: ''}}\nDATASETS: {{TEST: {list(DATASETS)}}}\n"
        )
        files.append(path)
    return files


@pytest.fixture
def main(tmp_path, config_files):
    """Runs the tool without timing; returns the exit status."""

    def run_main(*words, seeds=(0, 1)):
        words = ["--timing-images", 0, *words]
        configs = ["--configs", *config_files, "--seeds", *seeds]
        return run_ablations.main([str(w) for w in ("--out", tmp_path / "out", *configs, *words)])

    return run_main


@pytest.fixture
def training(monkeypatch, tmp_path):
    """A stand-in for train_net.py; returns the titles of the runs it was started for.

    `training.script[title]` is run in place of writing the results.
    """

    class Started(list):
        script = {}

    started = Started()

    def command(run: Run) -> list[str]:
        started.append(run.title)
        inference = run.folder / "inference"
        script = f"mkdir -p {inference}; echo threads $OMP_NUM_THREADS $MKL_NUM_THREADS"
        for name in DATASETS:
            text = shlex.quote(json.dumps(results(name, run.seed)))
            script += f"; echo {text} > {inference / f'recall_{name}.json'}"
        return ["sh", "-c", started.script.get(run.title, script)]

    monkeypatch.setattr(runner, "command", command)
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.01)
    return started


def test_runs_of_which_only_the_results_were_kept_are_done_but_not_measured(
    main, training, tmp_path, capsys
):
    assert main() == 0
    assert len(training) == 4
    kept = ("settings.json", "done.json", "inference")
    for folder in (tmp_path / "out").glob("*/seed*"):
        assert {path.name for path in folder.iterdir()} == {*kept, "run.log"}
    assert main("--timing-images", 3) == 0
    assert len(training) == 4 and "measuring" not in capsys.readouterr().out
    assert not list((tmp_path / "out").rglob("timing.json"))


# --- the plan --------------------------------------------------------------------------------


def test_the_default_configs_are_there():
    files = [REPO / "configs" / "refshapes" / f"{name}.yaml" for name in run_ablations.NAMES]
    assert len(files) == 15
    assert files[8].stem == "vlnms_fc_no_context"
    runs = plan(Path("out"), files, [0], [])
    assert [run.name for run in runs] == run_ablations.NAMES
    for run in runs:
        assert run.config_file.is_file()
        assert run.folder == Path("out") / run.name / "seed0"
        vlnms = run.cfg.MODEL.VLNMS
        assert vlnms.PSEUDO_GT.CONTEXT is not run.name.endswith("_no_context")
        assert (vlnms.REG_WEIGHT > 0) is not ("_no_refinement" in run.name)


def test_a_variant_without_context_is_its_config_with_one_override(config_files):
    path = config_files[0].with_stem("one_no_context")
    one, without = plan(Path("out"), [config_files[0], path], [0], [])
    assert without.config_file == one.config_file == config_files[0]
    assert (without.name, without.title) == ("one_no_context", "one_no_context seed 0")
    with_context = settings(one.cfg)
    changed = {k for k, value in settings(without.cfg).items() if value != with_context[k]}
    assert changed == {"MODEL.VLNMS.PSEUDO_GT.CONTEXT"}
    [overridden] = plan(Path("out"), [path], [0], ["MODEL.VLNMS.PSEUDO_GT.CONTEXT", "True"])
    assert overridden.cfg.MODEL.VLNMS.PSEUDO_GT.CONTEXT

    path.write_text(config_files[0].read_text())
    [from_file] = plan(Path("out"), [path], [0], [])
    assert from_file.config_file == path and from_file.cfg.MODEL.VLNMS.PSEUDO_GT.CONTEXT
    with pytest.raises(ValueError, match=r"no such config: gone_no_context\.yaml"):
        plan(Path("out"), [Path("gone_no_context.yaml")], [0], [])


def test_the_plan_goes_seed_by_seed(config_files):
    runs = plan(Path("out"), config_files, [0, 3], ["SOLVER.MAX_ITER", "7"])
    assert [run.title for run in runs] == ["one seed 0", "two seed 0", "one seed 3", "two seed 3"]
    cfg = runs[3].cfg
    assert (cfg.SEED, cfg.OUTPUT_DIR, cfg.SOLVER.MAX_ITER) == (3, "out/two/seed3", 7)
    assert (cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.VLNMS.CACHE_DIR) == ("CachedRCNN", "out/cache")
    script, *words = runner.command(runs[3])[3:7]
    assert script == str(runner.TRAIN_NET)
    assert words == ["--config-file", str(config_files[1]), "--resume"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--", "SOLVER.MAX_ITER"], "must be KEY VALUE pairs"),
        (["--", "SEED", "1"], "SEED cannot be overridden; use --seeds"),
        (["--", "NO.SUCH", "1"], "NO.SUCH"),
        (["--", "DATASETS.TEST", "()"], "DATASETS.TEST is empty"),
        (["--configs", "no.yaml"], "no such config: no.yaml"),
        (["--seeds", "1", "1"], "a seed is given twice"),
        (["--jobs", "0"], "at least 1"),
    ],
)
def test_command_lines_that_cannot_be(main, training, capsys, words, message):
    with pytest.raises(SystemExit) as exit_info:
        main(*words)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
    assert not training


def test_what_does_not_train_is_evaluated_once_with_the_weights_it_has(config_files, tmp_path):
    path = tmp_path / "category.yaml"
    path.write_text(f"_BASE_: {config_files[0]}\nMODEL: {{VLNMS: {{RELATEDNESS: Category}}}}\n")
    weights = ["MODEL.WEIGHTS", str(tmp_path / "detector.pth")]
    runs = plan(tmp_path / "out", [path, config_files[0]], [3, 5], weights)
    assert [run.title for run in runs] == ["category seed 3", "one seed 3", "one seed 5"]
    category, trained, _ = runs
    assert category.weights == tmp_path / "detector.pth"
    assert trained.weights == trained.folder / "model_final.pth"
    assert "--eval-only" in runner.command(category)
    assert "--resume" in runner.command(trained)


def test_two_configs_of_one_name(config_files):
    with pytest.raises(ValueError, match="same name"):
        plan(Path("out"), [config_files[0], config_files[0]], [0], [])


# --- settings --------------------------------------------------------------------------------


def test_settings_are_compared_with_those_of_the_start(config_files, tmp_path):
    def make(**overrides) -> Run:
        words = [str(word) for pair in overrides.items() for word in pair]
        return plan(tmp_path / "out", config_files[:1], [0], words)[0]

    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"some")
    run = make(**{"MODEL.WEIGHTS": weights})
    run.folder.mkdir(parents=True)
    check_settings(run)
    path = run.folder / "settings.json"
    path.write_text(json.dumps(settings(run.cfg)))
    check_settings(run)
    check_settings(make(**{"MODEL.WEIGHTS": weights, "MODEL.VLNMS.CACHE_DIR": "elsewhere"}))

    with pytest.raises(
        ValueError, match=r"SOLVER.MAX_ITER was \d+, is 7\); delete .*another --out"
    ):
        check_settings(make(**{"MODEL.WEIGHTS": weights, "SOLVER.MAX_ITER": 7}))

    known = json.loads(path.read_text())
    del known["MODEL.VLNMS.OUTPUT_ATTENTION"]  # a key that the code has learned since
    path.write_text(json.dumps(known))
    check_settings(run)
    with pytest.raises(ValueError, match="OUTPUT_ATTENTION was False, is True"):
        check_settings(make(**{"MODEL.WEIGHTS": weights, "MODEL.VLNMS.OUTPUT_ATTENTION": True}))

    other = tmp_path / "other.pth"
    other.write_bytes(b"some other")
    with pytest.raises(ValueError, match=r"MODEL.WEIGHTS was 'sha256 \w+', is 'sha256"):
        check_settings(make(**{"MODEL.WEIGHTS": other}))

    path.unlink()
    (run.folder / "last_checkpoint").touch()
    with pytest.raises(ValueError, match="was not started as one of these"):
        check_settings(run)


def test_pseudo_ground_truth_is_compared_by_its_content(config_files, tmp_path):
    def digest(folder: str) -> str:
        words = ["MODEL.VLNMS.PSEUDO_GT.DIR", str(tmp_path / folder)]
        [run] = plan(tmp_path / "out", config_files[:1], [0], words)
        return settings(run.cfg)["MODEL.VLNMS.PSEUDO_GT.DIR"]

    [run] = plan(tmp_path / "out", config_files[:1], [0], [])
    for folder, content in (("one", "same"), ("two", "same"), ("three", "other")):
        for name in run.cfg.DATASETS.TRAIN:
            path = tmp_path / folder / name / "pseudo_gt.json"
            path.parent.mkdir(parents=True)
            path.write_text(content)
    assert digest("one") == digest("two") != digest("three")
    assert digest("none") == str(tmp_path / "none")


def test_a_finished_run_with_other_settings_is_an_error(main, training, capsys):
    assert main(seeds=[0]) == 0
    training.clear()
    for more in ([], ["--table-only"]):
        with pytest.raises(SystemExit):
            main(*more, "SOLVER.MAX_ITER", "3", seeds=[0])
        assert "SOLVER.MAX_ITER was 1000, is 3" in capsys.readouterr().err
    assert not training


# --- runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("jobs", [1, 3])
def test_what_is_done_is_skipped(main, training, tmp_path, jobs, monkeypatch, capsys):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert main("--jobs", jobs) == 0
    assert training == ["one seed 0", "two seed 0", "one seed 1", "two seed 1"]
    threads = 8 // jobs
    for run in ("one/seed0", "two/seed1"):
        log = (tmp_path / "out" / run / "run.log").read_text()
        assert log == f"threads {threads} {threads}\n"
    assert "4 runs are done" in capsys.readouterr().out

    training.clear()
    assert main("--jobs", jobs) == 0
    assert not training
    (tmp_path / "out/two/seed0/inference/recall_x_testB.json").unlink()
    (tmp_path / "out/one/seed1/done.json").unlink()
    assert main("--jobs", jobs) == 0
    assert training == ["two seed 0", "one seed 1"]


def test_a_failed_run_is_reported_and_the_others_go_on(main, training, tmp_path, capsys):
    training.script["one seed 0"] = "echo first; echo the reason >&2; exit 3"
    training.script["one seed 1"] = "true"
    assert main() == 1
    assert len(training) == 4
    output = capsys.readouterr().out
    assert "one seed 0 FAILED" in output
    assert "exit status 3; its log ends:\n    first\n    the reason\n" in output
    assert "ended without writing" in output
    table = json.loads((tmp_path / "out/table.json").read_text())
    assert list(table["seconds"]) == ["two"]

    training.script.clear()
    training.clear()
    assert main() == 0
    assert training == ["one seed 0", "one seed 1"]


def test_a_run_that_another_process_works_on_is_left_out(main, training, tmp_path, capsys):
    folder = tmp_path / "out/one/seed0"
    folder.mkdir(parents=True)
    with (folder / "run.log").open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert main(seeds=[0]) == 1
    assert training == ["two seed 0"]
    assert "one seed 0 LEFT OUT: another process" in capsys.readouterr().out


def is_gone(process_group: int) -> bool:
    """Whether the processes, which have been told to end, do."""
    for _ in range(600):
        try:
            os.killpg(process_group, 0)
        except ProcessLookupError:
            return True
        threading.Event().wait(0.1)
    return False


def start_a_run(folder: Path, pipe: Path) -> None:
    script = f"exec > {pipe}; echo begun; exec sleep 600"
    runner.command = lambda run: ["sh", "-c", script]
    runner.settings = lambda cfg: {}
    runner.Session(SimpleNamespace(folder=folder, digest=lambda: "", cfg=None), 1)
    time.sleep(600)


def test_a_run_ends_with_a_parent_that_is_killed(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=start_a_run, args=(tmp_path, pipe))
    process.start()
    with open(pipe) as lines:
        first = lines.readline()
        process.kill()
        rest = lines.read()  # to the end of the pipe: no process has it open any more
    process.join()
    assert first + rest == "begun\n"


def test_an_interrupt_leaves_no_process_behind(main, training, tmp_path, monkeypatch):
    folders = [tmp_path / "out" / name / "seed0" for name in ("one", "two")]
    for name in ("one", "two"):
        training.script[f"{name} seed 0"] = "echo $$; sleep 60 & wait"

    def sleep(seconds):
        if all((f / "run.log").read_text().endswith("\n") for f in folders):
            raise KeyboardInterrupt

    monkeypatch.setattr(runner.time, "sleep", sleep)
    assert main("--jobs", 2) == 130
    assert len(training) == 2
    for folder in folders:
        assert is_gone(int((folder / "run.log").read_text()))
        assert not (folder / "done.json").exists()


def test_nothing_done_gives_no_table(main, training, tmp_path, capsys):
    assert main("--table-only") == 0
    assert "no table" in capsys.readouterr().out
    assert not (tmp_path / "out/table.md").exists()


# --- the table -------------------------------------------------------------------------------


def rows_of(text, heading):
    """The table under a heading: first cell -> {column: cell}."""
    section = text.partition(f"## {heading}")[2].partition("\n## ")[0]
    lines = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line] for line in lines]
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def shown(values, digits=2):
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def timing(**changes):
    known = {"detector_ms": 50.0, "one_query_ms": 60.0, "all_queries_ms": 81.26}
    machine = {"device": "cpu", "cpu": "A CPU", "threads": 2}
    machine |= {"python": "3", "torch": "2", "detectron2": "0.6"}
    about = {"queries_per_image": 9.2, "images": 30, "dataset": "x_testB", "machine": machine}
    return known | about | changes


def test_the_numbers_of_the_table(main, training, tmp_path):
    assert main(seeds=[0, 1, 2]) == 0
    (tmp_path / "out/one/timing.json").write_text(json.dumps(timing()))
    assert main("--table-only", "--table", tmp_path / "docs/ablations", seeds=[0, 1, 2]) == 0
    text = (tmp_path / "docs/ablations.md").read_text()
    table = json.loads((tmp_path / "docs/ablations.json").read_text())

    for dataset, heading in (("x_val", "x_val† (10"), ("x_testB", "x_testB (10")):
        seeds = [results(dataset, seed) for seed in (0, 1, 2)]
        rows = rows_of(text, heading)
        assert list(rows) == ["detector", "one", "two"]
        assert rows["detector"]["seeds"] == "-"
        assert rows["two"]["seeds"] == "3"
        for point, label in (("real", "real"), ("top", "N=100")):
            for key, column, digits in (
                ("referent", "referent", 2),
                ("context", "context", 2),
                ("proposals", "proposals", 2),
                ("best_iou", "IoU", 3),
            ):
                values = [seed["overall"][point]["vlnms"][key] for seed in seeds]
                number = table["datasets"][dataset]["rows"]["one"]["overall"][point][key]
                assert number["mean"] == pytest.approx(np.mean(values))
                assert number["std"] == pytest.approx(np.std(values, ddof=1))
                assert list(number["per_seed"].values()) == values
                if point == "real" or column in ("referent", "context"):
                    assert rows["one"][f"{label}: {column}"] == shown(values, digits)
                    assert rows["detector"][f"{label}: {column}"] == f"{0.6:.{digits}f}"

    rows = rows_of(text, "x_testB by style")
    for manner in MANNERS:
        for column in ("proposals", "referent", "context"):
            values = [
                results("x_testB", seed)["by_manner"][manner]["real"]["vlnms"][column]
                for seed in (0, 1, 2)
            ]
            assert rows["two"][f"{manner}: {column}"] == shown(values)

    val, test = rows_of(text, "x_val† (10"), rows_of(text, "x_testB (10")
    assert val["one"]["extra time: 1 query"] == "10.0 ms (20.0%)"
    assert val["one"]["extra time: all queries"] == "31.3 ms (62.5%)"
    assert val["two"]["extra time: 1 query"] == "-"
    assert "extra time: 1 query" not in test["one"]
    assert table["timing"] == {"one": timing()}
    assert "A CPU (cpu, threads: 2)" in text
    assert "†: the thresholds" in text
    assert "Warning" not in text
    assert table["command"].startswith("python tools/run_ablations.py --out ")
    assert table["command"] in text


def test_a_table_with_a_missing_seed(main, training, tmp_path):
    training.script["one seed 0"] = training.script["two seed 1"] = "exit 1"
    assert main() == 1
    rows = rows_of((tmp_path / "out/table.md").read_text(), "x_val†")
    assert list(rows) == ["detector", "one", "two"]
    referent = results("x_val", 1)["overall"]["real"]["vlnms"]["referent"]
    assert rows["one"]["seeds"] == "1"
    assert rows["one"]["real: referent"] == f"{referent:.2f}"


def test_warnings_about_what_must_be_the_same(main, training, tmp_path, capsys):
    assert main() == 0
    machine = timing()["machine"] | {"threads": 1}
    (tmp_path / "out/one/timing.json").write_text(json.dumps(timing()))
    (tmp_path / "out/two/timing.json").write_text(json.dumps(timing(machine=machine)))
    path = tmp_path / "out/two/seed1/inference/recall_x_testB.json"
    path.write_text(json.dumps(results("x_testB", 1, detector=0.604)))
    assert main("--table-only") == 0
    assert "the detector differs" not in capsys.readouterr().out
    path.write_text(json.dumps(results("x_testB", 1, detector=0.7)))
    assert main("--table-only") == 0
    output, text = capsys.readouterr().out, (tmp_path / "out/table.md").read_text()
    for warning in (
        "detector differs: real: referent on x_testB is 0.7 in two seed 1, but 0.6 in one seed 0",
        "not all measured with the same machine",
    ):
        assert warning in output
        assert warning in text


@pytest.mark.parametrize("name", ["ablations", "pseudo_gt", "refinement"])
def test_the_tables_of_the_docs_follow_from_their_json(name):
    stem = REPO / "docs" / "results" / f"refshapes_{name}"
    summary = json.loads(stem.with_suffix(".json").read_text())
    # The keys of the JSON file are sorted, so it does not have the order of data sets and rows.
    order = ("refshapes_val", "refshapes_testA", "refshapes_testB")
    summary["datasets"] = {dataset: summary["datasets"][dataset] for dataset in order}
    again = markdown(summary)
    assert sorted(again.splitlines()) == sorted(stem.with_suffix(".md").read_text().splitlines())


# --- the real thing --------------------------------------------------------------------------


TRAIN_TINY = """
import runpy, sys
from vlnms_d2.data import register_refshapes
register_refshapes({root!r}, name="tiny")
sys.path.insert(0, {tools!r})
runpy.run_path({tools!r} + "/train_net.py", run_name="__main__")
"""


def test_a_real_run_whose_evaluation_was_cut_off(tiny_refshapes, tmp_path, monkeypatch):
    script, root = tmp_path / "train_tiny.py", os.environ["TINY_REFSHAPES"]
    script.write_text(TRAIN_TINY.format(root=root, tools=str(REPO / "tools")))
    monkeypatch.setattr(runner, "TRAIN_NET", script)
    config_file = tmp_path / "small.yaml"
    config_file.write_text(
        f"""
        _BASE_: {REPO / "configs/refshapes/vlnms_fc.yaml"}
        MODEL:
          WEIGHTS: ""
          RESNETS: {{STEM_OUT_CHANNELS: 8, RES2_OUT_CHANNELS: 16, WIDTH_PER_GROUP: 8}}
          FPN: {{OUT_CHANNELS: 16}}
          RPN: {{POST_NMS_TOPK_TRAIN: 60, POST_NMS_TOPK_TEST: 60}}
          ROI_BOX_HEAD: {{FC_DIM: 32}}
          VLNMS: {{FC: {{HIDDEN_DIM: 32}}, BIGRU: {{HIDDEN_DIM: 8}}, MAX_CANDIDATES: 60}}
        INPUT: {{MIN_SIZE_TRAIN: [96], MIN_SIZE_TEST: 96}}
        DATASETS:
          TRAIN: ["{tiny_refshapes}_train"]
          TEST: ["{tiny_refshapes}_val", "{tiny_refshapes}_testB"]
        SOLVER: {{IMS_PER_BATCH: 2}}
        """
    )
    out = tmp_path / "out"
    words = ["--out", str(out), "--configs", str(config_file), "--seeds", "4"]
    words += ["--timing-images", "2", "SOLVER.MAX_ITER", "2"]
    assert run_ablations.main(words) == 0
    folder = out / "small/seed4"
    files = [folder / "inference" / f"recall_{tiny_refshapes}_{s}.json" for s in ("val", "testB")]
    before = [path.read_text() for path in files]
    measured = json.loads((out / "small/timing.json").read_text())
    assert measured["images"] == 2
    assert measured["machine"]["python"] == sys.version.split()[0]
    assert measured["detector_ms"] > 0 and measured["all_queries_ms"] > 0

    files[1].unlink()
    final = (folder / "model_final.pth").stat().st_mtime_ns
    timed = (out / "small/timing.json").stat().st_mtime_ns
    assert run_ablations.main(words) == 0
    assert [path.read_text() for path in files] == before
    assert (folder / "model_final.pth").stat().st_mtime_ns == final  # not trained again
    assert (out / "small/timing.json").stat().st_mtime_ns == timed  # not measured again
    assert "extra time: 1 query" in (out / "table.md").read_text()
