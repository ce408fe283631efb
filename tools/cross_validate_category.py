#!/usr/bin/env python
"""Measure Category on photos by cross-validation, and what of it was chosen on data.

    python tools/cross_validate_category.py --detections detections.json \\
        --annotations instances.json --captions captions.json --mentions mentions.json

In each fold all rules of the grid (what counts as a mention, the curve; see
vlnms_d2/language/category_rules.json) are tried on the photos of the other folds; those with the
highest mean of the recalls at N=5 and N=10 are measured on its own. The files are those of
tools/rerank.py: COCO results before NMS, COCO's instances and captions, and a JSON list of
{caption_id, annotation_ids}.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from vlnms_d2.engine.command_line import make_parser
from vlnms_d2.file_io import write_json
from vlnms_d2.language.matching import RULES
from vlnms_d2.language.nouns import NounFinder
from vlnms_d2.language.word_vectors import load_word_vectors

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "projects" / "Category"))

from category_study.folds import (
    assign_folds,
    choose,
    cross_validate,
    format_folds,
    match_category,
    match_reference,
    read_photos,
    rules_grid,
)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    for name in ("detections", "annotations", "captions", "mentions"):
        add(f"--{name}", type=Path, required=True, metavar="FILE")
    add("--folds", type=int, default=5, metavar="K", help="default: %(default)s")
    add("--seed", type=int, default=0, help="of which photo is in which fold")
    add("--json", type=Path, metavar="FILE", help="write the results there as well")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = parse_args(argv)
    try:
        names, photos = read_photos(args.detections, args.annotations, args.captions, args.mentions)
        folds = assign_folds(len(photos), args.folds, args.seed)
        grid = tqdm(rules_grid(), desc="rules", disable=None)
        tried = match_category(photos, names, grid, NounFinder(), load_word_vectors(""))
    except (FileNotFoundError, ImportError, ValueError) as error:
        print(f"cross_validate_category: {error}", file=sys.stderr)
        return 1
    references = {m: match_reference(photos, names, m) for m in ("detector", "oracle")}
    results = cross_validate(tried, references, folds)
    results["chosen_on_all"] = asdict(choose(tried, range(len(photos))))
    results["in_use"] = asdict(RULES)
    print(format_folds(results))
    for number, fold in enumerate(results["folds"]):
        print(
            f"fold {number}: {fold['photos']} photos, {fold['captions']} captions, {fold['rules']}"
        )
    print(f"chosen on all photos: {results['chosen_on_all']}\nin use: {results['in_use']}")
    if args.json:
        write_json(args.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
