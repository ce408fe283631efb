"""Tests of the measurements of what queries cost."""

import importlib.util
import json

import pytest
from conftest import REPO

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


@pytest.mark.parametrize("config", ["vlnms_trans_joint", "vlnms_trans_co_attention"])
def test_trans_with_300_candidates_stays_below_the_bound(tmp_path, config, capsys):
    assert 0 < run(tmp_path, config, 100) <= 256
    assert "| queries" in capsys.readouterr().out.replace("   ", " ")
    assert 0 < run(tmp_path, config, 400) <= 256


def test_without_a_bound_it_takes_more(tmp_path):
    assert run(tmp_path, "vlnms_trans_joint", 400, "MODEL.VLNMS.CHUNK_MEMORY_MB", "9999") > 256


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
