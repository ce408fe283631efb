"""Tests of the benchmark of NMS."""

import pytest
import torch

from benchmarks import BENCHMARKS, Options
from benchmarks import nms as benchmark


def test_every_setting_is_measured():
    results = BENCHMARKS["nms"].load().measure(Options(queries=(1, 30), candidates=40, rounds=1))
    settings = [(row["boxes"], row["own"], row["queries"]) for row in results["rows"]]
    assert settings == [
        (name, own, queries)
        for name in ("scattered", "clustered")
        for own in (False, True)
        for queries in (1, 30)
    ]
    assert all(row["loop_ms"] > 0 and row["at_once_ms"] > 0 for row in results["rows"])
    text = BENCHMARKS["nms"].load().show(results)
    assert "40 boxes" in text
    assert text.count("clustered") == 4


def test_different_results_are_not_timed(monkeypatch):
    def all_in_order(boxes, scores, *_):
        keep = torch.arange(scores.shape[1]).expand(scores.shape)
        return keep, torch.full((len(scores),), scores.shape[1])

    monkeypatch.setattr(benchmark, "multi_query_nms", all_in_order)
    with pytest.raises(RuntimeError, match="keep different boxes"):
        BENCHMARKS["nms"].load().measure(Options(queries=(2,), candidates=20, rounds=1))
