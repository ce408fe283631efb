#!/usr/bin/env python
"""Export a model's proposals for all queries of a data set, in the formats of second stages.

    python tools/export_proposals.py --config-file configs/refshapes/vlnms_fc_trained.yaml \\
        --dataset refshapes_refcoco_val --format per-expression jsonl --out proposals

    # 8 per query on average, on four GPUs
    python tools/export_proposals.py --config-file ... --dataset refcoco_unc_val \\
        --format mattnet --mean-proposals 8 --num-gpus 4 --out refcoco_val

    # all splits in one file, under the name that the Ref-NMS fork of MAttNet reads
    python tools/export_proposals.py --config-file ... --format per-expression --mean-proposals 8 \\
        --dataset refcoco_unc_val refcoco_unc_testA refcoco_unc_testB \\
        --matt-dets att_vanilla 0 refcoco unc --out refcoco

    # with features, for DDPN and SCAN
    python tools/export_proposals.py --config-file ... --dataset flickr30k_entities_test \\
        --format ddpn --top-n 100 --features relatedness --out ddpn
    python tools/export_proposals.py --config-file ... --dataset flickr30k_captions_train \\
        --format scan --top-n 36 --out scan

docs/exporting.md describes the formats. The same command resumes an interrupted run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from export_options import (
    DDPN_NAMES,
    FEATURE_FORMATS,
    FORMATS,
    LAYERS,
    TSV_COLUMNS,
    add_cut_options,
    add_model_options,
    add_test_split_option,
    make_parser,
    show,
    take_model_options,
)
from import_option import add_import_option


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    formats = [*FORMATS, *FEATURE_FORMATS]
    add("--format", nargs="+", choices=formats, default=["jsonl"], dest="formats")
    add_cut_options(parser)
    add(
        "--features",
        choices=LAYERS,
        default="detector",
        dest="layer",
        help="of formats with features",
    )
    add("--ddpn-names", choices=DDPN_NAMES, default=DDPN_NAMES[0], help="with COCO's prefix?")
    annotations = "DDPN's, to copy with iids of the queries"
    add("--ddpn-annotations", nargs="+", type=Path, default=[], metavar="FILE", help=annotations)
    columns = "of bottom-up; default: %(default)s"
    add("--tsv-columns", choices=TSV_COLUMNS, default=TSV_COLUMNS[0], help=columns)
    counts = "fewest and most per line of bottom-up; default: %(default)s"
    add("--tsv-boxes", nargs=2, type=int, default=(10, 100), metavar=("MIN", "MAX"), help=counts)
    add("--tsv-per-query", action="store_true", help="in bottom-up a line per query, by its id")
    add_test_split_option(parser)
    add("--masks", action="store_true", help="add masks, in jsonl and coco")
    add("--categories-of", metavar="NAME", help="data set that has the detector's classes")
    add("--block-size", type=int, default=8, metavar="B", help="images that an interruption loses")
    name = ("MODEL", "ID", "DATASET", "SPLITBY")
    matt_dets = "name the file of per-expression matt_dets_MODEL_ID_DATASET_SPLITBY_0.json"
    add("--matt-dets", nargs=4, metavar=name, help=matt_dets)
    add_model_options(parser, several=True)
    add_import_option(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = vars(parse_args(argv))
    overwrite = args.pop("overwrite")
    for name in ("formats", "ddpn_annotations", "tsv_boxes"):
        args[name] = tuple(args[name])
    try:
        from vlnms_d2.export.from_model import ExportSettings, run_export

        matt_dets = args.pop("matt_dets")
        model, processes = take_model_options(args)
        settings = ExportSettings(model=model, matt_dets=matt_dets and tuple(matt_dets), **args)
        manifest = run_export(settings, processes, overwrite)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"export_proposals: {error}", file=sys.stderr)
        return 1
    show(manifest, settings.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
