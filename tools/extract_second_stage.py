#!/usr/bin/env python
"""Save the boxes that second stages are trained on and choose from, with their features.

    cfg=configs/refshapes
    python tools/extract_second_stage.py --what gt --datasets refshapes_train refshapes_val \\
        --proposals vlnms_fc=$cfg/vlnms_fc_trained.yaml --out output/refshapes/second_stages/cache
    python tools/extract_second_stage.py --what detector vlnms_fc vlnms_trans \\
        --datasets refshapes_val refshapes_testB --proposals vlnms_fc=$cfg/vlnms_fc_trained.yaml \\
        vlnms_trans=$cfg/vlnms_trans_trained.yaml --out output/refshapes/second_stages/cache

"gt" are the annotated boxes, "detector" the detections without a query, and each name of
`--proposals` is a VL-NMS whose proposals are kept for each query down to `--floor`. With `--top N`
N boxes are kept, whatever their score, and each VL-NMS answers every query of the data set on every
image (for retrieval); with `--group M` only the queries of a group of M images that includes the
image (to train retrieval on these boxes). Data sets of the same image files are processed together,
as each image goes through the detector once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))  # if other code runs this file

from import_option import add_import_option

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "projects" / "SecondStages"))

FLOOR = 0.05  # below the thresholds of the real case, which are chosen on val


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--datasets", nargs="+", required=True, metavar="NAME", help="registered names")
    add("--what", nargs="+", required=True, metavar="SOURCE", help="gt, detector, or a VL-NMS")
    add("--proposals", nargs="+", required=True, metavar="NAME=CONFIG", help="of each VL-NMS")
    add("--out", type=Path, required=True, metavar="FOLDER")
    add("--floor", type=float, default=FLOOR, metavar="S", help="least fused score (%(default)s)")
    add("--top", type=int, metavar="N", help="all pairs of images and queries, N boxes each")
    add("--group", type=int, metavar="M", help="pairs of M images each, with --top")
    add("--overwrite", action="store_true", help="replace existing files")
    rest = argparse.REMAINDER
    add("--opts", nargs=rest, default=[], metavar="KEY VALUE", help="to change each config; last")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = build_parser()
    add_import_option(parser)
    args = parser.parse_args(argv)
    if args.group is not None and (args.top is None or args.group < 1):
        parser.error(f"--group {args.group}: expected a positive number, and --top N with it")

    from second_stages.extraction import extract_datasets, read_configs

    try:
        configs = read_configs(args.proposals, args.what, args.floor, args.top, args.opts)
        extract_datasets(
            args.datasets,
            args.what,
            configs,
            args.out,
            all_pairs=args.top is not None,
            group_size=args.group,
            overwrite=args.overwrite,
        )
    except (OSError, KeyError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    from interrupts import exit_with

    exit_with(main)
