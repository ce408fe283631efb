#!/usr/bin/env python
"""Draw RefShapes: images with COCO annotations and REFER expressions, determined by a seed.

    python tools/make_refshapes.py --out datasets/refshapes --seed 0

The same options give byte-identical files, whatever the number of processes.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "projects" / "RefShapes"))

from refshapes.scene import MIN_HEIGHT, MIN_WIDTH

DEFAULT_COUNTS = {"train": 2000, "val": 300, "testA": 300, "testB": 300}


def image_size(text: str) -> tuple[int, int]:
    """Parse `WIDTHxHEIGHT`, in pixels."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size, expected WIDTHxHEIGHT: 384x288")
    width, height = int(match[1]), int(match[2])
    if width < MIN_WIDTH or height < MIN_HEIGHT:
        raise argparse.ArgumentTypeError(
            f"{text} is too small for 20 objects, expected at least {MIN_WIDTH}x{MIN_HEIGHT}"
        )
    return width, height


def _integer_from(least: int):
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is too small, expected at least {least}")
        return value

    return parse


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=_integer_from(0), default=0)
    for split, default in DEFAULT_COUNTS.items():
        parser.add_argument(
            f"--{split}",
            type=_integer_from(0),
            default=default,
            metavar="N",
            help=f"number of {split} images (default %(default)s)",
        )
    parser.add_argument(
        "--size", type=image_size, default=(384, 288), metavar="WxH", help="default 384x288"
    )
    parser.add_argument(
        "--workers",
        type=_integer_from(1),
        default=os.cpu_count() or 1,
        metavar="N",
        help="number of processes (default: one per core)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace another or unfinished data set in --out"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = parse_args(argv)

    from refshapes.expressions import write_expressions
    from refshapes.writer import (
        Settings,
        is_finished,
        prepare_folder,
        write_annotations,
        write_images,
        write_manifest,
    )

    width, height = args.size
    settings = Settings(
        args.seed, width, height, tuple(getattr(args, split) for split in DEFAULT_COUNTS)
    )
    if is_finished(args.out, settings):
        print(f"{args.out} already holds this data set.")
        return 0
    try:
        prepare_folder(args.out, args.overwrite)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    scenes = write_images(args.out, settings, args.workers)
    write_annotations(args.out, scenes)
    write_expressions(scenes, args.out, args.seed)
    write_manifest(args.out, settings)
    objects = sum(len(scene.objects) for scene in scenes)
    print(f"{args.out}: {len(scenes)} images with {objects} objects.")
    return 0


if __name__ == "__main__":
    from interrupts import exit_with

    exit_with(main)
