"""Recall results of several seeds: reading them, checking that they belong together, averaging."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from vlnms_d2.evaluation.recall import RESULTS_VERSION

# Results that differ in one of these are not of one experiment.
SETTINGS = ("num_proposals", "mean_proposals", "iou_threshold", "thresholds_chosen_here")


def read_results(path: Path) -> dict[str, Any]:
    """One file of `ProposalRecallEvaluator`.

    Raises:
        ValueError: it is not such a file, or of another version.
    """
    try:
        results = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from error
    version = results.get("version") if isinstance(results, dict) else None
    if version != RESULTS_VERSION or "overall" not in results:
        raise ValueError(
            f"{path}: expected version {RESULTS_VERSION} of ProposalRecallEvaluator's results, "
            f"found {version!r}; evaluate again"
        )
    return results


def check_comparable(
    name: Path | str, results: Mapping[str, Any], first: Mapping[str, Any]
) -> None:
    """Compare results with others of the same data set.

    Args:
        name: of the file or run, for the message.
        results: its results.
        first: the others.

    Raises:
        ValueError: they were made with other settings or on other expressions.
    """
    for key in SETTINGS:
        if results[key] != first[key]:
            raise ValueError(
                f"{name}: {key} is {results[key]}, but {first[key]} in other results of "
                f"{results['dataset']}"
            )
    if results["overall"]["expressions"] != first["overall"]["expressions"]:
        raise ValueError(f"{name}: other expressions than in other results of this data set")


def mean_and_deviation(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation over the seeds.

    A seed without a value (None) is left out; None where there are too few.
    """
    known = [value for value in values if value is not None]
    mean = statistics.fmean(known) if known else None
    return mean, statistics.stdev(known) if len(known) > 1 else None


def format_mean(mean: float | None, deviation: float | None, digits: int = 2) -> str:
    """`mean ± deviation`; "-" where there is no mean."""
    if mean is None:
        return "-"
    text = f"{mean:.{digits}f}"
    return text if deviation is None else f"{text} ± {deviation:.{digits}f}"


def markdown_table(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    """A table of Markdown of cells as they are, the first column at the left, the others right."""
    return tabulate(
        rows,
        headers=headers,
        tablefmt="pipe",
        disable_numparse=True,
        colalign=["left"] + ["right"] * (len(headers) - 1),
    )
