"""`tools/train_net.py` with the test's data set registered, for tests that start a process.

With `$KILL_AT_MOVE`, "<number> <path>", the process is killed just before it moves its file of this
number to the path.
"""

import os
import runpy
import sys
from pathlib import Path

from vlnms_d2.data import register_refshapes

if "KILL_AT_MOVE" in os.environ:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from killing import kill_at_move

    number, path = os.environ["KILL_AT_MOVE"].split(" ", 1)
    kill_at_move(Path(path), int(number))
register_refshapes(os.environ["TINY_REFSHAPES"], name="tiny")
sys.argv[0] = str(Path(__file__).resolve().parents[2] / "tools" / "train_net.py")
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
