"""The tables of the second stages, mean ± standard deviation over seeds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ablations.seeds import format_mean, markdown_table, mean_and_deviation
from vlnms_d2.evaluation.retrieval import RANKS
from vlnms_d2.file_io import atomic_write, claim, refuse_foreign, write_json

KINDS = ("rec", "res", "phrase_grounding", "retrieval", "proposals")
SOURCES = {
    "gt": "annotated boxes",
    "detector": "detector",
    "vlnms_fc": "VL-NMS FC",
    "vlnms_trans": "VL-NMS Trans",
    "vlnms_fc_captions": "VL-NMS FC, trained on captions (GT)",
    "vlnms_trans_captions": "VL-NMS Trans, trained on captions (GT)",
    "vlnms_fc_no_context": "VL-NMS FC, trained on referents alone",
    "vlnms_fc_wspg": "VL-NMS FC (WSPG)",
    "vlnms_fc_text_similarity": "VL-NMS FC (text similarity)",
}
# In retrieval:
TRANSFER = {
    name: f"{SOURCES[name]}, trained on expressions (Transfer)"
    for name in ("vlnms_fc", "vlnms_trans")
}
PSEUDO_GT = ("vlnms_fc_no_context", "vlnms_fc_wspg", "vlnms_fc_text_similarity")
VL_NMS = ("vlnms_fc", "vlnms_fc_captions", "vlnms_trans", "vlnms_trans_captions")
ORDER = ("detector", *PSEUDO_GT, *VL_NMS, "gt")
RETRIEVAL_KEYS = (*(f"{side}_r@{k}" for side in ("sentence", "image") for k in RANKS), "r@sum")
MASK_KEYS = ("overall_iou", "pr@0.5", "pr@0.6", "pr@0.7", "pr@0.8", "pr@0.9")

# kind -> data set -> source -> seed folder -> content of the file
Results = dict[str, dict[str, dict[str, dict[str, dict[str, Any]]]]]


def read_runs(runs: Sequence[Path]) -> Results:
    """Read the results in the folders of the runs.

    Raises:
        ValueError: a folder has no results, or two have the same name.
    """
    if len({run.name for run in runs}) < len(runs):
        raise ValueError("two folders of --runs have the same name, expected one a seed")
    results: Results = {kind: {} for kind in KINDS}
    for run in runs:
        files = sorted(run.glob("*/*.json"))
        if not files:
            raise ValueError(f"{run}: no results there; give folders of train_second_stage.py")
        for path in files:
            kind = next((kind for kind in KINDS if path.name.startswith(f"{kind}_")), None)
            if kind is not None:
                dataset = path.stem.removeprefix(f"{kind}_")
                of_source = results[kind].setdefault(dataset, {}).setdefault(path.parent.name, {})
                of_source[run.name] = json.loads(path.read_text())
    return results


def numbers(of_seeds: Mapping[str, Mapping[str, Any]], group: str, key: str) -> dict[str, float]:
    """One number of each seed; `group` is "overall", "all" or the name of a group."""
    values = {}
    for seed, content in of_seeds.items():
        group_results = content.get(group) or content.get("groups", {}).get(group)
        if group_results is not None:
            values[seed] = group_results[key]
    return values


def cell(values: Mapping[str, float]) -> str:
    """Mean ± deviation."""
    return format_mean(*mean_and_deviation(list(values.values())))


def gain(values: Mapping[str, float], base: Mapping[str, float]) -> str:
    """Mean ± deviation of the differences, seed by seed."""
    both = [values[seed] - base[seed] for seed in values if seed in base]
    text = format_mean(*mean_and_deviation(both))
    return text if text.startswith(("-", "–")) else f"+{text}"


def table(
    by_source: Mapping[str, Mapping[str, Mapping[str, Any]]],
    columns: Sequence[tuple[str, str, str]],
    proposals: Mapping[str, Mapping[str, Any]] | None,
    labels: Mapping[str, str],
) -> str:
    """One row for each source, and below each VL-NMS its gain over the detector.

    Args:
        by_source: results by source and seed.
        columns: (heading, group, key).
        proposals: results with the number of boxes, by source and seed; None omits the column.
        labels: names of the sources.
    """
    rows = []
    for source in (source for source in ORDER if source in by_source):
        by_seed = by_source[source]
        row = [labels[source], str(len(by_seed))]
        if proposals is not None:
            boxes = {seed: one["proposals"] for seed, one in proposals.get(source, {}).items()}
            row.append(cell(boxes) if boxes else "-")
        rows.append(row + [cell(numbers(by_seed, group, key)) for _, group, key in columns])
        if source.startswith("vlnms") and "detector" in by_source:
            base = by_source["detector"]
            gains = [
                gain(numbers(by_seed, group, key), numbers(base, group, key))
                for _, group, key in columns
            ]
            rows.append(
                ["  over the detector", "", *([""] if proposals is not None else []), *gains]
            )
    headers = ["boxes of", "seeds", *(["boxes"] if proposals is not None else [])]
    headers += [heading for heading, _, _ in columns]
    return markdown_table(rows, headers)


def groups_of(by_source: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """Names of the groups of a data set's results."""
    some = next(iter(next(iter(by_source.values())).values()))
    return list(some["groups"])


def parts(results: Results) -> Iterator[str]:
    """The paragraphs and tables of the Markdown."""
    yield "# RefShapes, second stages"
    proposals = results["proposals"]
    for dataset, by_source in results["rec"].items():
        yield f"## Referring expressions, {dataset}{chosen_mark(proposals, dataset)}"
        columns = [("REC", "overall", "accuracy")]
        columns += [(f"REC {group}", group, "accuracy") for group in groups_of(by_source)]
        yield table(by_source, columns, proposals.get(dataset, {}), SOURCES)
        if dataset in results["res"]:
            columns = [(f"RES {key.replace('_', ' ')}", "overall", key) for key in MASK_KEYS]
            yield table(results["res"][dataset], columns, None, SOURCES)
    for dataset, by_source in results["phrase_grounding"].items():
        yield f"## Phrase grounding, {dataset}{chosen_mark(proposals, dataset)}"
        columns = [("all", "overall", "accuracy")]
        columns += [
            (group.removeprefix("type:"), group, "accuracy") for group in groups_of(by_source)
        ]
        yield table(by_source, columns, proposals.get(dataset, {}), SOURCES)
    for dataset, by_source in results["retrieval"].items():
        some = next(iter(next(iter(by_source.values())).values()))
        yield f"## Retrieval, {dataset} ({some['images']} images, {some['captions']} captions)"
        columns = [(key.replace("_r@", " R@"), "all", key) for key in RETRIEVAL_KEYS]
        yield table(by_source, columns, None, SOURCES | TRANSFER)


def chosen_mark(proposals: Mapping[str, Any], dataset: str) -> str:
    """† if the thresholds of the real case were chosen on the data set."""
    files = (one for seeds in proposals.get(dataset, {}).values() for one in seeds.values())
    return "†" if any(one["chosen_here"] for one in files) else ""


def write_tables(runs: Sequence[Path], out: Path, command_line: str) -> None:
    """Write `{out}.md` and `{out}.json`.

    Args:
        runs: folders of `tools/train_second_stage.py`, one for each seed.
        out: path without suffix.
        command_line: the command that makes the tables, for the notes.

    Raises:
        ValueError: see `read_runs`.
    """
    outputs = [out.with_name(f"{out.name}.{suffix}") for suffix in ("json", "md")]
    refuse_foreign(*outputs)
    results = read_runs(runs)
    claim(*outputs)
    notes = (
        "In percent, mean ± sample standard deviation over the seeds of the second stage; the "
        "proposals are the same for all. †: the thresholds of the real case were chosen on this "
        f"data set. Made by `{command_line}`."
    )
    write_json(outputs[0], results)
    with atomic_write(outputs[1]) as file:
        file.write(("\n\n".join([*parts(results), notes]) + "\n").encode())
