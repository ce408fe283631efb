#!/usr/bin/env python
"""Train the small spaCy pipeline that tags the nouns of referring expressions.

    python tools/train_tagger.py --treebank datasets/ud_english_ewt --out en_ud_pos

The treebank is UD English EWT (CC BY-SA 4.0): the files en_ewt-ud-{train,dev,test}.conllu of the
repository UD_English-EWT, https://universaldependencies.org. Training takes about six minutes on
one core; the same seed gives the same pipeline.
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
    parser.add_argument("--treebank", type=Path, required=True, help="folder of the CoNLL-U files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pipeline")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    add_import_option(parser)
    args = parser.parse_args(argv)
    if args.epochs < 1:
        parser.error(f"--epochs is {args.epochs}, expected at least 1")

    from category_study.tagger import make_tagger

    try:
        make_tagger(args.treebank, args.out, epochs=args.epochs, seed=args.seed)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
