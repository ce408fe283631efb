#!/usr/bin/env python
"""Query-aware proposals of a model for all queries of a data set, as second stages read them.

    python tools/export_proposals.py --config-file configs/refshapes/vlnms_fc_trained.yaml \\
        --dataset refshapes_refcoco_val --format per-expression jsonl --out proposals

    # as many as 8 a query on average, on four GPUs
    python tools/export_proposals.py --config-file ... --dataset refcoco_unc_val \\
        --format mattnet --mean-proposals 8 --num-gpus 4 --out refcoco_val

    # with features, for DDPN and SCAN
    python tools/export_proposals.py --config-file ... --dataset flickr30k_entities_test \\
        --format ddpn --top-n 100 --features relatedness --out ddpn
    python tools/export_proposals.py --config-file ... --dataset flickr30k_captions_train \\
        --format scan --top-n 36 --out scan

docs/exporting.md describes the formats. A killed run goes on with the same command.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vlnms_d2.engine.command_line import add_cut_options, make_parser, show_counts
from vlnms_d2.engine.export_run import ExportSettings, run_export
from vlnms_d2.engine.launch_options import (
    add_model_options,
    quiet_tracing,
    take_processes,
)
from vlnms_d2.engine.model_settings import ModelSettings
from vlnms_d2.export import FEATURE_FORMATS, FORMATS
from vlnms_d2.modeling.feature_extraction import LAYERS


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    formats = [*FORMATS, *FEATURE_FORMATS]
    add("--format", nargs="+", choices=formats, default=["jsonl"], dest="formats")
    add_cut_options(parser)
    add("--features", choices=LAYERS, default="detector", dest="layer", help="of ddpn and scan")
    add("--masks", action="store_true", help="give masks, in jsonl and coco")
    add("--categories-of", metavar="NAME", help="data set that has the detector's classes")
    add("--block-size", type=int, default=8, metavar="B", help="images that a kill loses at most")
    add_model_options(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = vars(parse_args(argv))
    quiet_tracing()
    overwrite = args.pop("overwrite")
    try:
        processes = take_processes(args)
        model = ModelSettings(args.pop("config_file"), args.pop("dataset"), tuple(args.pop("opts")))
        args["formats"] = tuple(args["formats"])
        settings = ExportSettings(model=model, **args)
        manifest = run_export(settings, processes, overwrite)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"export_proposals: {error}", file=sys.stderr)
        return 1
    show_counts(manifest["counts"])
    print(f"threshold: {manifest['threshold']:.6g}")
    print(", ".join(str(settings.out / name) for name in manifest["published"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
