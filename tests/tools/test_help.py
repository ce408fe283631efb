"""Tools parse their arguments before they import anything heavy, and end in one line."""

import signal
import subprocess
import sys

import pytest
from conftest import REPO

TOOLS = [
    "benchmark",
    "calibrate_words",
    "cross_validate_category",
    "export_weights",
    "extract_second_stage",
    "make_refshapes",
    "make_refshapes_captions",
    "prepare_data",
    "recall_table",
    "run_ablations",
    "score_pairs",
    "second_stage_masks",
    "second_stage_table",
    "train_net",
    "train_second_stage",
    "train_tagger",
]
HEAVY = {"cv2", "detectron2", "matplotlib", "numpy", "pandas", "spacy", "torch", "transformers"}


@pytest.mark.parametrize("tool", TOOLS)
def test_help_imports_nothing_heavy(tool):
    command = [sys.executable, "-X", "importtime", str(REPO / "tools" / f"{tool}.py"), "--help"]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert process.stdout.startswith(f"usage: {tool}.py")
    imported = {line.rpartition("|")[2].strip() for line in process.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {*HEAVY, "vlnms_d2"}


INTERRUPTED = """
import os, runpy, signal, sys
class Finder:  # Ctrl-C while the tool imports what it needs
    def find_spec(self, name, path=None, target=None):
        if name in {heavy!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
sys.path.insert(0, {folder!r})
sys.argv = [{path!r}, *{arguments!r}]
runpy.run_path({path!r}, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("demo", ""),
        ("export_proposals", "--config-file a --dataset b --out c"),
        ("export_pairs", "--config-file a --dataset b --out c"),
        ("export_weights", "setup.py b"),
        ("score_pairs", "--pairs a --sim b:c --out d"),
        ("rerank", "--detections a --annotations b --queries c --out d"),
        ("train_net", ""),
        ("recall_table", "a.json"),
        ("benchmark", "nms"),
    ],
)
def test_ctrl_c_is_one_line_and_status_130(tool, arguments):
    path = str(REPO / "tools" / f"{tool}.py")
    code = INTERRUPTED.format(
        heavy=HEAVY, folder=str(REPO / "tools"), path=path, arguments=arguments.split()
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.returncode == 130, process.stderr
    assert process.stderr.strip() == f"{tool}: interrupted"
