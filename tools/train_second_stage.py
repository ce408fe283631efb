#!/usr/bin/env python
"""Train a reference second stage, on annotated boxes or on proposals, and test it on proposals.

    cache=output/refshapes/second_stages/cache
    python tools/train_second_stage.py rec --cache $cache --train refshapes_train \\
        --test refshapes_val refshapes_testA refshapes_testB \\
        --sources gt detector vlnms_fc vlnms_trans --seed 0 \\
        --out output/refshapes/second_stages/seed0
    python tools/train_second_stage.py retrieval --cache $cache --seed 0 \\
        --train refshapes_entities_captions_train --test refshapes_entities_captions_val \\
        --same-images refshapes_entities_captions_train=refshapes_train \\
        refshapes_entities_captions_val=refshapes_val \\
        --sources gt detector vlnms_fc --out output/refshapes/second_stages/seed0

`--cache` is a folder written by tools/extract_second_stage.py. With `--train-boxes own`, one
retrieval model is trained for each source, on the boxes that were extracted for the training images
with `--top N --group M`. The thresholds of the real case are chosen on the first data set of
`--test` (and of `--phrases`). Results go to `{out}/{source}/`; the weights go to `{out}/rec.pth`,
`{out}/retrieval.pth`, or `{out}/{source}/retrieval.pth` with one model for each source.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))  # if other code runs this file

from import_option import add_import_option

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "projects" / "SecondStages"))


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    rec = commands.add_parser("rec", help="the matcher of expressions and phrases")
    rec.add_argument(
        "--phrases", nargs="+", default=[], metavar="NAME", help="data sets of phrases to ground"
    )
    rec.add_argument("--mean-proposals", type=float, default=8.0, help="default %(default)s")
    retrieval = commands.add_parser("retrieval", help="the retrieval model of images and captions")
    retrieval.add_argument("--num-boxes", type=int, default=10, help="default %(default)s")
    retrieval.add_argument(
        "--captions-per-image",
        type=int,
        metavar="N",
        help="rank the first N captions of each image, 5 as published (default all)",
    )
    retrieval.add_argument(
        "--train-boxes",
        choices=("gt", "own"),
        default="gt",
        help="train one model on annotated boxes, or one for each source on its boxes "
        "(default %(default)s)",
    )
    for command in (rec, retrieval):
        add_import_option(command)
        add = command.add_argument
        add("--cache", type=Path, required=True, metavar="FOLDER")
        add("--train", required=True, metavar="NAME", help="data set")
        add(
            "--test",
            nargs="+",
            required=True,
            metavar="NAME",
            help="data sets, val first",
        )
        add(
            "--sources",
            nargs="+",
            required=True,
            metavar="SOURCE",
            help="of the boxes to test on",
        )
        add(
            "--same-images",
            nargs="+",
            default=[],
            metavar="NAME=OTHER",
            help="take boxes that do not depend on queries from OTHER, of the same images",
        )
        add("--seed", type=int, default=0)
        add("--out", type=Path, required=True, metavar="FOLDER")
        add("--eval-only", action="store_true", help="use the weights of an earlier run")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    wrong = [entry for entry in args.same_images if "=" not in entry]
    if wrong:
        parser.error(f"--same-images {wrong[0]}: expected NAME=OTHER")

    from detectron2.utils.logger import setup_logger

    from second_stages.experiment import Experiment

    args.out.mkdir(parents=True, exist_ok=True)
    for package in ("vlnms_d2", "second_stages"):
        setup_logger(str(args.out / f"{args.command}.log"), name=package)
    experiment = Experiment(
        cache=args.cache,
        train=args.train,
        test=args.test,
        sources=args.sources,
        same_images=dict(entry.split("=", 1) for entry in args.same_images),
        seed=args.seed,
        out=args.out,
        eval_only=args.eval_only,
    )
    try:
        if args.command == "rec":
            experiment.run_rec(args.phrases, args.mean_proposals)
        else:
            experiment.run_retrieval(
                args.num_boxes, args.train_boxes == "gt", args.captions_per_image
            )
    except (OSError, KeyError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
