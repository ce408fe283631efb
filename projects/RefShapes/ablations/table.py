"""The table of the ablations: the numbers of all variants and seeds, and their Markdown."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .seeds import check_comparable, format_mean, markdown_table, mean_and_deviation

SUMMARY_VERSION = 1
DETECTOR = "detector"


class Column(NamedTuple):
    """A column of the table: a number at an operating point, and its number of decimals."""

    point: str
    key: str
    label: str
    digits: int = 2

    @property
    def tolerance(self) -> float:
        """The detector's number may differ by this much between runs: 0.05 of a percentage."""
        return 5 * 10**-self.digits


COLUMNS = (
    Column("real", "proposals", "proposals"),
    Column("real", "referent", "referent"),
    Column("real", "context", "context"),
    Column("real", "best_iou", "IoU", 3),
    Column("top", "referent", "referent"),
    Column("top", "context", "context"),
)
STYLE_COLUMNS = COLUMNS[:3]
KEYS = ("proposals", "referent", "context", "best_iou")


@dataclass
class Variant:
    """The measurements of one config.

    Attributes:
        timing: extra time per image, as measured by `tools/run_ablations.py`.
        results: for each seed and data set the results of `ProposalRecallEvaluator`.
        seconds: for each seed the wall time of the last process of the run.
    """

    timing: dict[str, Any] | None = None
    results: dict[int, dict[str, dict[str, Any]]] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)


# --- numbers -------------------------------------------------------------------------------------


def summarise(variants: Mapping[str, Variant]) -> dict[str, Any]:
    """All numbers of the table, ready for JSON.

    The detector is the same in all runs. Its row is taken from the first run, with a warning if
    another run has different numbers.

    Args:
        variants: by name, in the order of the rows; each with at least one finished run.

    Raises:
        ValueError: results of one data set have different settings or expressions.
    """
    results: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
    for name, variant in variants.items():
        for seed, datasets in variant.results.items():
            for dataset, result in datasets.items():
                results.setdefault(dataset, {}).setdefault(name, {})[seed] = result
    summary = {dataset: _summarise_dataset(by_name) for dataset, by_name in results.items()}
    timings = {name: variant.timing for name, variant in variants.items() if variant.timing}
    return {
        "version": SUMMARY_VERSION,
        "datasets": summary,
        "timing": timings,
        "seconds": {name: variant.seconds for name, variant in variants.items()},
        "warnings": [*_detector_warnings(results), *_timing_warnings(timings)],
    }


def _summarise_dataset(by_name: Mapping[str, dict[int, dict[str, Any]]]) -> dict[str, Any]:
    _, first_seed, first = next(_each_run(by_name))
    for name, seed, result in _each_run(by_name):
        check_comparable(f"{name} seed {seed}", result, first)
    rows = {DETECTOR: _row({first_seed: first}, "detector")}
    rows |= {name: _row(seeds, "vlnms") for name, seeds in by_name.items()}
    shared = ("num_proposals", "mean_proposals", "iou_threshold", "thresholds_chosen_here")
    return {
        **{key: first[key] for key in shared},
        "expressions": first["overall"]["expressions"],
        "rows": rows,
    }


def _each_run(
    by_name: Mapping[str, dict[int, dict[str, Any]]],
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    for name, seeds in by_name.items():
        for seed, result in seeds.items():
            yield name, seed, result


def _row(seeds: Mapping[int, dict[str, Any]], method: str) -> dict[str, Any]:
    """The numbers of one row, for all expressions and for each style."""
    styles = next(iter(seeds.values()))["by_manner"]
    return {
        "overall": _numbers({s: r["overall"] for s, r in seeds.items()}, method),
        "by_manner": {
            style: _numbers({s: r["by_manner"][style] for s, r in seeds.items()}, method)
            for style in styles
        },
    }


def _numbers(groups: Mapping[int, dict[str, Any]], method: str) -> dict[str, Any]:
    """For each operating point and number its values, mean and deviation."""
    return {
        point: {key: _number({s: g[point][method][key] for s, g in groups.items()}) for key in KEYS}
        for point in ("real", "top")
    }


def _number(per_seed: Mapping[int, float | None]) -> dict[str, Any]:
    mean, deviation = mean_and_deviation(list(per_seed.values()))
    return {"mean": mean, "std": deviation, "per_seed": per_seed}


def _detector_warnings(
    results: Mapping[str, Mapping[str, dict[int, dict[str, Any]]]],
) -> Iterator[str]:
    for dataset, by_name in results.items():
        first_name, first_seed, first = next(_each_run(by_name))
        for name, seed, result in _each_run(by_name):
            for column in COLUMNS:
                here, there = (
                    r["overall"][column.point]["detector"][column.key] for r in (result, first)
                )
                if (here is None) == (there is None) and (
                    here is None or abs(here - there) <= column.tolerance
                ):
                    continue
                yield (
                    f"the detector differs: {_heading(column, first)} on {dataset} is {here} in "
                    f"{name} seed {seed}, but {there} in {first_name} seed {first_seed}"
                )


def _timing_warnings(timings: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    for what in ("machine", "images", "dataset"):
        if any(a[what] != b[what] for a, b in itertools.pairwise(timings.values())):
            yield f"the extra times were not all measured with the same {what}; do not compare them"


# --- Markdown ------------------------------------------------------------------------------------


def markdown(summary: Mapping[str, Any]) -> str:
    """The tables with their notes.

    Args:
        summary: what `summarise` returned, with "command", the command line that made it.
    """
    datasets = summary["datasets"]
    parts = ["# Ablations", *(f"**Warning**: {text}." for text in summary["warnings"])]
    for i, (name, dataset) in enumerate(datasets.items()):
        mark = "†" if dataset["thresholds_chosen_here"] else ""
        parts.append(f"## {name}{mark} ({dataset['expressions']} expressions)")
        parts.append(_dataset_table(dataset, summary["timing"] if i == 0 else {}))
    last = list(datasets)[-1]
    if datasets[last]["rows"][DETECTOR]["by_manner"]:
        parts += [f"## {last} by style of expression, real case", _style_table(datasets[last])]
    return "\n\n".join([*parts, "## Notes", *_notes(summary)]) + "\n"


def _dataset_table(dataset: Mapping[str, Any], timings: Mapping[str, Any]) -> str:
    headers = ["", "seeds", *(_heading(column, dataset) for column in COLUMNS)]
    if timings:
        headers += ["extra time: 1 query", "extra time: all queries"]
    rows = []
    for name, row in dataset["rows"].items():
        seeds = len(row["overall"]["real"]["proposals"]["per_seed"])
        cells = [name, "-" if name == DETECTOR else str(seeds)]
        cells += _cells(row["overall"], COLUMNS)
        if timings:
            timing = timings.get(name)
            cells += [_extra(timing, key) for key in ("one_query_ms", "all_queries_ms")]
        rows.append(cells)
    return markdown_table(rows, headers)


def _style_table(dataset: Mapping[str, Any]) -> str:
    styles = dataset["rows"][DETECTOR]["by_manner"]
    headers = ["", *(f"{m}: {c.label}" for m in styles for c in STYLE_COLUMNS)]
    rows = [
        [name, *(cell for m in styles for cell in _cells(row["by_manner"][m], STYLE_COLUMNS))]
        for name, row in dataset["rows"].items()
    ]
    return markdown_table(rows, headers)


def _heading(column: Column, dataset: Mapping[str, Any]) -> str:
    point = "real" if column.point == "real" else f"N={dataset['num_proposals']}"
    return f"{point}: {column.label}"


def _cells(numbers: Mapping[str, Any], columns: tuple[Column, ...]) -> list[str]:
    cells = [(numbers[column.point][column.key], column.digits) for column in columns]
    return [format_mean(number["mean"], number["std"], digits) for number, digits in cells]


def _extra(timing: Mapping[str, Any] | None, key: str) -> str:
    if timing is None:
        return "-"
    extra = timing[key] - timing["detector_ms"]
    return f"{extra:.1f} ms ({100 * extra / timing['detector_ms']:.1f}%)"


def _notes(summary: Mapping[str, Any]) -> Iterator[str]:
    first = next(iter(summary["datasets"].values()))
    yield (
        f"Recall in percent, at IoU > {first['iou_threshold']}: of the referents, and of the "
        "contextual objects (per expression the share of its contextual objects, averaged over the "
        "expressions that have any). Mean ± sample standard deviation over the seeds; all runs "
        "have the same detector."
    )
    yield (
        f"N={first['num_proposals']}: the first {first['num_proposals']} proposals. real: "
        "proposals with a score above a threshold, and always the best one; the thresholds of "
        f"detector and branch each leave {first['mean_proposals']:g} proposals per expression on "
        "the data set where they were chosen, and the other data sets use them unchanged."
    )
    if any(dataset["thresholds_chosen_here"] for dataset in summary["datasets"].values()):
        yield "†: the thresholds of the real case were chosen on this data set."
    yield (
        "IoU: the best IoU of a kept proposal with the referent, averaged over all expressions "
        "(0 to 1)."
    )
    timings = list(summary["timing"].values())
    if timings:
        machine = timings[0]["machine"]
        alone = [timing["detector_ms"] for timing in timings]
        yield (
            "Extra time per image: the median time of an image with its first expression, or with "
            f"all of them ({timings[0]['queries_per_image']:.1f} on average), less that of the "
            f"detector alone ({min(alone):.1f} to {max(alone):.1f} ms), in ms and in percent of "
            f"the latter; {timings[0]['images']} images of {timings[0]['dataset']}, one at a time, "
            f"no cache, no masks, no score threshold. {machine['cpu']} ({machine['device']}, "
            f"threads: {machine['threads']}), Python {machine['python']}, PyTorch "
            f"{machine['torch']}, Detectron2 {machine['detectron2']}."
        )
    yield f"Made by\n\n    {summary['command']}"
