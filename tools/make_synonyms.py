#!/usr/bin/env python
"""Make the table of synonyms for the categories of COCO and LVIS from WordNet.

    apt-get install wordnet-base
    python tools/make_synonyms.py --wordnet /usr/share/wordnet --out vlnms_d2/language/synonyms.json

projects/Category/synonym_sources.json has COCO's synsets and the words that WordNet lacks. LVIS
names its own synsets; Detectron2 has the list.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "projects" / "Category"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wordnet", type=Path, required=True, help="folder of WordNet 3.0's files")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    args = parser.parse_args(argv)

    from category_study.wordnet import write_table

    try:
        write_table(args.wordnet, args.out)
    except FileNotFoundError as error:
        print(
            f"make_synonyms: {error}; --wordnet expects the folder with data.noun, index.* and "
            "cntlist.rev (apt-get install wordnet-base)",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    from interrupts import exit_with

    exit_with(main)
