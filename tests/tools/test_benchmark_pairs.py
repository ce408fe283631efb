"""tools/benchmark.py pairs: the rate at which pairs are answered."""

import importlib.util
import json
import multiprocessing

from conftest import REPO

from benchmarks import pair_scoring, pairs

_SPEC = importlib.util.spec_from_file_location("benchmark", REPO / "tools" / "benchmark.py")
benchmark = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(benchmark)


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
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        _, _, peak = pool.apply(pair_scoring._score, (str(tmp_path),))
    assert peak < 100 < size, (peak, size)
