#!/usr/bin/env python
"""Write captions of the RefShapes images in the format of Flickr30k Entities.

    python tools/make_refshapes_captions.py --refshapes datasets/refshapes \\
        --out datasets/refshapes_entities --seed 0

Each image has five captions that mention three to six of its objects; see
projects/RefShapes/refshapes/captions.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "projects" / "RefShapes"))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--refshapes",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="written by make_refshapes.py",
    )
    add("--out", type=Path, required=True, metavar="FOLDER", help="folder to write")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    from refshapes.captions import write_captions

    try:
        counts = write_captions(args.refshapes, args.out, args.seed)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{args.out}: captions {', '.join(f'{n} {split}' for split, n in counts.items())}")


if __name__ == "__main__":
    from interrupts import exit_with

    exit_with(main)
