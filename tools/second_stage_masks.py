#!/usr/bin/env python
"""Segment the boxes that the reference matcher chose, and evaluate the masks (RES).

    python tools/second_stage_masks.py --config-file configs/refshapes/vlnms_fc_trained.yaml \\
        --datasets refshapes_val refshapes_testB --runs output/refshapes/second_stages/seed*/*

`--runs` are folders with the `choices_<data set>.json` of `tools/train_second_stage.py rec`; a
`res_<data set>.json` is written to each. The masks come from the config's detector.
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
    add = parser.add_argument
    add("--config-file", type=Path, required=True, metavar="FILE")
    add("--datasets", nargs="+", required=True, metavar="NAME")
    add("--runs", nargs="+", required=True, type=Path, metavar="FOLDER")
    add("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="last")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = build_parser()
    add_import_option(parser)
    args = parser.parse_args(argv)

    from detectron2.utils.logger import setup_logger

    from second_stages.evaluation import evaluate_masks, read_choices
    from vlnms_d2.config import load_config
    from vlnms_d2.data import GroundingMapper
    from vlnms_d2.data.builtin import registered_images
    from vlnms_d2.engine.predictor import VLNMSPredictor
    from vlnms_d2.file_io import claim, refuse_foreign

    setup_logger(name="vlnms_d2")
    try:
        cfg = load_config(args.config_file, args.opts)
        if not cfg.MODEL.MASK_ON:
            raise ValueError(f"{args.config_file}: MODEL.MASK_ON is False, expected a mask head")
        outputs = [run / f"res_{name}.json" for run in args.runs for name in args.datasets]
        refuse_foreign(*outputs)
        mapper = GroundingMapper(cfg, is_train=False)
        model = VLNMSPredictor(cfg).model
        for name in args.datasets:
            choices = {run: read_choices(run / f"choices_{name}.json") for run in args.runs}
            claim(*(run / f"res_{name}.json" for run in args.runs))
            evaluate_masks(model, mapper, name, registered_images(name), choices)
    except (OSError, KeyError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    from interrupts import exit_with

    exit_with(main)
