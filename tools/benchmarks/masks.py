"""Time and memory of a whole forward, masks included."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from tabulate import tabulate

from vlnms_d2.config import default_config

from .base import Benchmark, Options, show_machine
from .detector import CONFIG, ask, build_pair
from .overhead import time_pair
from .peak import peak_rows, raise_of_peak

QUERIES = (1, 100, 1000)


class Masks(Benchmark):
    """Stock Detectron2 with masks beside the detector with queries and masks."""

    name = "masks"
    help = (
        "time of the detector with queries and masks over that of stock Detectron2 with masks, and "
        "on the CPU the raise of the peak of resident memory by a forward"
    )

    def measure(self, options: Options) -> dict[str, Any]:
        """See `Benchmark.measure`; "peak_mib" of each number of queries in a fresh process after a
        forward with one query, the outputs included."""
        cfg = options.load_config(CONFIG, ["MODEL.MASK_ON", "True"])
        counts = options.queries or QUERIES
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
    return raise_of_peak(lambda: ask(pair.vlnms, pair.image_input, num_queries))
