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

`--cache` is what tools/extract_second_stage.py wrote. With `--train-boxes own` retrieval learns
from proposals: a model for each source, from the boxes that were extracted for the training images
with `--top N --group M`. The first data set of `--test` (and of `--phrases`) is where the
thresholds of the real case are chosen. Results go to `{out}/{source}/`, the weights to
`{out}/rec.pth`, `{out}/retrieval.pth`, or `{out}/{source}/retrieval.pth` where each source has a
model of its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.logger import setup_logger

from vlnms_d2.engine.command_line import make_parser
from vlnms_d2.file_io import atomic_write

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "projects" / "SecondStages"))

from second_stages.cross_attention import StackedCrossAttention
from second_stages.rec_training import build_matcher, train_matcher
from second_stages.retrieval_training import (
    build_cross_attention,
    train_cross_attention,
)
from second_stages.runs import Split, evaluate_grounding, evaluate_retrieval
from second_stages.store import GROUND_TRUTH


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = make_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    rec = commands.add_parser("rec", help="the matcher of expressions; it grounds phrases too")
    rec.add_argument("--phrases", nargs="+", default=[], metavar="NAME", help="to ground as well")
    rec.add_argument("--mean-proposals", type=float, default=8.0, help="default %(default)s")
    retrieval = commands.add_parser("retrieval", help="the model of images and captions")
    retrieval.add_argument("--num-boxes", type=int, default=10, help="default %(default)s")
    retrieval.add_argument(
        "--train-boxes",
        choices=("gt", "own"),
        default="gt",
        help="learn from annotated boxes, or a model for each source from boxes of its own "
        "(default %(default)s)",
    )
    for command in (rec, retrieval):
        add = command.add_argument
        add("--cache", type=Path, required=True, metavar="FOLDER")
        add("--train", required=True, metavar="NAME", help="data set")
        add("--test", nargs="+", required=True, metavar="NAME", help="data sets, val first")
        add("--sources", nargs="+", required=True, metavar="SOURCE", help="of boxes to test on")
        add(
            "--same-images",
            nargs="+",
            default=[],
            metavar="NAME=OTHER",
            help="boxes of annotations and of the detector are those of another data set",
        )
        add("--seed", type=int, default=0)
        add("--out", type=Path, required=True, metavar="FOLDER")
        add("--eval-only", action="store_true", help="take the weights that are there")
    return parser


def run_rec(args: argparse.Namespace) -> None:
    """Train the matcher and let it choose on every data set and source."""
    train = load(args, args.train, GROUND_TRUTH)
    num_classes = len(MetadataCatalog.get(args.train).thing_classes)
    matcher = build_matcher(train.dataset_dicts, train.images, num_classes, args.seed)
    if not restored(matcher, args, args.out):
        train_matcher(matcher, train.dataset_dicts, train.images, args.seed)
        save(matcher, args, args.out)
    for names, phrases in ((args.test, False), (args.phrases, True)):
        for source in args.sources if names else ():
            evaluate_grounding(
                matcher,
                [load(args, name, source) for name in names],
                source,
                args.out / source,
                mean_proposals=args.mean_proposals,
                phrases=phrases,
            )


def run_retrieval(args: argparse.Namespace) -> None:
    """Train the retrieval model and compare all pairs on every data set and source."""
    shared = None if args.train_boxes == "own" else retrieval_model(args, GROUND_TRUTH, args.out)
    for source in args.sources:
        model = shared or retrieval_model(args, source, args.out / source)
        for name in args.test:
            split = load(args, name, source)
            evaluate_retrieval(model, split, args.out / source, boxes_seen(args, source))


def retrieval_model(args: argparse.Namespace, source: str, folder: Path) -> StackedCrossAttention:
    """The retrieval model that learnt from the boxes of a source; its weights are in the folder."""
    train = load(args, args.train, source)
    model = build_cross_attention(train.dataset_dicts, train.images, args.seed)
    if not restored(model, args, folder):
        seen = boxes_seen(args, source)
        train_cross_attention(model, train.dataset_dicts, train.images, args.seed, num_boxes=seen)
        save(model, args, folder)
    return model


def boxes_seen(args: argparse.Namespace, source: str) -> int | None:
    """How many boxes of a source retrieval looks at; None for all."""
    return None if source == GROUND_TRUTH else args.num_boxes


def load(args: argparse.Namespace, name: str, source: str) -> Split:
    """A data set with its boxes from a source."""
    same_images = dict(entry.split("=", 1) for entry in args.same_images)
    return Split.load(name, DatasetCatalog.get(name), args.cache, source, same_images)


def restored(model: torch.nn.Module, args: argparse.Namespace, folder: Path) -> bool:
    """Load the weights of a run before, with `--eval-only`."""
    if args.eval_only:
        model.load_state_dict(torch.load(weights_file(args, folder), weights_only=True))
    return args.eval_only


def save(model: torch.nn.Module, args: argparse.Namespace, folder: Path) -> None:
    """Write the weights, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(weights_file(args, folder)) as file:
        torch.save(model.state_dict(), file)


def weights_file(args: argparse.Namespace, folder: Path) -> Path:
    """Where the weights of a command are."""
    return folder / f"{args.command}.pth"


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    wrong = [entry for entry in args.same_images if "=" not in entry]
    if wrong:
        parser.error(f"--same-images {wrong[0]}: expected NAME=OTHER")
    args.out.mkdir(parents=True, exist_ok=True)
    setup_logger(str(args.out / f"{args.command}.log"), name="vlnms_d2")
    try:
        {"rec": run_rec, "retrieval": run_retrieval}[args.command](args)
    except (OSError, KeyError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
