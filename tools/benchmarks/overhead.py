"""Time of the detector with queries, compared with stock Detectron2, with and without masks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from tabulate import tabulate

from vlnms_d2.config import default_config
from vlnms_d2.file_io import atomic_write

from .base import (
    Benchmark,
    Options,
    peak_increase,
    peak_rows,
    show_machine,
    time_interleaved,
)
from .detector import CONFIG, Pair, ask, build_pair

QUERIES = (1, 10, 100, 1000)
MASK_QUERIES = (1, 100, 1000)


class Overhead(Benchmark):
    """Detector with VL-NMS over stock Detectron2 on the same weights, masks off on both sides."""

    settings: Sequence[str] = ("MODEL.VLNMS.RELATEDNESS", "FC")
    variants: Sequence[Sequence[str]] = (
        ("MODEL.VLNMS.VISUAL_ENCODER", "finetune"),
        ("MODEL.VLNMS.VISUAL_ENCODER", "shared"),
    )

    def name_variant(self, vlnms: CfgNode) -> dict[str, str]:
        """The name of the variant in its rows."""
        return {"visual_encoder": vlnms.VISUAL_ENCODER}

    def default_queries(self, vlnms: CfgNode) -> Sequence[int]:
        """The numbers of queries of the variant where the command line gives none."""
        return QUERIES

    def measure(self, options: Options) -> dict[str, Any]:
        """See `Benchmark.measure`; "rows" have the interleaved times of both sides in ms."""
        rows = []
        for changes in self.variants:
            cfg = options.load_config(CONFIG, ["MODEL.MASK_ON", "False", *self.settings, *changes])
            pair = build_pair(cfg, options.candidates)
            named = self.name_variant(cfg.MODEL.VLNMS)
            counts = options.queries or self.default_queries(cfg.MODEL.VLNMS)
            rows += [named | row for row in time_pair(pair, counts, options)]
        return options.timed(relatedness=cfg.MODEL.VLNMS.RELATEDNESS, rows=rows)

    def show(self, results: dict[str, Any]) -> str:
        """See `Benchmark.show`."""
        keys = list(results["rows"][0])
        headers = [key.replace("_ms", " (ms)").replace("_", " ") for key in keys]
        return (
            f"{results['relatedness']}, {results['candidates']} candidates, masks off, medians of "
            f"{results['rounds']} rounds:\n"
            + tabulate(
                [[row[key] for key in keys] for row in results["rows"]],
                headers=headers,
                tablefmt="pipe",
                floatfmt=("", "", ".1f", ".1f", ".3f"),
            )
            + f"\n{show_machine(results)}"
        )


class Trans(Overhead):
    """The same with each fusion of Trans, on the embeddings of MiniLM.

    The paper's fusions have the default width, 768, and "cross_attention" a third of it.
    """

    settings = ("MODEL.VLNMS.RELATEDNESS", "Trans", "MODEL.VLNMS.TEXT_ENCODER", "BERT")
    variants = (
        ("MODEL.VLNMS.TRANS.FUSION", "joint"),
        ("MODEL.VLNMS.TRANS.FUSION", "co_attention"),
        (
            *("MODEL.VLNMS.TRANS.FUSION", "cross_attention", "MODEL.VLNMS.TRANS.NUM_HEADS", "8"),
            *("MODEL.VLNMS.TRANS.HIDDEN_DIM", "256", "MODEL.VLNMS.TRANS.FFN_DIM", "512"),
        ),
    )

    def name_variant(self, vlnms: CfgNode) -> dict[str, str]:
        """See `Overhead.name_variant`."""
        return {"fusion": vlnms.TRANS.FUSION}

    def default_queries(self, vlnms: CfgNode) -> Sequence[int]:
        """See `Overhead.default_queries`; the paper's fusions take minutes for 1,000."""
        return QUERIES if vlnms.TRANS.FUSION == "cross_attention" else QUERIES[:-1]


def time_pair(pair: Pair, counts: Sequence[int], options: Options) -> list[dict[str, Any]]:
    """Time stock Detectron2 and the detector with each number of queries, interleaved.

    Returns:
        Medians for each number of queries: "queries", "detector_ms", "with_queries_ms", "ratio".
    """
    sides = {0: partial(ask, pair.stock, pair.image_input, 0)}
    sides |= {count: partial(ask, pair.vlnms, pair.image_input, count) for count in counts}
    seconds = time_interleaved(sides, options.rounds, options.torch_device)
    return [
        {
            "queries": count,
            "detector_ms": round(1000 * seconds[0], 2),
            "with_queries_ms": round(1000 * seconds[count], 2),
            "ratio": round(seconds[count] / seconds[0], 4),
        }
        for count in counts
    ]


class Masks(Benchmark):
    """The detector with queries and masks over stock Detectron2 with masks."""

    def measure(self, options: Options) -> dict[str, Any]:
        """See `Benchmark.measure`; "peak_mib", for each number of queries in a fresh process, is
        measured after a forward pass with one query and includes the outputs."""
        cfg = options.load_config(CONFIG, ["MODEL.MASK_ON", "True"])
        counts = options.queries or MASK_QUERIES
        pair = build_pair(cfg, options.candidates)
        rows = time_pair(pair, counts, options)
        if options.device == "cpu":
            peaks = peak_rows(_peak_of_forward, (cfg.dump(), options.candidates), counts)
            rows = [row | peak for row, peak in zip(rows, peaks, strict=True)]
        vlnms = cfg.MODEL.VLNMS
        return options.timed(relatedness=vlnms.RELATEDNESS, masks=vlnms.MASKS, rows=rows)

    def show(self, results: dict[str, Any]) -> str:
        """See `Benchmark.show`."""
        return (
            f"{results['relatedness']}, {results['candidates']} candidates, MODEL.VLNMS.MASKS "
            f"{results['masks']}, medians of {results['rounds']} rounds:\n"
            + tabulate(results["rows"], headers="keys", tablefmt="pipe")
            + f"\n{show_machine(results)}"
        )


def _peak_of_forward(config_text: str, num_candidates: int, num_queries: int) -> float:
    cfg = default_config()
    cfg.merge_from_other_cfg(CfgNode.load_cfg(config_text))
    pair = build_pair(cfg, num_candidates)
    ask(pair.vlnms, pair.image_input, 1)
    return peak_increase(lambda: ask(pair.vlnms, pair.image_input, num_queries))


def plot_time(results: dict[str, Any], path: Path) -> None:
    """Plot the results of "overhead", and those of "trans" and "grounding_dino" if present.

    Args:
        results: by benchmark, including "overhead".
        path: of the PNG.
    """
    from matplotlib.figure import Figure

    rows = results["overhead"]["rows"]
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    styles = {"finetune": "o-", "shared": "s--", "joint": "^-", "cross_attention": "v-"}
    for row_name, style in styles.items():
        relatedness, key = ("FC", "visual_encoder") if style[0] in "os" else ("Trans", "fusion")
        source = rows if relatedness == "FC" else results.get("trans", {}).get("rows", [])
        found = [row for row in source if row[key] == row_name]
        seconds = [row["with_queries_ms"] / 1000 for row in found]
        if found:
            label = f"detector with VL-NMS {relatedness}, {row_name}"
            axes.plot([row["queries"] for row in found], seconds, style, label=label)
    counts = sorted({row["queries"] for row in rows})
    alone = sum(row["detector_ms"] for row in rows) / len(rows) / 1000
    axes.plot(counts, [alone] * len(counts), "k:", label="detector alone")
    for row in results.get("grounding_dino", {}).get("rows", [])[:1]:
        each = row["grounding_dino_s_per_query"]
        axes.plot(
            counts,
            [each * count for count in counts],
            "-.",
            label="Grounding DINO-T, one forward pass per query",
        )
    axes.set(xscale="log", yscale="log", xlabel="queries about one image", ylabel="seconds")
    axes.grid(which="major", alpha=0.3)
    axes.legend(fontsize="small")
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=100)
