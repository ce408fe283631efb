"""Tests of the measurements of what queries cost."""

import importlib.util
import json

import pytest
from conftest import REPO

_SPEC = importlib.util.spec_from_file_location("benchmark", REPO / "tools" / "benchmark.py")
benchmark = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(benchmark)

REFSHAPES = REPO / "configs" / "refshapes"


def run(tmp_path, config, *opts):
    """The peaks in MiB that the tool wrote, by number of queries."""
    path = tmp_path / "memory.json"
    words = ["memory", "--config-file", str(REFSHAPES / f"{config}.yaml"), "--json", str(path)]
    assert benchmark.main([*words, "--queries", "1", "100", "--opts", *opts]) == 0
    memory = json.loads(path.read_text())["memory"]
    assert memory["candidates"] == 300
    return {row["queries"]: row["peak_mib"] for row in memory["rows"]}


@pytest.mark.parametrize("config", ["vlnms_trans_joint", "vlnms_trans_co_attention"])
def test_trans_with_300_candidates_and_100_queries_stays_below_the_bound(tmp_path, config, capsys):
    bounded = run(tmp_path, config, "MODEL.VLNMS.CHUNK_MEMORY_MB", "128")
    assert 0 <= bounded[1] < bounded[100] <= 128
    assert "| queries" in capsys.readouterr().out
    unbounded = run(tmp_path, config, "MODEL.VLNMS.CHUNK_MEMORY_MB", "100000")
    assert unbounded[100] > 128


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
