#!/usr/bin/env python
"""Proposals of all (image, caption) pairs of a data set, for image-text matching.

    python tools/export_pairs.py --config-file configs/refshapes/vlnms_fc_trained.yaml \\
        --dataset refshapes_refcoco_testB --top-n 10 --out pairs

    # and those of chosen pairs, JSON lines of [image id, caption id], as SCAN reads them
    python tools/export_pairs.py --config-file ... --dataset flickr30k_captions_test --top-n 36 \\
        --out pairs --scan chosen.jsonl --scan-out scan --split test

docs/exporting.md describes what is written; vlnms_d2.export.PairStore reads it. A killed run goes
on with the same command.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from vlnms_d2.engine.command_line import make_parser, show_counts
from vlnms_d2.engine.launch_options import (
    add_model_options,
    quiet_tracing,
    take_processes,
)
from vlnms_d2.engine.model_settings import ModelSettings
from vlnms_d2.engine.pair_run import DTYPES, PairSettings, run_pairs
from vlnms_d2.export.pairs import PairStore, write_scan
from vlnms_d2.modeling.feature_extraction import LAYERS


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--top-n", type=int, default=10, metavar="N", help="kept a pair; default: %(default)s")
    add("--features", choices=LAYERS, default="detector", dest="layer", help="of the pools")
    add("--dtype", choices=DTYPES, default=DTYPES[0], help="of the pools' features")
    add("--scores", action="store_true", dest="with_scores", help="write s of the proposals too")
    add("--scan", type=Path, metavar="FILE", help="JSON lines of [image id, caption id]")
    add("--scan-out", type=Path, metavar="DIR", help="where those pairs go, as SCAN reads them")
    add("--boxes", type=int, metavar="B", help="of each of them; default: --top-n")
    add("--split", default="test", help="first part of their files' names; default: %(default)s")
    add_model_options(parser)
    args = parser.parse_args(argv)
    if (args.scan is None) != (args.scan_out is None):
        parser.error("--scan and --scan-out go together")
    return args


def read_pairs(path: Path) -> Iterator[tuple[int, int | str]]:
    """The pairs of a file.

    Raises:
        ValueError: a line is none.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                image_id, caption_id = json.loads(line)
                hash((image_id, caption_id))
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{path}, line {number}: expected [image id, caption id] in JSON, found "
                    f"{line[:80]!r}"
                ) from error
            yield image_id, caption_id


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = vars(parse_args(argv))
    quiet_tracing()
    overwrite, scan = args.pop("overwrite"), args.pop("scan")
    scan_out, boxes, split = (args.pop(name) for name in ("scan_out", "boxes", "split"))
    try:
        processes = take_processes(args)
        model = ModelSettings(args.pop("config_file"), args.pop("dataset"), tuple(args.pop("opts")))
        settings = PairSettings(model=model, **args)
        manifest = run_pairs(settings, processes, overwrite)
        if scan is not None and processes.machine_rank == 0:
            store = PairStore(settings.out)
            write_scan(store, read_pairs(scan), boxes or settings.top_n, scan_out, split)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"export_pairs: {error}", file=sys.stderr)
        return 1
    show_counts(manifest["counts"])
    print(", ".join(str(settings.out / name) for name in manifest["published"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
