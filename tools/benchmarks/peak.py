"""By how much something raises the memory of a process."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def peak_rows(
    measure: Callable[..., float], args: tuple[Any, ...], counts: Sequence[int]
) -> list[dict[str, Any]]:
    """The raise of the peak per number of queries, each in a fresh process.

    Args:
        measure: of a module; from `args` and a count to the raise in MiB.
        args: can be pickled.
        counts: numbers of queries.
    """
    rows = []
    for count in counts:
        # What a process has freed it keeps, and it would hide the next peak.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            raised = pool.apply(measure, (*args, count))
        rows.append({"queries": count, "peak_mib": round(raised, 1)})
    return rows


def raise_of_peak(action: Callable[[], object]) -> float:
    """By how much an action raises the resident memory of this process at its peak, in MiB."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _peak()
    action()
    return (_peak() - before) / 2**20


def _peak() -> int:
    """The most memory that was resident since the last reset, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [kib] = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(kib) * 1024
