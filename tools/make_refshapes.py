"""Draw RefShapes: images with COCO annotations and REFER expressions, determined by a seed.

Usage::

    python tools/make_refshapes.py --out datasets/refshapes --seed 0
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from vlnms_d2.data.datasets.refshapes import SPLITS

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "projects" / "RefShapes"))

from refshapes.expressions import write_expressions
from refshapes.layout import MIN_HEIGHT, MIN_WIDTH
from refshapes.writer import (
    Settings,
    is_finished,
    prepare_folder,
    write_annotations,
    write_images,
    write_manifest,
)

DEFAULT_COUNTS = {"train": 2000, "val": 300, "testA": 300, "testB": 300}


def image_size(text: str) -> tuple[int, int]:
    """Parses `WIDTHxHEIGHT`, in pixels."""
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=_integer_from(0), default=0)
    for split in SPLITS:
        parser.add_argument(
            f"--{split}",
            type=_integer_from(0),
            default=DEFAULT_COUNTS[split],
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
        help="processes that draw (default: one per core); does not change the result",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace another or unfinished data set in --out"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    width, height = args.size
    settings = Settings(args.seed, width, height, tuple(getattr(args, s) for s in SPLITS))
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
    raise SystemExit(main())
