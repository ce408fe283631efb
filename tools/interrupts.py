"""How the tools end. Imports nothing heavy."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


def exit_with(main: Callable[[], int | None]) -> NoReturn:
    """Run a tool; Ctrl-C prints one line and gives the exit status 130."""
    try:
        status = main()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one while it ends
        print(f"\n{Path(sys.argv[0]).stem}: interrupted", file=sys.stderr, flush=True)
        status = 130
    sys.stdout.flush()
    if status == 130:
        os._exit(status)  # without what threads and libraries print when they end
    sys.exit(status)
