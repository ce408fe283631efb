#!/usr/bin/env python
"""Measure what queries cost.

    python tools/benchmark.py memory
    python tools/benchmark.py memory --config-file configs/refshapes/vlnms_fc_additive.yaml \\
        --queries 1 1000 --json memory.json --opts MODEL.VLNMS.CHUNK_MEMORY_MB 64

"memory": by how much answering queries about the candidates of one image (encoding, scoring,
box refinement, NMS) raises the peak of the process's resident memory, beside the bound
MODEL.VLNMS.CHUNK_MEMORY_MB.
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
from vlnms_d2.file_io import write_json

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


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    description, _, epilog = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("what", choices=["memory"])
    add("--config-file", type=Path, default=DEFAULT_CONFIG, metavar="FILE")
    add("--candidates", type=int, default=300, metavar="N")
    add("--queries", type=int, nargs="+", default=[1, 100, 1000], metavar="Q")
    add("--json", type=Path, metavar="FILE", help="write the results there as well")
    rest = argparse.REMAINDER
    add("--opts", nargs=rest, default=[], metavar="KEY VALUE", help="to change the config; last")
    args = parser.parse_args(argv)
    try:
        cfg = setup(args.config_file, args.opts)
        results = measure_memory(cfg, args.candidates, args.queries)
    # Detectron2's configs raise any of these at a wrong key or value.
    except (AssertionError, KeyError, OSError, ValueError) as error:
        parser.error(f"{args.config_file}: {error}")
    print(show_memory(results))
    if args.json:
        write_json(args.json, {"memory": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
