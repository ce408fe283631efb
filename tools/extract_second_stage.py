#!/usr/bin/env python
"""Save the boxes that second stages learn from and choose from, with their features.

    cfg=configs/refshapes
    python tools/extract_second_stage.py --what gt --datasets refshapes_train refshapes_val \\
        --proposals vlnms_fc=$cfg/vlnms_fc_trained.yaml --out output/refshapes/second_stages/cache
    python tools/extract_second_stage.py --what detector vlnms_fc vlnms_trans \\
        --datasets refshapes_val refshapes_testB --proposals vlnms_fc=$cfg/vlnms_fc_trained.yaml \\
        vlnms_trans=$cfg/vlnms_trans_trained.yaml --out output/refshapes/second_stages/cache

"gt" are the annotated boxes, "detector" what the detector itself finds, and each name of
`--proposals` what that VL-NMS keeps for each query down to `--floor`. With `--top N` all of these
keep N boxes, of whatever score, and each VL-NMS is asked every query of the data set on every image
(retrieval); `--group M` asks only those of M images, itself among them, on each (to learn
retrieval from these boxes). Data sets of the same image files are done together, as each image
goes through the detector once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from tqdm import tqdm

from vlnms_d2.config import load_config
from vlnms_d2.engine.command_line import make_parser

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "projects" / "SecondStages"))

from second_stages.extraction import Looked, RegionExtractor
from second_stages.store import (
    DETECTOR,
    GROUND_TRUTH,
    ImageRegions,
    regions_file,
    save_regions,
)

FLOOR = 0.05  # below the thresholds of the real case, which are chosen on val


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--datasets", nargs="+", required=True, metavar="NAME", help="registered names")
    add("--what", nargs="+", required=True, metavar="SOURCE", help="gt, detector, or a VL-NMS")
    add("--proposals", nargs="+", required=True, metavar="NAME=CONFIG", help="of each VL-NMS")
    add("--out", type=Path, required=True, metavar="FOLDER")
    add("--floor", type=float, default=FLOOR, metavar="S", help="least fused score (%(default)s)")
    add("--top", type=int, metavar="N", help="all pairs of images and queries, N boxes for each")
    add("--group", type=int, metavar="M", help="pairs of M images each, with --top")
    add("--overwrite", action="store_true", help="make files anew that are there")
    return parser


def read_configs(args: argparse.Namespace) -> dict[str, CfgNode]:
    """The config of each VL-NMS by name.

    Raises:
        ValueError: an entry is no NAME=CONFIG, or a source of `--what` has no config.
    """
    configs = {}
    for entry in args.proposals:
        name, found, path = entry.partition("=")
        if not found or name in (GROUND_TRUTH, DETECTOR):
            raise ValueError(f"--proposals {entry!r}: expected NAME=CONFIG, as vlnms_fc=fc.yaml")
        cfg = load_config(path)
        cfg.MODEL.MASK_ON = False
        cfg.MODEL.VLNMS.FINAL_SCORE_THRESH = args.floor if args.top is None else 0.0
        if args.top is not None:
            cfg.TEST.DETECTIONS_PER_IMAGE = args.top
        configs[name] = cfg
    unknown = set(args.what) - {GROUND_TRUTH, DETECTOR, *configs}
    if unknown:
        raise ValueError(
            f"--what {min(unknown)}: expected {GROUND_TRUTH}, {DETECTOR} or a name of --proposals "
            f"({', '.join(configs)})"
        )
    return configs


def extract(
    extractor: RegionExtractor,
    looked: Looked,
    source: str,
    dataset_dict: dict,
    expressions: Sequence[dict],
) -> ImageRegions:
    """The boxes of an image from a source; of a VL-NMS, those for the expressions."""
    if source == GROUND_TRUTH:
        return extractor.annotated(looked, dataset_dict)
    if source == DETECTOR:
        return extractor.detected(looked)
    queries = [e["query"] for e in expressions]
    return extractor.query_aware(looked, source, queries, [e["sent_id"] for e in expressions])


def queries_of(
    dataset_dicts: Sequence[dict], args: argparse.Namespace
) -> dict[int, Sequence[dict]]:
    """Per image the expressions that a VL-NMS is asked on it."""
    if args.top is None:
        return {one["image_id"]: one["expressions"] for one in dataset_dicts}
    size = args.group or len(dataset_dicts)
    asked = {}
    for start in range(0, len(dataset_dicts), size):
        group = dataset_dicts[start : start + size]
        expressions = [e for one in group for e in one["expressions"]]
        asked.update({one["image_id"]: expressions for one in group})
    return asked


def missing(args: argparse.Namespace) -> dict[str, list[str]]:
    """Per data set the sources whose file is not there yet."""
    wanted = {}
    for name in args.datasets:
        files = {source: regions_file(args.out, name, source) for source in args.what}
        own = [source for source, path in files.items() if args.overwrite or not path.exists()]
        if own:
            wanted[name] = own
    return wanted


def run(args: argparse.Namespace, configs: Mapping[str, CfgNode]) -> None:
    """Write what is missing, group of data sets by group."""
    wanted = missing(args)
    if not wanted:
        return
    extractor = RegionExtractor(configs)
    datasets = {name: DatasetCatalog.get(name) for name in wanted}
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, images in datasets.items():
        groups.setdefault(tuple(sorted(one["file_name"] for one in images)), []).append(name)
    for files, names in groups.items():
        found = {(name, source): [] for name in names for source in wanted[name]}
        by_file = {name: {one["file_name"]: one for one in datasets[name]} for name in names}
        asked = {name: queries_of(datasets[name], args) for name in names}
        for file in tqdm(files, unit="image", desc=" ".join(names)):
            looked = extractor.look(by_file[names[0]][file])
            for name, source in found:
                one = by_file[name][file]
                found[name, source].append(
                    extract(extractor, looked, source, one, asked[name][one["image_id"]])
                )
        for (name, source), images in found.items():
            save_regions(regions_file(args.out, name, source), images)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.group is not None and (args.top is None or args.group < 1):
        parser.error(f"--group {args.group}: expected a positive number, and --top N with it")
    try:
        configs = read_configs(args)
        run(args, configs)
    except (OSError, KeyError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
