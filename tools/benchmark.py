#!/usr/bin/env python
"""Measure what queries cost.

    python tools/benchmark.py memory
    python tools/benchmark.py memory --config-file configs/refshapes/vlnms_fc_additive.yaml \\
        --queries 1 1000 --json memory.json --opts MODEL.VLNMS.CHUNK_MEMORY_MB 64
    python tools/benchmark.py rerank

"memory": by how much answering queries about the candidates of one image (encoding, scoring,
box refinement, NMS) raises the peak of the process's resident memory, beside the bound
MODEL.VLNMS.CHUNK_MEMORY_MB.

"rerank": what `vlnms_d2.rerank` takes: queries a second with the text encoded, distinct captions
encoded a second, and the same raise of memory for answering many queries of an image. No config.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from tabulate import tabulate

from vlnms_d2.config import load_config
from vlnms_d2.evaluation.memory import measure_memory
from vlnms_d2.evaluation.rerank_speed import measure_rerank
from vlnms_d2.file_io import write_json

DEFAULT_QUERIES = {"memory": [1, 100, 1000], "rerank": [1000, 10_000, 50_000]}
DEFAULT_CONFIG = Path(__file__).parents[1] / "configs" / "refshapes" / "vlnms_trans_joint.yaml"


def setup(config_file: Path, opts: Sequence[str]) -> CfgNode:
    """The config of the command line, on the CPU and without weights."""
    cfg = load_config(config_file, opts)
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "", "cpu"
    return cfg


def show_memory(results: dict[str, Any]) -> str:
    """What `measure_memory` found, as text."""
    bound, rows = results["bound_mib"], results["rows"]
    return (
        f"{results['relatedness']}, {results['candidates']} candidates, "
        f"MODEL.VLNMS.CHUNK_MEMORY_MB {bound}:\n"
        + tabulate(
            [[row["queries"], row["peak_mib"], row["peak_mib"] / bound] for row in rows],
            headers=["queries", "peak (MiB)", "of the bound"],
            tablefmt="pipe",
            floatfmt=("", ".1f", ".2f"),
        )
    )


def show_rerank(results: dict[str, Any]) -> str:
    """What `measure_rerank` found, as text."""
    machine = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    return (
        f"{results['candidates']} candidates, {results['categories']} categories:\n"
        f"{results['queries_per_second']:,.0f} queries a second, text encoded\n"
        f"{results['captions_per_second']:,.0f} distinct captions encoded a second "
        f"({results['captions']:,} of them)\n"
        + tabulate(
            [[row["queries"], row["peak_mib"]] for row in results["rows"]],
            headers=["queries", "peak (MiB)"],
            tablefmt="pipe",
            floatfmt=("", ".1f"),
        )
        + f"\n{machine}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    description, _, epilog = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("what", choices=["memory", "rerank"])
    add("--config-file", type=Path, default=DEFAULT_CONFIG, metavar="FILE")
    add("--candidates", type=int, default=300, metavar="N")
    add("--queries", type=int, nargs="+", metavar="Q")
    add("--captions", type=int, default=5000, metavar="N", help="distinct ones, for rerank")
    add("--json", type=Path, metavar="FILE", help="write the results there as well")
    rest = argparse.REMAINDER
    add("--opts", nargs=rest, default=[], metavar="KEY VALUE", help="to change the config; last")
    args = parser.parse_args(argv)
    queries = args.queries or DEFAULT_QUERIES[args.what]
    if args.what == "rerank":
        if min(args.candidates, args.captions, *queries) < 1:
            parser.error("--candidates, --captions and --queries must be at least 1")
        results = measure_rerank(args.candidates, args.captions, queries)
        print(show_rerank(results))
    else:
        try:
            cfg = setup(args.config_file, args.opts)
            results = measure_memory(cfg, args.candidates, queries)
        # Detectron2's configs raise any of these at a wrong key or value.
        except (AssertionError, KeyError, OSError, ValueError) as error:
            parser.error(f"{args.config_file}: {error}")
        print(show_memory(results))
    if args.json:
        write_json(args.json, {args.what: results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
