"""How the tools end. Imports nothing heavy."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


def exit_with(main: Callable[[], int | None]) -> NoReturn:
    """Run a tool. Ctrl-C prints one line and gives the exit status 130. An error that a file, a key
    or a value can cause prints its message, or a traceback if $VLNMS_TRACEBACK is set; status 1."""
    tool = Path(sys.argv[0]).stem
    try:
        status = main()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one while it ends
        print(f"\n{tool}: interrupted", file=sys.stderr, flush=True)
        status = 130
    except (AssertionError, ImportError, KeyError, OSError, ValueError) as error:
        if os.environ.get("VLNMS_TRACEBACK"):
            raise
        message = str(error.args[0] if isinstance(error, KeyError) else error)
        if "\nOriginal Traceback" in message:  # as torch passes on what a data loader raised
            message = message.rpartition(f"\n{type(error).__name__}: ")[2].rstrip()
        print(f"{tool}: {message}\n(VLNMS_TRACEBACK=1 shows where)", file=sys.stderr)
        status = 1
    sys.stdout.flush()
    if status == 130:
        os._exit(status)  # without what threads and libraries print when they end
    sys.exit(status)
