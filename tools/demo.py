#!/usr/bin/env python
"""Draw query-aware proposals beside those of the detector alone.

    python tools/demo.py
    python tools/demo.py --input photo.jpg --query "the red cup" --query "left chair"
    python tools/demo.py --input folder 'more/*.png' --query "a dog" --opts MODEL.WEIGHTS my.pth

Without --input the demo draws three scenes itself, which no model was trained on; without --query
it asks three expressions of each and says whether their object is found. It writes one picture per
image and query, and proposals.json.
"""

from __future__ import annotations

import argparse
import glob
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from tqdm import tqdm

from vlnms_d2 import VLNMSPredictor
from vlnms_d2.config import load_config
from vlnms_d2.data.dataset_mapper import read_image
from vlnms_d2.data.datasets.refshapes import SPLITS, STYLES
from vlnms_d2.file_io import atomic_write, write_json
from vlnms_d2.modeling.queries import TakesQueries
from vlnms_d2.visualization import (
    draw_comparison,
    proposal_records,
    query_record,
    result_table,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "projects" / "RefShapes"))

from refshapes.expressions import describe_scene
from refshapes.scene import Scene
from refshapes.writer import Settings, image_file_name, write_images

DEFAULT_CONFIG = Path(__file__).parents[1] / "configs" / "refshapes" / "vlnms_fc_trained.yaml"
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
NUM_SCENES = 3
SCENE_SEED = 2026  # the training set is drawn from another one
SCENE_WIDTH, SCENE_HEIGHT = 384, 288  # as in training
PROPOSALS_VERSION = 1


class Question(NamedTuple):
    """A query, and the box (xyxy in pixels) of the object that it means, if known."""

    text: str
    referent: tuple[float, float, float, float] | None = None


class Job(NamedTuple):
    """An image file, the questions about it, and how its pictures' names begin."""

    path: Path
    questions: Sequence[Question]
    stem: str


# --- what is asked -----------------------------------------------------------------------------


def find_images(inputs: Sequence[str]) -> list[Path]:
    """The image files that files, folders and glob patterns name, each once.

    Raises:
        FileNotFoundError: one of them names none.
    """
    found: dict[Path, Path] = {}
    for text in inputs:
        path = Path(text).expanduser()
        if path.is_dir():
            files = sorted(p for p in path.iterdir() if p.is_file())
            paths = [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES]
        elif path.exists():
            paths = [path]
        else:
            paths = [p for p in map(Path, sorted(glob.glob(str(path)))) if p.is_file()]
        if not paths:
            problem = f"no {', '.join(IMAGE_SUFFIXES)} in" if path.is_dir() else "no such file:"
            raise FileNotFoundError(f"{problem} {text}")
        found.update((p.resolve(), p) for p in paths)
    return list(found.values())


def make_jobs(paths: Sequence[Path], queries: Sequence[str]) -> list[Job]:
    """The same queries for every image; names of pictures differ where those of images do not."""
    questions = [Question(text) for text in queries]
    jobs: dict[str, Job] = {}
    for path in paths:
        stem = path.stem
        while stem in jobs:
            stem += "-2"
        jobs[stem] = Job(path, questions, stem)
    return list(jobs.values())


def draw_scenes(folder: Path, queries: Sequence[str]) -> list[Job]:
    """Write scenes of RefShapes to `folder` and ask `queries`, or expressions of the scenes."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = tuple(NUM_SCENES if split == "testB" else 0 for split in SPLITS)
    settings = Settings(SCENE_SEED, SCENE_WIDTH, SCENE_HEIGHT, counts)
    jobs = []
    for scene in write_images(folder, settings, workers=1):
        path = folder / "images" / image_file_name(scene.image_id)
        questions = [Question(text) for text in queries] or list(scene_questions(scene))
        jobs.append(Job(path, questions, path.stem))
    return jobs


def scene_questions(scene: Scene) -> Iterator[Question]:
    """One expression of each style, of different objects."""
    asked = set()
    for style in STYLES:
        for referent, said in describe_scene(scene, style, SCENE_SEED):
            if referent.id not in asked:
                asked.add(referent.id)
                yield Question(said[0].written, referent.box)
                break


# --- the model ---------------------------------------------------------------------------------


def setup(config_file: Path, opts: Sequence[str]) -> CfgNode:
    """The config of the command line.

    Raises:
        ValueError: config file, options or weights are not as they should be.
    """
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
        OSError, ValueError: weights or vocabulary do not fit, or the model takes no queries.
    """
    predictor = VLNMSPredictor(cfg)
    head = getattr(predictor.model, "roi_heads", None)
    if not isinstance(head, TakesQueries):
        raise ValueError(
            f"MODEL.ROI_HEADS.NAME is {cfg.MODEL.ROI_HEADS.NAME!r}, which takes no queries; "
            "expected VLNMSHead, VLNMSRes5Head or VLNMSCascadeHead"
        )
    if not masks:
        # Masks of hundreds of proposals in a large photo are gigabytes.
        head.mask_on = False
    return predictor


# --- what comes out ----------------------------------------------------------------------------


def answer(
    predictor: VLNMSPredictor,
    image: np.ndarray,
    job: Job,
    class_names: Sequence[str],
    output: Path,
    masks: bool,
) -> dict[str, Any]:
    """Answer the questions about an image; writes one picture each.

    Returns:
        What `proposals.json` says of the image.
    """
    detector, answers = predictor.compare(image, [question.text for question in job.questions])
    detector = detector.to("cpu")
    encoder = predictor.model.roi_heads.vlnms.text_encoder
    records = []
    for number, (question, aware) in enumerate(zip(job.questions, answers, strict=True), 1):
        aware = aware.to("cpu")
        words = encoder.tokenize(question.text)
        attention = aware.word_attention.numpy() if aware.has("word_attention") else None
        found = (question.text, words, attention, detector, aware, class_names)
        picture = draw_comparison(image, *found, referent=question.referent, masks=masks)
        name = f"{job.stem}_{number:02d}_{slug(question.text)}.png"
        with atomic_write(output / name) as file:
            file.write(cv2.imencode(".png", picture)[1].tobytes())
        records.append(query_record(*found, question.referent) | {"picture": name})
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


def report(images: Sequence[dict[str, Any]], output: Path) -> None:
    """Write `proposals.json`, print a table of it."""
    write_json(output / "proposals.json", {"version": PROPOSALS_VERSION, "images": images})
    pictures = sum(len(image["queries"]) for image in images)
    print(f"{result_table(images)}\n\n{output}: {pictures} pictures and proposals.json")


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
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    # It warns of how Detectron2 asks whether it is being traced.
    logging.getLogger("torch.fx").setLevel(logging.ERROR)
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.input and not args.query:
        parser.error('--input needs a question: add --query "the red cup" (once for each query)')
    try:
        paths = find_images(args.input)
        predictor = build_predictor(setup(args.config_file, args.opts), args.masks)
        args.output.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    jobs = (
        make_jobs(paths, args.query) if paths else draw_scenes(args.output / "scenes", args.query)
    )
    # The predictor has the metadata of the first test set, if the config names one.
    names = predictor.metadata.get("thing_classes", ()) if predictor.cfg.DATASETS.TEST else ()
    images, failures = [], []
    for job in tqdm(jobs, unit="image", disable=len(jobs) <= NUM_SCENES):
        try:
            image = read_image(job.path, "BGR")
        except (OSError, ValueError) as error:
            failures.append(str(error))
            continue
        images.append(answer(predictor, image, job, names, args.output, args.masks))
    if images:
        report(images, args.output)
    if failures:
        print(f"{len(failures)} of {len(jobs)} files are no images, or damaged:", file=sys.stderr)
        print(*failures, sep="\n", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
