#!/usr/bin/env python
"""Run the ablations: every config with every seed, then one table as Markdown and JSON.

    python tools/run_ablations.py --out output/refshapes/ablations
    python tools/run_ablations.py --out output/few --configs configs/refshapes/vlnms_fc.yaml \\
        --jobs 2 --seeds 0 1 -- SOLVER.MAX_ITER 10

The same command resumes after interruption: finished runs are skipped, interrupted ones continue
from their last checkpoint. Runs are ordered by seed, so that an incomplete experiment already gives
a complete table of fewer seeds. The runs share the detector's output for each image (CachedRCNN) in
OUT/cache. When all runs are finished, the extra time per image is measured without that cache, with
no other run in progress.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))  # if other code runs this file

from import_option import add_import_option

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "projects" / "RefShapes"))

BRANCHES = (
    "vlnms_fc",
    "vlnms_fc_ranking",
    "vlnms_fc_additive",
    "vlnms_fc_bert",
    "vlnms_trans_joint",
    "vlnms_trans_co_attention",
    "vlnms_trans_no_refinement",
)
NAMES = ["vlnms_category"]
NAMES += [branch + suffix for suffix in ("", "_no_context") for branch in BRANCHES]


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default_configs = [REPO / "configs" / "refshapes" / f"{name}.yaml" for name in NAMES]
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    parser.add_argument(
        "--configs",
        type=Path,
        nargs="+",
        default=default_configs,
        metavar="FILE",
        help="default: all ablations of configs/refshapes; X_no_context.yaml stands for X.yaml "
        "with MODEL.VLNMS.PSEUDO_GT.CONTEXT False",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs in parallel; they share the cores"
    )
    parser.add_argument(
        "--table", type=Path, metavar="STEM", help="STEM.md and STEM.json; default: OUT/table"
    )
    parser.add_argument("--table-only", action="store_true", help="only write the table")
    parser.add_argument(
        "--timing-images", type=int, default=30, metavar="N", help="images to time, 0 for none"
    )
    parser.add_argument(
        "overrides",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help="for every run; put -- before them if the previous option takes several values",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = build_parser()
    add_import_option(parser)
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error("--jobs must be at least 1")
    overrides = args.overrides[1:] if args.overrides[:1] == ["--"] else args.overrides
    stem = args.table or args.out / "table"

    from ablations.runner import measure_all, run_all, table_files, write_table
    from ablations.runs import check_settings, plan
    from vlnms_d2.file_io import refuse_foreign

    words = sys.argv[1:] if argv is None else argv
    command_line = shlex.join(["python", "tools/run_ablations.py", *map(str, words)])
    try:
        runs = plan(args.out, args.configs, args.seeds, overrides)
        for run in runs:
            check_settings(run)
        refuse_foreign(*table_files(stem))
    # Detectron2's configs raise any of these at a wrong key or value.
    except (AssertionError, KeyError, ValueError) as error:
        parser.error(str(error))
    failed = 0
    try:
        if not args.table_only:
            failed = run_all(runs, args.jobs)
            if args.timing_images:
                write_table(runs, stem, command_line)
                measure_all(runs, args.timing_images)
        write_table(runs, stem, command_line)
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", flush=True)
        return 130
    return 1 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
