#!/usr/bin/env python
"""Measure Category on photos by cross-validation, including the rules that were chosen on data.

    python tools/cross_validate_category.py --detections detections.json \\
        --annotations instances.json --captions captions.json --mentions mentions.json

In each fold all rules of a grid (what counts as a mention, the calibration; see
vlnms_d2/language/category_rules.json) are tried on the photos of the other folds. Those with the
highest mean of the recalls at N=5 and N=10 are measured on the fold itself. The files are those of
tools/rerank.py: COCO results before NMS, COCO's instances and captions, and a JSON list of
{caption_id, annotation_ids}.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))  # if other code runs this file
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "projects" / "Category"))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    for name in ("detections", "annotations", "captions", "mentions"):
        add(f"--{name}", type=Path, required=True, metavar="FILE")
    add("--folds", type=int, default=5, metavar="K", help="default: %(default)s")
    add("--seed", type=int, default=0, help="of the assignment of photos to folds")
    add("--json", type=Path, metavar="FILE", help="also write the results to this file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = parse_args(argv)

    from category_study.folds import format_folds, measure
    from vlnms_d2.file_io import claim, refuse_foreign, write_json

    outputs = [args.json] if args.json else []
    try:
        refuse_foreign(*outputs)
        results = measure(
            args.detections,
            args.annotations,
            args.captions,
            args.mentions,
            num_folds=args.folds,
            seed=args.seed,
        )
    except (FileNotFoundError, ImportError, ValueError) as error:
        print(f"cross_validate_category: {error}", file=sys.stderr)
        return 1
    print(format_folds(results))
    print(f"chosen on all photos: {results['chosen_on_all']}\nin use: {results['in_use']}")
    claim(*outputs)
    if args.json:
        write_json(args.json, results)
    return 0


if __name__ == "__main__":
    from interrupts import exit_with

    exit_with(main)
