"""How much longer the detector takes with queries than without."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from tabulate import tabulate

from .base import Benchmark, Options, show_machine
from .detector import CONFIG, Pair, ask, build_pair
from .turns import time_in_turn


class Overhead(Benchmark):
    """Detector with VL-NMS over stock Detectron2 on the same weights, masks off on both sides."""

    name = "overhead"
    help = (
        "time of the detector with FC and queries over that of stock Detectron2 on the same "
        "weights, with VISUAL_ENCODER finetune and shared; masks off on both sides"
    )
    settings: Sequence[str] = ("MODEL.VLNMS.RELATEDNESS", "FC")
    queries: Sequence[int] = (1, 10, 100, 1000)

    def measure(self, options: Options) -> dict[str, Any]:
        """See `Benchmark.measure`; "rows" have the times of both sides, taken in turn, in ms."""
        counts = options.queries or self.queries
        rows = []
        for encoder in ("finetune", "shared"):
            changes = ["MODEL.MASK_ON", "False", "MODEL.VLNMS.VISUAL_ENCODER", encoder]
            cfg = options.load_config(CONFIG, [*self.settings, *changes])
            pair = build_pair(cfg, options.candidates)
            named = {"visual_encoder": cfg.MODEL.VLNMS.VISUAL_ENCODER}
            rows += [named | row for row in time_pair(pair, counts, options)]
        return options.timed(relatedness=cfg.MODEL.VLNMS.RELATEDNESS, rows=rows)

    def show(self, results: dict[str, Any]) -> str:
        """See `Benchmark.show`."""
        keys = ("visual_encoder", "queries", "detector_ms", "with_queries_ms", "ratio")
        headers = ["visual encoder", "queries", "detector (ms)", "with queries (ms)", "ratio"]
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
    """The same with Trans, on the embeddings of MiniLM."""

    name = "trans"
    help = "the same with Trans, box refinement included"
    settings = ("MODEL.VLNMS.RELATEDNESS", "Trans", "MODEL.VLNMS.TEXT_ENCODER", "BERT")
    queries = (1,)


def time_pair(pair: Pair, counts: Sequence[int], options: Options) -> list[dict[str, Any]]:
    """Time stock Detectron2 and the detector with each number of queries in turn.

    Returns:
        Per number of queries "queries", "detector_ms", "with_queries_ms" and "ratio", of medians.
    """
    sides = {0: partial(ask, pair.stock, pair.image_input, 0)}
    sides |= {count: partial(ask, pair.vlnms, pair.image_input, count) for count in counts}
    seconds = time_in_turn(sides, options.rounds, options.torch_device)
    return [
        {
            "queries": count,
            "detector_ms": round(1000 * seconds[0], 2),
            "with_queries_ms": round(1000 * seconds[count], 2),
            "ratio": round(seconds[count] / seconds[0], 4),
        }
        for count in counts
    ]
