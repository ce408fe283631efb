"""Tests of the measurements of what queries cost."""

import importlib.util
import json

import pytest
import torch
from conftest import REPO

from benchmarks import Benchmark

_SPEC = importlib.util.spec_from_file_location("benchmark", REPO / "tools" / "benchmark.py")
benchmark = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(benchmark)

REFSHAPES = REPO / "configs" / "refshapes"


def run(tmp_path, config, queries, *opts):
    """The peak in MiB that the tool wrote."""
    path = tmp_path / "memory.json"
    words = ["memory", "--config-file", str(REFSHAPES / f"{config}.yaml"), "--json", str(path)]
    assert benchmark.main([*words, "--queries", str(queries), "--opts", *opts]) == 0
    memory = json.loads(path.read_text())["memory"]
    assert memory["candidates"] == 300
    [row] = memory["rows"]
    assert row["queries"] == queries
    return row["peak_mib"]


@pytest.mark.parametrize(
    ("config", "queries"),
    [("vlnms_trans_joint", 200), ("vlnms_trans_co_attention", 200), ("vlnms_fc_additive", 300)],
)
def test_many_queries_of_300_candidates_stay_below_the_bound(tmp_path, config, queries, capsys):
    assert 0 < run(tmp_path, config, queries) <= 256
    assert "| queries" in capsys.readouterr().out.replace("   ", " ")


def test_without_a_bound_it_takes_more(tmp_path):
    assert run(tmp_path, "vlnms_trans_joint", 200, "MODEL.VLNMS.CHUNK_MEMORY_MB", "9999") > 256


def test_too_few_candidates_are_refused(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(
            ["memory", "--candidates", "20", "--opts", "MODEL.RPN.POST_NMS_TOPK_TEST", "1"]
        )
    assert "gives 16 candidates, expected 20" in capsys.readouterr().err


def test_an_unknown_key_is_refused(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["memory", "--opts", "MODEL.VLNMS.NO_SUCH_KEY", "1"])
    assert "NO_SUCH_KEY" in capsys.readouterr().err


def test_rerank_is_measured_and_its_memory_is_flat(tmp_path, capsys):
    path = tmp_path / "rerank.json"
    words = ["rerank", "--captions", "40", "--queries", "256", "4096", "--json", str(path)]
    assert benchmark.main(words) == 0
    measured = json.loads(path.read_text())["rerank"]
    assert (measured["candidates"], measured["categories"], measured["captions"]) == (300, 80, 40)
    assert measured["queries_per_second"] > 0 and measured["captions_per_second"] > 0
    assert min(measured["portable"].values()) > 0
    few, many = (row["peak_mib"] for row in measured["rows"])
    # The results of 4,096 queries would be 20 MiB.
    assert many < few + 8
    printed = capsys.readouterr().out
    assert "queries a second" in printed and f"torch {measured['machine']['torch']}" in printed


def test_rerank_of_nothing_is_refused(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["rerank", "--queries", "0"])
    assert "must be at least 1" in capsys.readouterr().err


def test_a_picture_needs_something_to_draw(tmp_path, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["memory", "--plot", str(tmp_path / "time.png")])
    assert "give overhead, or all" in capsys.readouterr().err


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        benchmark.main(["overhead", "--device", "cuda"])
    assert "torch finds no GPU" in capsys.readouterr().err


class Fixed(Benchmark):
    """Says what it was asked, or that it cannot."""

    help = "fixed"

    def __init__(self, name, error=None):
        self.name, self.error = name, error

    def load(self):
        return self

    def measure(self, options):
        if self.error:
            raise ValueError(self.error)
        return {"queries": options.queries, "opts": options.opts}

    def show(self, results):
        return f"shown {self.name}"


def test_all_leaves_out_what_cannot_run(tmp_path, capsys, monkeypatch):
    kinds = {"one": Fixed("one"), "two": Fixed("two", "no GPU way"), "three": Fixed("three")}
    monkeypatch.setattr(benchmark, "BENCHMARKS", kinds)
    path = tmp_path / "all.json"
    words = ["--queries", "4", "5", "--json", str(path), "--opts", "SEED", "1"]
    assert benchmark.main(["all", *words]) == 0
    said = {"queries": [4, 5], "opts": ["SEED", "1"]}
    assert json.loads(path.read_text()) == {"one": said, "three": said}
    captured = capsys.readouterr()
    assert captured.out.split("\n")[:2] == ["shown one", "shown three"]
    assert "two is left out: no GPU way" in captured.err
    assert benchmark.main(["three", "one", *words]) == 0
    assert json.loads(path.read_text()) == {"one": said, "three": said}
    assert capsys.readouterr().out.split("\n")[:2] == ["shown three", "shown one"]
    with pytest.raises(SystemExit):
        benchmark.main(["two"])
    assert "two: no GPU way" in capsys.readouterr().err
