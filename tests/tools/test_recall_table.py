"""Tests of the table over seeds."""

import json

import pytest
import torch
from detectron2.structures import Boxes, Instances

import recall_table
from vlnms_d2.evaluation import ProposalRecallEvaluator


def numbers(referent, context=50.0, proposals=8.0):
    return {"referent": referent, "context": context, "proposals": proposals, "best_iou": 0.5}


def group(detector, vlnms, cut):
    rows = {
        "detector": numbers(detector),
        "vlnms": numbers(vlnms),
        "misses_cut": {"referent": cut, "context": None},
    }
    matched = {
        "detector_matched": numbers(detector) | {"threshold": 0.1},
        "misses_cut_matched": {"referent": cut, "context": None},
    }
    return {
        "expressions": 10,
        "expressions_with_context": 5,
        "top": rows,
        "real": rows | matched,
    }


def results(dataset, detector, vlnms, cut, **changes):
    return {
        "version": 1,
        "dataset": dataset,
        "num_proposals": 100,
        "mean_proposals": 8.0,
        "iou_threshold": 0.5,
        "thresholds": {"detector": 0.5, "vlnms": 0.5},
        "thresholds_chosen_here": dataset.endswith("val"),
        "overall": group(detector, vlnms, cut),
        "by_manner": {"refcoco+": group(detector - 1, vlnms - 1, cut)},
    } | changes


@pytest.fixture
def write(tmp_path):
    def write_file(name, content):
        path = tmp_path / name
        path.write_text(json.dumps(content))
        return path

    return write_file


def cells(text, *starts):
    """The cells of the rows whose first cells are those given."""
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()]
    return [row for row in rows if row[0] == starts[0] and row[3:4] == list(starts[1:])]


def test_mean_and_deviation_over_seeds(write, capsys):
    files = [
        write("a.json", results("s_testB", 80.0, 90.0, 50.0)),
        write("b.json", results("s_testB", 82.0, 91.0, 48.0)),
        write("val.json", results("s_val", 81.0, 92.0, 60.0)),
    ]
    recall_table.main([str(path) for path in files])
    text = capsys.readouterr().out
    [row] = cells(text, "s_testB", "VL-NMS")
    assert row[1:3] == ["10", "2"]
    assert row[5] == row[8] == "90.50 ± 0.71"
    assert row[7] == "8.00 ± 0.00"
    [cut] = cells(text, "s_testB", "misses cut (%)")
    assert cut[8:] == ["49.00 ± 1.41", "-"]
    [matched] = cells(text, "s_testB", "detector (matched)*")
    assert matched[4:] == ["-", "-", "-", "8.00 ± 0.00", "81.00 ± 1.41", "50.00 ± 0.00"]
    [single] = cells(text, "s_val†", "VL-NMS")
    assert single[8] == "92.00"
    assert "chosen on this data set" in text
    assert "refcoco+" not in text


def test_by_manner(write, capsys):
    recall_table.main(["--by-manner", str(write("a.json", results("s_testA", 80.0, 90.0, 50.0)))])
    text = capsys.readouterr().out
    [row] = cells(text, "s_testA, refcoco+", "detector")
    assert row[8] == "79.00"
    assert "†" not in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean_proposals": 10.0}, "mean_proposals is 10.0, but 8.0"),
        ({"version": 2}, "expected version 1"),
        ({"overall": group(1, 1, 1) | {"expressions": 11}}, "other expressions"),
    ],
)
def test_files_that_are_not_seeds_of_one_experiment(write, capsys, changes, message):
    first = write("a.json", results("s", 80.0, 90.0, 50.0))
    second = write("b.json", results("s", 80.0, 90.0, 50.0, **changes))
    with pytest.raises(SystemExit):
        recall_table.main([str(first), str(second)])
    assert message in capsys.readouterr().err


def test_bad_files(tmp_path, write, capsys):
    (tmp_path / "broken.json").write_text("{")
    good = str(write("a.json", results("s", 80.0, 90.0, 50.0)))
    cases = [
        ([str(tmp_path / "broken.json")], "not a JSON file"),
        ([str(write("list.json", [1]))], "expected version 1"),
        ([str(tmp_path / "absent.json")], "absent.json"),
        ([good, good], "given twice"),
    ]
    for files, message in cases:
        with pytest.raises(SystemExit):
            recall_table.main(files)
        assert message in capsys.readouterr().err


def test_reads_what_the_evaluator_writes(tmp_path, capsys):
    instances = Instances((100, 100), pred_boxes=Boxes(torch.tensor([[0.0, 0, 9, 9]])))
    instances.scores, instances.query_index = torch.tensor([0.5]), torch.tensor([0])
    expression = {"sent_id": 1, "manner": "m", "referent_box": [0, 0, 9, 9], "context_boxes": []}
    image = {"image_id": 1, "query": ["words"], "expressions": [expression]}
    for seed in ("1", "2"):
        evaluator = ProposalRecallEvaluator("s", output_dir=str(tmp_path / seed))
        evaluator.process([image], [{"instances": instances, "detector": instances}])
        evaluator.evaluate()
    recall_table.main(["--by-manner", *map(str, sorted(tmp_path.glob("*/recall_s.json")))])
    text = capsys.readouterr().out
    for name in ("s†", "s†, m"):
        [row] = cells(text, name, "VL-NMS")
        assert row[1:] == ["1", "2", "VL-NMS", *["1.00 ± 0.00", "100.00 ± 0.00", "-"] * 2]
