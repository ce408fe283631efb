#!/usr/bin/env python
"""Recall of what expressions mean on photos: the detector alone, Category and Portable.

    python tools/portable_table.py --data photos_a photos_b
    python tools/portable_table.py --data photos_a photos_b --samples samples.jsonl \\
        --pictures 12 --out output/portable

Each folder has photos/, instances.json, captions.json and the detector's results in COCO's format.
Template expressions are made for the photos of a split (--split); the rules of Portable were chosen
on "choose", "report" is for reporting only, as is projects/Portable/hand_written.jsonl. Errors are
standard errors by bootstrap over photos.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))  # if other code runs this file
PROJECT = Path(__file__).resolve().parents[1] / "projects" / "Portable"
sys.path.insert(0, str(PROJECT))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, nargs="+", required=True, metavar="DIR")
    add("--detections", default="detections_nanodet_plus.json", metavar="NAME",
        help="in each folder; default: %(default)s")  # fmt: skip
    add("--split", choices=("train", "choose", "report"), default="report")
    add("--samples", type=Path, metavar="FILE", help="JSON lines {image_id, query, box}, box xyxy")
    add("--pictures", type=int, default=0, metavar="K", help="wins and failures to draw")
    add("--out", type=Path, default=Path("output/portable"), metavar="DIR", help="of the pictures")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = parse_args(argv)

    from portable_study.measure import draw, read_queries, table, template_queries
    from portable_study.photos import read_photos

    try:
        photos = read_photos(args.data, args.detections)
        written = PROJECT / "hand_written.jsonl"
        sets = {
            f"Templates ({args.split})": template_queries(photos, args.split),
            "Hand-written": read_queries(written, photos),
            "Blind, as in the RefCOCO family": read_queries(written, photos, "family"),
            "Blind, hard": read_queries(written, photos, "hard"),
        }
        if args.samples:
            sets["Samples"] = read_queries(args.samples, photos)
        sets = {name: queries for name, queries in sets.items() if queries}
        print(table(photos, sets))
        if args.pictures:
            queries = sets.get("Hand-written") or next(iter(sets.values()))
            wins, failures = draw(photos, queries, args.out, args.pictures)
            print(f"{args.out}: {wins} wins and {failures} failures drawn")
    except (ImportError, OSError, ValueError) as error:
        print(f"portable_table: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    from interrupts import exit_with

    exit_with(main)
