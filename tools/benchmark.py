#!/usr/bin/env python
"""Measure the costs of queries.

    python tools/benchmark.py memory --json memory.json
    python tools/benchmark.py memory --config-file configs/refshapes/vlnms_fc_additive.yaml \\
        --queries 1 1000 --opts MODEL.VLNMS.CHUNK_MEMORY_MB 64
    python tools/benchmark.py overhead grounding_dino --plot time.png
    python tools/benchmark.py all --device cuda

Weights are random, as time and memory do not depend on them. A benchmark ignores the options that
it does not use.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import BENCHMARKS, Options
from import_option import add_import_option


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    listed = "\n".join(f"  {name}: {entry.help}" for name, entry in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"benchmarks:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    defaults = Options()
    add = parser.add_argument
    add("what", nargs="+", choices=[*BENCHMARKS, "all"])
    add("--device", choices=["cpu", "cuda"], default=defaults.device)
    add("--config-file", type=Path, metavar="FILE", help="config to use")
    add("--candidates", type=int, default=defaults.candidates, metavar="N")
    add("--queries", type=int, nargs="+", metavar="Q", help="numbers of queries")
    add(
        "--captions",
        type=int,
        default=defaults.captions,
        metavar="N",
        help="distinct texts",
    )
    add("--lines", type=int, default=defaults.lines, metavar="N", help="word vectors")
    add(
        "--rounds",
        type=int,
        default=defaults.rounds,
        metavar="N",
        help="timings of each side",
    )
    add("--json", type=Path, metavar="FILE", help="file for the results")
    add("--plot", type=Path, metavar="FILE", help="PNG of time over queries, of overhead")
    rest = argparse.REMAINDER
    add("--opts", nargs=rest, default=[], metavar="KEY VALUE", help="to change the config; last")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = build_parser()
    add_import_option(parser)
    args = parser.parse_args(argv)
    counts = [args.candidates, args.captions, args.lines, args.rounds, *(args.queries or [1])]
    if min(counts) < 1:
        parser.error("--candidates, --captions, --lines, --rounds and --queries must be at least 1")
    options = Options(
        device=args.device,
        config_file=args.config_file,
        opts=args.opts,
        queries=args.queries,
        candidates=args.candidates,
        captions=args.captions,
        rounds=args.rounds,
        lines=args.lines,
    )
    if args.plot and not {"overhead", "all"} & set(args.what):
        parser.error("--plot draws what overhead measures; give overhead, or all")

    outputs = [path for path in (args.json, args.plot) if path]
    if args.json and args.json == args.plot:
        parser.error(f"--json and --plot are the same file, {args.json}")

    import torch

    from vlnms_d2.file_io import claim, refuse_foreign, write_json

    refuse_foreign(*outputs)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU; use --device cpu")
    results = {}
    everything = "all" in args.what
    for name in BENCHMARKS if everything else dict.fromkeys(args.what):
        benchmark = BENCHMARKS[name].load()
        try:
            results[name] = benchmark.measure(options)
        except ValueError as error:
            if not everything:
                parser.error(f"{name}: {error}")
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        print(benchmark.show(results[name]), flush=True)
    claim(*outputs)
    if args.json:
        write_json(args.json, results)
    if args.plot and "overhead" in results:
        from benchmarks.overhead import plot_time

        plot_time(results, args.plot)
    return 0


if __name__ == "__main__":
    from interrupts import exit_with

    exit_with(main)
