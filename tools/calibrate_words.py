#!/usr/bin/env python
"""Choose gamma and the calibration of Category for a source of word vectors.

    python tools/calibrate_words.py --dataset refshapes_train
    python tools/calibrate_words.py --dataset refshapes_train --word-vectors glove.840B.300d.txt

The data set must have annotated contextual objects; use a training split. Gamma has the highest F1
for the contextual objects; the calibration is a logistic regression of whether an expression
mentions a category that is present in its image.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))  # if other code runs this file

from import_option import add_import_option

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "projects" / "Category"))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", required=True, help="a registered data set")
    parser.add_argument("--word-vectors", default="", help="GloVe-format file; default: MiniLM")
    parser.add_argument("--pipeline", default="", help="spaCy pipeline; default: vlnms_d2's own")
    add_import_option(parser)
    args = parser.parse_args(argv)

    from detectron2.data import DatasetCatalog

    from category_study.calibration import calibrate

    if args.dataset not in DatasetCatalog:
        parser.error(f"--dataset {args.dataset}: no such data set is registered")
    print(calibrate(args.dataset, args.word_vectors, args.pipeline))


if __name__ == "__main__":
    from interrupts import exit_with

    exit_with(main)
