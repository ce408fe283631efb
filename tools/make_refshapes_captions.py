#!/usr/bin/env python
"""Write captions of RefShapes' images, in the format of Flickr30k Entities.

    python tools/make_refshapes_captions.py --refshapes datasets/refshapes \\
        --out datasets/refshapes_entities --seed 0

Five captions an image, each of which lists three to six of its objects; see
`refshapes.captions`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from vlnms_d2.engine.command_line import make_parser

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "projects" / "RefShapes"))

from refshapes.captions import write_captions


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--refshapes", type=Path, required=True, metavar="FOLDER", help="of make_refshapes.py")
    add("--out", type=Path, required=True, metavar="FOLDER", help="folder to write")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        counts = write_captions(args.refshapes, args.out, args.seed)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{args.out}: captions {', '.join(f'{n} {split}' for split, n in counts.items())}")


if __name__ == "__main__":
    main()
