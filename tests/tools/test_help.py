"""Tools parse their arguments before they import anything heavy."""

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
