"""`tools/train_net.py` with the test's data set registered, for a test that kills the process."""

import os
import runpy
import sys
from pathlib import Path

from vlnms_d2.data import register_refshapes

register_refshapes(os.environ["TINY_REFSHAPES"], name="tiny")
sys.argv[0] = str(Path(__file__).resolve().parents[2] / "tools" / "train_net.py")
runpy.run_path(sys.argv[0], run_name="__main__")
