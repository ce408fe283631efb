#!/usr/bin/env python
"""Query-aware proposals from the detections of any detector, without training.

    python tools/rerank.py --detections results.json --annotations instances.json \\
        --queries captions.json --out proposals

    # 8 per query on average, in a second stage's format
    python tools/rerank.py --detections results.json --annotations instances.json \\
        --queries "refs(unc).p" --split val --format per-expression --mean-proposals 8 --out refcoco

    # recall of what the captions mention, and pictures
    python tools/rerank.py --detections results.json --annotations instances.json \\
        --queries captions.json --mentions mentions.json --image-dir photos --pictures 10 --out out

    # "second man from the left in a red shirt": also by place, order, size and colours
    python tools/rerank.py --detections results.json --annotations instances.json \\
        --queries queries.jsonl --relatedness Portable --image-dir photos --out out

Detections are COCO results ({image_id, category_id, bbox, score}), best before NMS; annotations a
file in COCO's format with the detector's categories. Queries are COCO captions (.json), refs of
REFER (.p), JSON lines of {image_id, query_id, query} (.jsonl) or a folder of Flickr30k Entities
with Sentences/<image id>.txt. The same command resumes an interrupted run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export_options import FORMATS, add_cut_options, make_parser, show
from import_option import add_import_option


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--detections", type=Path, required=True, metavar="FILE", help="COCO results")
    add("--annotations", type=Path, required=True, metavar="FILE", help="with the categories")
    add("--queries", type=Path, required=True, metavar="FILE", help="or folder; see below")
    add("--split", help="of REFER's refs; default: all of them")
    add("--out", type=Path, required=True, metavar="DIR")
    add("--format", nargs="+", choices=FORMATS, default=["jsonl"], dest="formats")
    add_cut_options(parser, "kept per query; default: 100", "; takes twice the time")
    add("--nms-thresh", type=float, default=0.5, metavar="IOU", help="default: %(default)s")
    add("--mentions", type=Path, metavar="FILE", help="[{caption_id, annotation_ids}]: recall")
    add(
        "--relatedness",
        choices=("Category", "Portable"),
        default="Category",
        help="what of a query counts: its nouns, or also place, order, size and, with --image-dir, "
        "colours; default: %(default)s",
    )
    add("--image-dir", type=Path, metavar="DIR", help="of the images, for --pictures and colours")
    add("--pictures", type=int, default=0, metavar="K", help="queries to draw")
    add("--processes", type=int, default=1, metavar="P", help="default: %(default)s")
    add("--overwrite", action="store_true", help="replace the output of other settings in DIR")
    add_import_option(parser)
    return parser.parse_args(argv)


def format_recall(results: dict[str, Any]) -> str:
    """The result of `recall_of_mentions` as a table to print."""
    from tabulate import tabulate

    from reranking.recall import IOU_THRESHOLD, MEANS, METHODS, TOPS

    rows = []
    for method, label in METHODS.items():
        label = results.get("relatedness", label) if method == "category" else label
        points, row = results["methods"][method], [label]
        row += [points["top"][str(count)]["recall"] for count in TOPS]
        for target in MEANS:
            point = points["mean"][f"{target:g}"]
            row += [point["recall"], point["proposals"]]
        rows.append(row)
    headers = ["proposals of", *(f"N={count}" for count in TOPS)]
    headers += [name for target in MEANS for name in (f"mean {target:g}", "proposals")]
    return (
        tabulate(rows, headers=headers, tablefmt="pipe", floatfmt=".2f")
        + f"\nRecall in percent of the mentioned boxes at IoU > {IOU_THRESHOLD:g}, mean over "
        f"{results['captions']:,} captions. The thresholds of the last columns were chosen on "
        "these captions, for each row."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = vars(parse_args(argv))
    processes, overwrite = args.pop("processes"), args.pop("overwrite")
    args["formats"] = tuple(args["formats"])
    try:
        from reranking.job import RerankSettings, run_rerank

        manifest = run_rerank(RerankSettings(**args), processes, overwrite)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"rerank: {error}", file=sys.stderr)
        return 1
    recall = manifest.get("recall")
    show(manifest, args["out"], format_recall(recall) if recall else "")
    return 0


if __name__ == "__main__":
    from interrupts import exit_with

    exit_with(main)
