#!/usr/bin/env python
"""Write the tables of the second stages, mean ± standard deviation over seeds.

    python tools/second_stage_table.py --runs output/refshapes/second_stages/seed* \\
        --out docs/results/refshapes_second_stages

`--runs` are the `--out` folders of tools/train_second_stage.py, one for each seed. Writes
`{out}.md`, and `{out}.json` with the results of every seed that the tables are made of.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

PROJECTS = Path(__file__).resolve().parents[1] / "projects"
sys.path[:0] = [str(PROJECTS / "SecondStages"), str(PROJECTS / "RefShapes")]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", nargs="+", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help="without suffix")
    args = parser.parse_args(argv)

    from second_stages.table import write_tables

    words = [Path(sys.argv[0]).name, *(sys.argv[1:] if argv is None else map(str, argv))]
    try:
        write_tables(args.runs, args.out, f"python tools/{shlex.join(words)}")
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    from interrupts import exit_with

    exit_with(main)
