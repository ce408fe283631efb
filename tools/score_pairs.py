#!/usr/bin/env python
"""Compare all images and captions of exported pairs by your own model, and evaluate retrieval.

    python tools/export_pairs.py --config-file ... --dataset flickr30k_captions_test --top-n 36 \\
        --out pairs
    python tools/score_pairs.py --pairs pairs --sim my_scan:sim --out scores

`my_scan.py`, in the current folder or installed, has a function `sim(features, captions)`, which
gets features float32 [B, K, D] of the boxes that B images keep for a caption and a list of this
caption, and returns similarities float [B, 1]. docs/exporting.md has an example. The same command
resumes an interrupted run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from export_options import make_parser, show
from import_option import add_import_option


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--pairs", type=Path, required=True, metavar="DIR", help="of tools/export_pairs.py")
    add("--sim", required=True, metavar="MODULE:NAME", help="the function")
    text = "encodes boxes, float32 [M, D] to [M, E], before sim; each box once per image"
    add("--encode-boxes", metavar="MODULE:NAME", help=text)
    add("--out", type=Path, required=True, metavar="DIR", help="for similarities.npy")
    add("--boxes", type=int, metavar="K", help="of each pair; default: all that the pairs have")
    add("--images-per-call", type=int, default=32, metavar="B", help="default: %(default)s")
    text = "rank all captions, not the first five of each image as published"
    add("--all-captions", action="store_true", help=text)
    add("--processes", type=int, default=1, metavar="P", help="on the CPU; default: %(default)s")
    add("--num-gpus", type=int, default=0, metavar="G", help="one process each")
    add("--overwrite", action="store_true", help="replace the output of other settings in --out")
    add_import_option(parser)
    args = parser.parse_args(argv)
    for name in filter(None, (args.sim, args.encode_boxes)):
        if name.count(":") != 1:
            parser.error(f"{name!r}: expected MODULE:NAME of a function")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        import json

        from vlnms_d2.evaluation import pair_retrieval, score_pairs
        from vlnms_d2.evaluation.retrieval import report
        from vlnms_d2.export import PairStore
        from vlnms_d2.export.workers import Processes

        similarities = score_pairs(
            args.pairs,
            args.sim,
            args.out,
            encode_boxes=args.encode_boxes,
            num_boxes=args.boxes,
            images_per_call=args.images_per_call,
            processes=Processes(num_gpus=args.num_gpus, processes=args.processes),
            overwrite=args.overwrite,
        )
        options = {"captions_per_image": None} if args.all_captions else {}
        results = pair_retrieval(PairStore(args.pairs), similarities, **options)
    except (AttributeError, ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"score_pairs: {error}", file=sys.stderr)
        return 1
    manifest = json.loads((args.out / "manifest.json").read_bytes())
    show(manifest, args.out, report(results)[0])
    return 0


if __name__ == "__main__":
    from interrupts import exit_with

    exit_with(main)
