#!/usr/bin/env python
"""Export a model's proposals for all (image, caption) pairs of a data set, for image-text matching.

    python tools/export_pairs.py --config-file configs/refshapes/vlnms_fc_trained.yaml \\
        --dataset refshapes_refcoco_testB --top-n 10 --out pairs

    # also write some pairs, JSON lines of [image id, caption id], in SCAN's format
    python tools/export_pairs.py --config-file ... \\
        --dataset coco_captions_train coco_captions_restval --top-n 36 \\
        --out pairs --scan chosen.jsonl --scan-out scan --split train

docs/exporting.md describes what is written; vlnms_d2.export.PairStore reads it. The same command
resumes an interrupted run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from export_options import (
    LAYERS,
    add_model_options,
    add_test_split_option,
    make_parser,
    show,
    take_model_options,
)
from import_option import add_import_option

if TYPE_CHECKING:
    from vlnms_d2.export import PairStore

DTYPES = ("float32", "float16")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--top-n", type=int, default=10, metavar="N", help="kept per pair; default: %(default)s")
    add("--features", choices=LAYERS, default="detector", dest="layer", help="of the pools")
    add("--dtype", choices=DTYPES, default=DTYPES[0], help="of the pools' features")
    add("--scores", action="store_true", dest="with_scores", help="also write s of the proposals")
    add("--scan", type=Path, metavar="FILE", help="JSON lines of [image id, caption id]")
    add("--scan-out", type=Path, metavar="DIR", help="folder for those pairs, in SCAN's format")
    add("--boxes", type=int, metavar="B", help="of each pair; default: --top-n")
    splits = ("train", "dev", "test")
    add("--split", choices=splits, default="train", help="of the files; default: %(default)s")
    add("--imram", action="store_true", help="name those files as IMRAM reads them")
    add_test_split_option(parser)
    add_model_options(parser, several=True)
    add_import_option(parser)
    args = parser.parse_args(argv)
    if args.boxes is not None and args.boxes < 1:
        parser.error(f"--boxes is {args.boxes}, expected at least 1")
    if (args.scan is None) != (args.scan_out is None):
        parser.error("--scan and --scan-out go together")
    if args.scan is not None and args.split == "test" and not args.allow_test_split:
        parser.error(
            "--split test: SCAN and IMRAM would compare all captions with the boxes of each "
            "image's first caption. Read the pairs with PairStore, or give --allow-test-split."
        )
    return args


def read_pairs(path: Path) -> Iterator[tuple[int, int | str]]:
    """The pairs of a file.

    Raises:
        ValueError: a line is not [image id, caption id].
    """
    from vlnms_d2.file_io import shown

    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                image_id, caption_id = json.loads(line)
                hash((image_id, caption_id))
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{path}, line {number}: expected [image id, caption id] in JSON, found "
                    f"{shown(line[:80])}"
                ) from error
            yield image_id, caption_id


def scan_files(split: str, imram: bool) -> list[str]:
    """The names of the files that `write_scan` writes."""
    from vlnms_d2.export import Imram, Scan

    return [f"{split}_{name}" for name in (Imram if imram else Scan)(1).files()]


def check_scan_out(folder: Path, names: Sequence[str]) -> None:
    """Refuse, before the long export, files of others in `--scan-out`. Those of SCAN itself have
    the same names, and earlier versions of this tool left no manifest to tell theirs.

    Raises:
        ValueError: there are some.
    """
    there = [name for name in names if (folder / name).exists()]
    if there and not (folder / "manifest.json").exists():
        raise ValueError(
            f"{folder / there[0]}: this tool did not write it, as there is no manifest.json, and "
            "would replace it. --overwrite does not change that. Give another --scan-out; or, if "
            f"an earlier version of this tool wrote it, remove {', '.join(there)} from {folder}."
        )


def write_scan(
    store: PairStore,
    pairs: Iterable[tuple[int, int | str]],
    num_boxes: int,
    folder: Path,
    split: str,
    imram: bool = False,
) -> None:
    """Write some pairs in the format `Scan`, a row each.

    Args:
        store: with at least `num_boxes` proposals per pair.
        pairs: ids of image and caption, in the order of the rows.
        num_boxes: per pair.
        folder: the output; an earlier one of this function is replaced.
        split: first part of the file names.
        imram: in the format `Imram`.

    Raises:
        ValueError: the store has fewer proposals per pair, or lacks an image or a caption; or the
            folder has files of these names that this function did not write.
    """
    from vlnms_d2.export import Imram, Scan
    from vlnms_d2.export.job import OutputFolder
    from vlnms_d2.file_io import shown

    if not 1 <= num_boxes <= store.index.shape[2]:
        raise ValueError(
            f"{num_boxes} boxes are asked for, but the store has {store.index.shape[2]} a pair; "
            "make it with a larger --top-n"
        )
    scan = (Imram if imram else Scan)(num_boxes)
    names = scan_files(split, imram)
    output = OutputFolder(folder)
    with output.begin({"scan": names, "boxes": num_boxes}, overwrite=True, outputs=names):
        with (output.work / "pairs").open("wb") as shard:
            for image_id, caption_id in pairs:
                try:
                    numbers = store.image_number(image_id), store.caption_number(caption_id)
                except KeyError as error:
                    raise ValueError(
                        f"the store lacks image or caption of {shown([image_id, caption_id])}. "
                        "Export pairs of their data set."
                    ) from error
                caption = store.captions[numbers[1]].caption
                features = store.proposals(*numbers).features
                scan.write_pair(shard, split, caption_id, caption, features)
        scan.merge([output.work / "pairs"], output.work / "scan")
        for name in names:
            (output.work / "scan" / name).replace(output.work / name)
            output.publish(name)
        output.finish({})


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = vars(parse_args(argv))
    overwrite, scan = args.pop("overwrite"), args.pop("scan")
    scan_out, boxes, split = (args.pop(name) for name in ("scan_out", "boxes", "split"))
    imram, _ = args.pop("imram"), args.pop("allow_test_split")
    try:
        from vlnms_d2.export import PairStore
        from vlnms_d2.export.pairs import PairSettings, run_pairs

        model, processes = take_model_options(args)
        settings = PairSettings(model=model, **args)
        if scan is not None:
            check_scan_out(scan_out, scan_files(split, imram))
        manifest = run_pairs(settings, processes, overwrite)
        if scan is not None and processes.is_main:
            store = PairStore(settings.out)
            boxes = boxes or settings.top_n
            write_scan(store, read_pairs(scan), boxes, scan_out, split, imram)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"export_pairs: {error}", file=sys.stderr)
        return 1
    show(manifest, settings.out)
    return 0


if __name__ == "__main__":
    from interrupts import exit_with

    exit_with(main)
