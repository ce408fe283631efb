#!/usr/bin/env python
"""Choose gamma and the curve of Category for a source of word vectors.

    python tools/calibrate_words.py --dataset refshapes_train
    python tools/calibrate_words.py --dataset refshapes_train --word-vectors glove.840B.300d.txt

Needs a data set whose contextual objects are annotated. Gamma is the one of highest F1 for the
contextual objects; the curve is a logistic regression of whether an expression speaks of a category
that its image has. Use a training split.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from detectron2.data import MetadataCatalog
from tabulate import tabulate

from vlnms_d2.data.pseudo_gt import load_expressions
from vlnms_d2.engine.command_line import make_parser
from vlnms_d2.language.matching import CategoryMatcher, category_matcher
from vlnms_d2.language.nouns import NounFinder
from vlnms_d2.language.word_vectors import load_word_vectors

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "projects" / "Category"))

from category_study.calibration import (
    collect_class_pairs,
    collect_pairs,
    fit_curve,
    try_gammas,
)

GAMMAS = [round(0.2 + 0.05 * i, 2) for i in range(14)]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--dataset", required=True, help="a registered data set")
    parser.add_argument("--word-vectors", default="", help="GloVe-format file; default: MiniLM")
    parser.add_argument("--pipeline", default="", help="spaCy pipeline; default: vlnms_d2's own")
    args = parser.parse_args(argv)

    vectors = load_word_vectors(args.word_vectors)
    names = MetadataCatalog.get(args.dataset).thing_classes
    matcher = CategoryMatcher(names, NounFinder(args.pipeline).nouns, vectors)
    images = load_expressions([args.dataset])
    pairs = collect_pairs(images, matcher)
    results = try_gammas(pairs, GAMMAS)
    best = max(results, key=lambda result: result.f1)
    print(f"{args.dataset}, {vectors.name}: {len(pairs.cosines)} pairs")
    rows = [
        [f"{r.gamma:.2f}{' *' if r is best else ''}"]
        + [f"{100 * value:.2f}" for value in (r.precision, r.recall, r.f1)]
        for r in results
    ]
    print(tabulate(rows, ["gamma", "precision", "recall", "F1"], "pipe", disable_numparse=True))
    own_matcher = category_matcher(names, args.pipeline, args.word_vectors)
    slope, midpoint = fit_curve(collect_class_pairs(images, own_matcher))
    print(f"MODEL.VLNMS.PSEUDO_GT.GAMMA {best.gamma}")
    print(f"MODEL.VLNMS.CATEGORY.SLOPE {slope:.2f} MODEL.VLNMS.CATEGORY.MIDPOINT {midpoint:.3f}")


if __name__ == "__main__":
    main()
