"""Recall results of several seeds: reading, checking that they are comparable, averaging."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from vlnms_d2.evaluation.recall import RESULTS_VERSION
from vlnms_d2.file_io import shown

# Results that differ in one of these belong to different experiments.
SETTINGS = ("num_proposals", "mean_proposals", "iou_threshold", "thresholds_chosen_here")


def read_results(path: Path) -> dict[str, Any]:
    """Read a results file of `ProposalRecallEvaluator`.

    Raises:
        ValueError: it is not such a file, or has another version.
    """
    try:
        results = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from error
    version = results.get("version") if isinstance(results, dict) else None
    if version != RESULTS_VERSION or "overall" not in results:
        raise ValueError(
            f"{path}: expected version {RESULTS_VERSION} of ProposalRecallEvaluator's results, "
            f"found {shown(version)}; evaluate again"
        )
    return results


def check_comparable(
    name: Path | str, results: Mapping[str, Any], first: Mapping[str, Any]
) -> None:
    """Check that two results of the same data set can be compared.

    Args:
        name: name of the file or run of `results`, for the message.
        results: the results to check.
        first: the results to compare with.

    Raises:
        ValueError: the settings or the expressions differ.
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

    Seeds without a value (None) are excluded; None if there are too few values.
    """
    known = [value for value in values if value is not None]
    mean = statistics.fmean(known) if known else None
    return mean, statistics.stdev(known) if len(known) > 1 else None


def format_mean(mean: float | None, deviation: float | None, digits: int = 2) -> str:
    """`mean ± deviation`; "-" without a mean."""
    if mean is None:
        return "-"
    text = f"{mean:.{digits}f}"
    return text if deviation is None else f"{text} ± {deviation:.{digits}f}"


def markdown_table(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    """A Markdown table of formatted cells; the first column is left-aligned, the others right."""
    return tabulate(
        rows,
        headers=headers,
        tablefmt="pipe",
        disable_numparse=True,
        colalign=["left"] + ["right"] * (len(headers) - 1),
    )
