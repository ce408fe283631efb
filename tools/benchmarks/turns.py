"""Timing of several sides in turn, so that what else the machine does meets all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping

import torch


def time_in_turn(
    sides: Mapping[Hashable, Callable[[], object]],
    rounds: int,
    device: torch.device,
    warm_up: int = 1,
) -> dict[Hashable, float]:
    """Run every side once a round, one after the other.

    Args:
        sides: by name what to time.
        rounds: timed ones.
        device: waited for before the clock is read.
        warm_up: rounds before those.

    Returns:
        By name the median time of a run, in seconds.
    """
    times: dict[Hashable, list[float]] = {name: [] for name in sides}
    for number in range(warm_up + rounds):
        for name, run in sides.items():
            seconds = _time(run, device)
            if number >= warm_up:
                times[name].append(seconds)
    return {name: statistics.median(own) for name, own in times.items()}


def _time(run: Callable[[], object], device: torch.device) -> float:
    wait_for(device)
    start = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - start


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
