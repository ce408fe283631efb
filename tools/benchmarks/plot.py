"""A picture of time against the number of queries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from vlnms_d2.file_io import atomic_write


def plot_time(results: dict[str, Any], path: Path) -> None:
    """Draw what "overhead" measured, and beside it "grounding_dino" where it was measured.

    Args:
        results: by the benchmarks' names, "overhead" among them.
        path: of the PNG.
    """
    rows = results["overhead"]["rows"]
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for encoder, style in (("finetune", "o-"), ("shared", "s--")):
        own = [row for row in rows if row["visual_encoder"] == encoder]
        counts = [row["queries"] for row in own]
        seconds = [row["with_queries_ms"] / 1000 for row in own]
        axes.plot(counts, seconds, style, label=f"detector with VL-NMS FC, {encoder}")
    counts = sorted({row["queries"] for row in rows})
    alone = sum(row["detector_ms"] for row in rows) / len(rows) / 1000
    axes.plot(counts, [alone] * len(counts), "k:", label="detector alone")
    for row in results.get("grounding_dino", {}).get("rows", [])[:1]:
        each = row["grounding_dino_s_per_query"]
        axes.plot(
            counts,
            [each * count for count in counts],
            "-.",
            label="Grounding DINO-T, a query's time times as many",
        )
    axes.set(xscale="log", yscale="log", xlabel="queries about one image", ylabel="seconds")
    axes.grid(which="major", alpha=0.3)
    axes.legend(fontsize="small")
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=100)
