#!/usr/bin/env python
"""Draw query-aware proposals beside those of the detector alone.

    python tools/demo.py
    python tools/demo.py --input photo.jpg --query "the red cup" --query "left chair"
    python tools/demo.py --input folder 'more/*.png' --query "a dog" --opts MODEL.WEIGHTS my.pth

Without --input the images are the three scenes in tools/demo_scenes; without --query each scene is
asked its own questions, whose objects are known. Writes one picture per image and query, and
proposals.json.
"""

from __future__ import annotations

import argparse
import glob
import json
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.append(str(Path(__file__).resolve().parent))  # if other code runs this file

from import_option import add_import_option

if TYPE_CHECKING:
    import numpy as np
    from detectron2.config import CfgNode
    from detectron2.structures import Instances

    from vlnms_d2 import VLNMSPredictor

DEFAULT_CONFIG = Path(__file__).parents[1] / "configs" / "refshapes" / "vlnms_fc_trained.yaml"
SCENES = Path(__file__).parent / "demo_scenes" / "scenes.json"
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
PROPOSALS_VERSION = 1
MAX_QUERY, QUERY_COLUMN = 120, 30  # characters of a query in the table, and in one line of it


class Job(NamedTuple):
    """An image and what is asked about it.

    Attributes:
        path: of the image file.
        questions: dictionaries with a `query`, and the `box` (xyxy in pixels) of the object that
            it means, if known.
        stem: how the names of its pictures begin.
    """

    path: Path
    questions: Sequence[dict[str, Any]]
    stem: str


def find_images(inputs: Sequence[str]) -> list[Path]:
    """The image files that files, folders and glob patterns name, each once.

    Raises:
        FileNotFoundError: one of them names none.
    """
    images: dict[Path, Path] = {}
    for text in inputs:
        path = Path(text).expanduser()
        if path.is_dir():
            paths = [p for p in sorted(path.iterdir()) if p.suffix.lower() in IMAGE_SUFFIXES]
        else:
            paths = [path] if path.exists() else map(Path, sorted(glob.glob(str(path))))
        paths = [p for p in paths if p.is_file()]
        if not paths:
            problem = f"no {', '.join(IMAGE_SUFFIXES)} in" if path.is_dir() else "no such file:"
            raise FileNotFoundError(f"{problem} {text}")
        images.update((p.resolve(), p) for p in paths)
    return list(images.values())


def make_jobs(paths: Sequence[Path], queries: Sequence[str]) -> list[Job]:
    """The same queries for every image; images of the same name get different stems."""
    questions = [{"query": query} for query in queries]
    jobs: dict[str, Job] = {}
    for path in paths:
        stem = path.stem
        while stem in jobs:
            stem += "-2"
        jobs[stem] = Job(path, questions, stem)
    return list(jobs.values())


def scene_jobs() -> list[Job]:
    """The committed scenes with their questions."""
    scenes = json.loads(SCENES.read_text())["scenes"]
    paths = [SCENES.parent / scene["file"] for scene in scenes]
    return [Job(p, scene["questions"], p.stem) for p, scene in zip(paths, scenes, strict=True)]


def setup(config_file: Path, opts: Sequence[str]) -> CfgNode:
    """The config of the command line.

    Raises:
        ValueError: config file, options or weights cannot be used.
    """
    import torch

    from vlnms_d2.config import load_config

    try:
        cfg = load_config(config_file, opts)
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(f"{config_file}, {' '.join(opts) or 'no options'}: {error}") from error
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.VLNMS.OUTPUT_ATTENTION = True
    weights = cfg.MODEL.WEIGHTS
    if "://" not in weights and not Path(weights).is_file():
        raise ValueError(
            f"no weights file {weights!r} (MODEL.WEIGHTS of {config_file}). Train a model with "
            "'python tools/train_net.py --config-file configs/refshapes/vlnms_fc.yaml', and give "
            "its weights and vocabulary with '--opts MODEL.WEIGHTS model_final.pth "
            "MODEL.VLNMS.VOCAB vocab.json'"
        )
    return cfg


def build_predictor(cfg: CfgNode, masks: bool) -> VLNMSPredictor:
    """The model with its weights.

    Raises:
        OSError, ValueError: weights or vocabulary do not fit, or the model accepts no queries.
    """
    from vlnms_d2 import VLNMSPredictor

    predictor = VLNMSPredictor(cfg)
    if not masks:
        # Masks of hundreds of proposals in a large photo are gigabytes.
        predictor.model.roi_heads.mask_on = False
    return predictor


def picture_name(job: Job, number: int) -> str:
    """The picture of a question, numbered from 1."""
    return f"{job.stem}_{number:02d}_{slug(job.questions[number - 1]['query'])}.png"


def output_paths(output: Path, jobs: Sequence[Job]) -> list[Path]:
    """The files that the tool writes."""
    names = [picture_name(job, n + 1) for job in jobs for n in range(len(job.questions))]
    return [output / name for name in (*names, "proposals.json")]


def answer(
    predictor: VLNMSPredictor, image: np.ndarray, job: Job, output: Path, masks: bool
) -> dict[str, Any]:
    """Answer the questions about an image and write one picture for each.

    Returns:
        The image's entry in `proposals.json`.
    """
    import cv2

    from vlnms_d2.file_io import atomic_write
    from vlnms_d2.visualization import draw_comparison, proposal_records

    # The predictor has the metadata of the first test set, if the config names one.
    test_sets = predictor.cfg.DATASETS.TEST
    class_names = predictor.metadata.get("thing_classes", ()) if test_sets else ()
    detector, answers = predictor.compare(image, [question["query"] for question in job.questions])
    detector = detector.to("cpu")
    encoder = predictor.model.roi_heads.vlnms.text_encoder
    records = []
    for number, (question, aware) in enumerate(zip(job.questions, answers, strict=True), 1):
        query, box, aware = question["query"], question.get("box"), aware.to("cpu")
        attention = aware.word_attention.numpy() if aware.has("word_attention") else None
        result = (query, encoder.tokenize(query), attention, detector, aware, class_names)
        picture = draw_comparison(image, *result, referent=box, masks=masks)
        name = picture_name(job, number)
        with atomic_write(output / name) as file:
            file.write(cv2.imencode(".png", picture)[1].tobytes())
        records.append(query_record(*result, box) | {"picture": name})
    return {
        "file": str(job.path),
        "height": image.shape[0],
        "width": image.shape[1],
        "detector": proposal_records(detector, class_names),
        "queries": records,
    }


def slug(query: str) -> str:
    """A query as part of a file name."""
    return re.sub(r"\W+", "-", query.lower())[:40].strip("-") or "query"


def query_record(
    query: str,
    words: Sequence[str],
    attention: np.ndarray | None,
    detector: Instances,
    aware: Instances,
    class_names: Sequence[str],
    referent: Sequence[float] | None = None,
) -> dict[str, Any]:
    """The result of one query, ready for JSON; arguments as for `draw_comparison`.

    Returns:
        `query`, `words`, `attention` (one number per word, or None), `proposals`; and if the
        referent is known `referent`: its `box`, whether it is `hit_by_proposals`, and whether it
        is `hit_by_detector` with the same number of proposals.
    """
    from vlnms_d2.visualization import hits, proposal_records, word_weights

    weights, _ = word_weights(attention, len(words))
    record = {
        "query": query,
        "words": list(words),
        "attention": None if weights is None else weights.tolist(),
        "proposals": proposal_records(aware, class_names),
    }
    if referent is not None:
        record["referent"] = {
            "box": list(referent),
            "hit_by_detector": hits(detector[: len(aware)], referent),
            "hit_by_proposals": hits(aware, referent),
        }
    return record


def result_table(images: Sequence[dict[str, Any]]) -> str:
    """One row per image and query, with whether the referent is hit where it is known.

    Args:
        images: for each image its `file` and, as `queries`, what `query_record` returned.
    """
    from tabulate import tabulate

    from vlnms_d2.visualization import short_number, truncate

    headers, rows, verdicts = ["image", "query", "kept", "best three (class, s)"], [], []
    for image in images:
        for record in image["queries"]:
            proposals = record["proposals"]
            best = ", ".join(f"{p['class']} {short_number(p['s'])}" for p in proposals[:3])
            query = truncate(" ".join(record["query"].split()), MAX_QUERY)
            rows.append([Path(image["file"]).name, query, len(proposals), best])
            if "referent" in record:
                referent = record["referent"]
                verdicts.append((referent["hit_by_detector"], referent["hit_by_proposals"]))
                rows[-1] += ["yes" if hit else "no" for hit in verdicts[-1]]
    headers += ["detector\nfinds it", "with query\nfinds it"] if verdicts else []
    text = tabulate(rows, headers, disable_numparse=True, maxcolwidths=[None, QUERY_COLUMN])
    if verdicts:
        detector, aware = (sum(column) for column in zip(*verdicts, strict=True))
        text += "\n\nObjects found with the same number of proposals: "
        text += f"{detector} of {len(verdicts)} by the detector alone, {aware} with the query"
    return text


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config-file", type=Path, default=DEFAULT_CONFIG, metavar="FILE")
    add("--input", nargs="+", default=[], metavar="PATH", help="files, folders or patterns")
    add("--query", action="append", default=[], help="may be given several times")
    add("--output", type=Path, default=Path("demo_output"), metavar="FOLDER")
    add("--masks", action="store_true", help="draw masks, if the model has them")
    rest = argparse.REMAINDER
    add("--opts", nargs=rest, default=[], metavar="KEY VALUE", help="to change the config; last")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = build_parser()
    add_import_option(parser)
    args = parser.parse_args(argv)
    if args.input and not args.query:
        parser.error('--input needs a question: add --query "the red cup" (once for each query)')

    from tqdm import tqdm

    from vlnms_d2.data.mapper import read_image
    from vlnms_d2.file_io import claim, refuse_foreign, write_json

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    # It warns about how Detectron2 asks whether it is being traced.
    logging.getLogger("torch.fx").setLevel(logging.ERROR)
    try:
        paths = find_images(args.input)
        jobs = [] if paths else scene_jobs()
        if args.query:
            jobs = make_jobs(paths or [job.path for job in jobs], args.query)
        outputs = output_paths(args.output, jobs)
        refuse_foreign(*outputs, inputs=[job.path for job in jobs])
        predictor = build_predictor(setup(args.config_file, args.opts), args.masks)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    images, failures = [], []
    for job in tqdm(jobs, unit="image", disable=not paths):
        try:
            image = read_image(job.path, "BGR")
            predictor.prepare(image, str(job.path))
        except (OSError, ValueError) as error:
            failures.append(str(error))
            continue
        claim(*output_paths(args.output, [job]))
        images.append(answer(predictor, image, job, args.output, args.masks))
    if images:
        write_json(args.output / "proposals.json", {"version": PROPOSALS_VERSION, "images": images})
        pictures = sum(len(image["queries"]) for image in images)
        print(result_table(images))
        if not args.input and not args.query:
            print("These objects were chosen because the detector alone misses them;")
            print("recall on all of RefShapes testB is in docs/results.md.")
        print(f"\n{args.output}: {pictures} pictures and proposals.json")
    if failures:
        print(
            f"{len(failures)} of {len(jobs)} files are no images, damaged or too thin:",
            file=sys.stderr,
        )
        print(*failures, sep="\n", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    from interrupts import exit_with

    exit_with(main)
