#!/usr/bin/env python
"""Print recall results of several seeds as one Markdown table, mean ± standard deviation.

    python tools/recall_table.py output/seed*/inference/recall_*.json
    python tools/recall_table.py --by-manner output/seed*/inference/recall_*.json

The files are those that `ProposalRecallEvaluator` writes; files of the same data set are the seeds
of one experiment. The reduction of misses is computed per seed, then averaged.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "projects" / "RefShapes"))

ROWS = {
    "detector": "detector",
    "detector_matched": "detector (matched)*",
    "vlnms": "VL-NMS",
    "misses_cut": "misses cut (%)",
    "misses_cut_matched": "misses cut (%) of matched*",
}
COLUMNS = ("proposals", "referent", "context")
NOTE = (
    "*: with the threshold that gives the detector as many proposals as VL-NMS has on the same "
    "expressions; for comparison only."
)
CHOSEN_HERE = "†: the thresholds of the real operating point were chosen on this data set."


def group_by_dataset(paths: Sequence[Path]) -> dict[str, list[dict[str, Any]]]:
    """The results of each data set, in the order of the files.

    Raises:
        ValueError: a file is given twice, or files of a data set are not seeds of one experiment.
    """
    from ablations.seeds import check_comparable, read_results

    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError("a file is given twice, which would count one seed as two")
    groups: dict[str, list[dict[str, Any]]] = {}
    for path in paths:
        results = read_results(path)
        group = groups.setdefault(results["dataset"], [])
        if group:
            check_comparable(path, results, group[0])
        group.append(results)
    return groups


def table_rows(name: str, seeds: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """The rows of one group of expressions.

    Args:
        name: first cell.
        seeds: the result of `evaluate_group` for each seed.
    """
    from ablations.seeds import format_mean, mean_and_deviation

    for row, label in ROWS.items():
        cells = [
            format_mean(
                *mean_and_deviation([seed[point].get(row, {}).get(column) for seed in seeds])
            )
            for point in ("top", "real")
            for column in COLUMNS
        ]
        yield [name, str(seeds[0]["expressions"]), str(len(seeds)), label, *cells]


def markdown(groups: dict[str, list[dict[str, Any]]], by_manner: bool) -> str:
    """The table with its notes."""
    from tabulate import tabulate

    rows, chosen_here, sizes = [], False, set()
    for dataset, seeds in groups.items():
        mark = "†" if seeds[0]["thresholds_chosen_here"] else ""
        chosen_here = chosen_here or bool(mark)
        sizes.add(seeds[0]["num_proposals"])
        rows += table_rows(dataset + mark, [seed["overall"] for seed in seeds])
        for style in seeds[0]["by_manner"] if by_manner else ():
            style_seeds = [seed["by_manner"][style] for seed in seeds]
            rows += table_rows(f"{dataset}{mark}, {style}", style_seeds)
    top = f"N={sizes.pop()}" if len(sizes) == 1 else "N"
    headers = ["data set", "expressions", "seeds", "proposals of"]
    headers += [f"{point}: {c}" for point in (top, "real") for c in COLUMNS]
    table = tabulate(
        rows,
        headers=headers,
        tablefmt="pipe",
        disable_numparse=True,
        colalign=["left", "right", "right", "left"] + ["right"] * 2 * len(COLUMNS),
    )
    return "\n\n".join([table, NOTE, *([CHOSEN_HERE] if chosen_here else [])])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="recall_*.json")
    parser.add_argument(
        "--by-manner", action="store_true", help="add rows for each style of expressions"
    )
    args = parser.parse_args(argv)
    try:
        print(markdown(group_by_dataset(args.files), args.by_manner))
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    from interrupts import exit_with

    exit_with(main)
