"""Tools parse their arguments before they import anything heavy."""

import subprocess
import sys

import pytest
from conftest import REPO

TOOLS = ["export_weights", "prepare_data", "recall_table", "train_net"]
HEAVY = {"cv2", "detectron2", "matplotlib", "numpy", "pandas", "spacy", "torch", "transformers"}


@pytest.mark.parametrize("tool", TOOLS)
def test_help_imports_nothing_heavy(tool):
    command = [sys.executable, "-X", "importtime", str(REPO / "tools" / f"{tool}.py"), "--help"]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert process.stdout.startswith(f"usage: {tool}.py")
    imported = {line.rpartition("|")[2].strip() for line in process.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {*HEAVY, "vlnms_d2"}
