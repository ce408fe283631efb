"""Tests of what the tables over seeds share."""

import json

import pytest

from ablations.seeds import (
    check_comparable,
    format_mean,
    mean_and_deviation,
    read_results,
)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([None, 1.0, 3.0], "2.00 ± 1.41"),
        ([1.0], "1.00"),
        ([None, 1.0], "1.00"),
        ([None], "-"),
    ],
)
def test_seeds_without_a_value_are_left_out(values, text):
    assert format_mean(*mean_and_deviation(values)) == text


def test_other_decimal_places():
    assert format_mean(0.51239, 0.0004, digits=3) == "0.512 ± 0.000"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a JSON file"),
        ("[]", "found None"),
        (json.dumps({"version": 2, "overall": {}}), "found 2"),
        (json.dumps({"version": 1}), "evaluate again"),
    ],
)
def test_a_file_of_something_else(tmp_path, text, message):
    path = tmp_path / "recall.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_results(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_proposals": 50}, "run 2: num_proposals is 50, but 100 in other results of val"),
        ({"overall": {"expressions": 3}}, "run 2: other expressions"),
    ],
)
def test_results_of_another_experiment(changes, message):
    first = {
        "dataset": "val",
        "num_proposals": 100,
        "mean_proposals": 8.0,
        "iou_threshold": 0.5,
        "thresholds_chosen_here": True,
        "overall": {"expressions": 4},
    }
    check_comparable("run 2", dict(first), first)
    with pytest.raises(ValueError, match=message):
        check_comparable("run 2", first | changes, first)
