"""Tests of the measurements of what queries cost."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from conftest import REPO

from benchmarks import BENCHMARKS, Benchmark, Options, pair_scoring, pairs
from benchmarks import nms as nms_benchmark
from benchmarks.base import in_fresh_process
from benchmarks.text import DIM, made_up_images, write_vectors
from vlnms_d2.language import GloveVectors

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


# --- NMS ---------------------------------------------------------------------------------------


def test_every_setting_is_measured():
    results = BENCHMARKS["nms"].load().measure(Options(queries=(1, 30), candidates=40, rounds=1))
    settings = [(row["boxes"], row["own"], row["queries"]) for row in results["rows"]]
    assert settings == [
        (name, boxes_per_query, queries)
        for name in ("scattered", "clustered")
        for boxes_per_query in (False, True)
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

    monkeypatch.setattr(nms_benchmark, "multi_query_nms", all_in_order)
    with pytest.raises(RuntimeError, match="keep different boxes"):
        BENCHMARKS["nms"].load().measure(Options(queries=(2,), candidates=20, rounds=1))


# --- pairs -------------------------------------------------------------------------------------


def test_pairs_are_measured_and_projected(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pairs, "PROCESSES", 1)
    monkeypatch.setattr(pairs, "MIN_PAIRS", 30)
    path = tmp_path / "pairs.json"
    config = REPO / "configs" / "refshapes" / "vlnms_fc.yaml"
    words = ["pairs", "--captions", "8", "--candidates", "40", "--config-file", str(config)]
    assert benchmark.main([*words, "--json", str(path)]) == 0
    measured = json.loads(path.read_text())["pairs"]
    assert (measured["images"], measured["captions"], measured["processes"]) == (10, 8, 1)
    assert measured["pairs_per_second"] > 0 and measured["pairs_per_cpu_second"] > 0
    projected = 5_000_000 / measured["pairs_per_second"]
    assert abs(measured["seconds_projected"] - projected) < 0.01 * projected
    # Ten numbers of two bytes each; of a file so small the head is more than half.
    assert 5_000_000 * 20 < measured["bytes_projected"] < 5_000_000 * 24
    assert "1,000 x 5,000 pairs" in capsys.readouterr().out


def test_comparing_pairs_is_measured_and_projected(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pair_scoring, "IMAGES", 3)
    path = tmp_path / "scores.json"
    words = ["pair_scoring", "--captions", "4", "--candidates", "40", "--json", str(path)]
    assert benchmark.main(words) == 0
    measured = json.loads(path.read_text())["pair_scoring"]
    assert (measured["images"], measured["captions"], measured["boxes"]) == (3, 4, 36)
    assert min(measured[f"pairs_per_{unit}"] for unit in ("second", "cpu_second")) > 0
    projected = 5_000_000 / measured["pairs_per_second"]
    assert abs(measured["seconds_projected"] - projected) < 0.01 * projected
    assert "1,000 x 5,000 pairs" in capsys.readouterr().out


def test_memory_does_not_grow_with_the_store(tmp_path):
    pair_scoring._make_store(tmp_path, 400, 2, 40)
    size = (tmp_path / "pools" / "features.npy").stat().st_size / 2**20
    _, _, peak = in_fresh_process(pair_scoring._score, str(tmp_path))
    assert peak < 100 < size, (peak, size)


# --- texts -------------------------------------------------------------------------------------


def test_it_runs_and_both_ways_agree():
    text = BENCHMARKS["text"].load()
    results = text.measure(Options(lines=300, captions=40))  # raises where they differ
    glove, pseudo = results["glove"], results["pseudo_gt"]
    assert glove["lines"] == 300 and glove["peak_mib"] > 0 < glove["cached_s"]
    assert pseudo["expressions"] == 40 and pseudo["ratio"] > 0
    assert "300 lines" in text.show(results)


def test_made_up_expressions_are_distinct():
    names = ["cup", "dining table"]
    images = made_up_images(500, names)
    queries = [e["query"] for image in images for e in image["expressions"]]
    assert len(queries) == len(set(queries)) == 500
    ids = [e["sent_id"] for image in images for e in image["expressions"]]
    assert ids == list(range(500))


def test_made_up_vectors_are_read(tmp_path):
    write_vectors(tmp_path / "v.txt", 1200)
    vectors = GloveVectors(tmp_path / "v.txt")
    assert len(vectors) == 1200 and vectors.dim == DIM
    np.testing.assert_array_equal(vectors(["word3"]), vectors(["word1003"]))
