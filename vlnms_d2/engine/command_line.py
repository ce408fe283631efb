"""What the command lines of the tools share."""

from __future__ import annotations

import argparse


def make_parser(doc: str, more: str = "") -> argparse.ArgumentParser:
    """A parser that shows a tool's docstring: its first paragraph before the options, the others
    after them.

    Args:
        doc: the docstring.
        more: shown at the end.
    """
    description, _, epilog = doc.partition("\n\n")
    return argparse.ArgumentParser(
        description=description,
        epilog=epilog + more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_cut_options(
    parser: argparse.ArgumentParser, top_n: str = "kept a query", mean: str = ""
) -> None:
    """How many proposals a query keeps, in one of three ways; see `check_cut`.

    Args:
        top_n: help for `--top-n`.
        mean: more help for `--mean-proposals`.
    """
    add = parser.add_mutually_exclusive_group().add_argument
    add("--top-n", type=int, metavar="N", help=top_n)
    add("--score-thresh", type=float, metavar="T", help="keep s above it, and the best")
    add(
        "--mean-proposals",
        type=float,
        metavar="M",
        help=f"keep s above the threshold that leaves so many a query{mean}",
    )


def show_counts(counts: dict[str, int | float]) -> None:
    """Print what a manifest counts."""
    for key, value in counts.items():
        shown = f"{value:.2f}" if isinstance(value, float) else f"{value:,}"
        print(f"{key.replace('_', ' ')}: {shown}")
