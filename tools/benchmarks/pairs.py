"""Rate at which (image, caption) pairs are answered for images whose candidates are stored."""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from vlnms_d2.config import default_config
from vlnms_d2.export.job import Shards
from vlnms_d2.export.pairs import PAIRS, POOL, ScoredPool, choose, merge_rows, save_arrays
from vlnms_d2.export.workers import Processes, Workers, one_thread
from vlnms_d2.modeling.roi_heads import QueryConditionedMixin
from vlnms_d2.modeling.text import TextFeatures

from .base import Benchmark, Options, describe_machine, show_machine

CONFIG = Path(__file__).parents[2] / "configs" / "refcoco" / "vlnms_fc.yaml"
PROCESSES = 2
TOP_N = 10
WORDS = 12  # of a caption
MIN_PAIRS = 50_000  # 100 images x 500 captions
WHOLE = (1000, 5000)  # images, captions of the projection
IMAGE_SIZE = (480, 640)
BOXES_PER_OBJECT = 6


class Pairs(Benchmark):
    """Relatedness, NMS, selection and writing for stored candidates, in two processes of one thread
    each. Weights, candidates and text are random; each object of an image has several boxes, as
    input for NMS.
    """

    def measure(self, options: Options) -> dict[str, Any]:
        """See `Benchmark.measure`.

        "pairs_per_second" is the rate of all processes together, without loading the model and
        encoding the text; "pairs_per_cpu_second" the rate per CPU time, which depends less on other
        load; "seconds_projected" and "bytes_projected" are for the pairs of `WHOLE`.
        """
        if options.device != "cpu":
            raise ValueError("pairs are measured on the CPU only; leave --device out")
        cfg = options.load_config(CONFIG)
        cfg.TEST.DETECTIONS_PER_IMAGE = TOP_N
        captions = options.captions
        num_images = PROCESSES + max(10 * PROCESSES, -(-MIN_PAIRS // captions))
        with tempfile.TemporaryDirectory() as folder:
            shards = Shards(Path(folder), num_images)
            settings = _Settings(shards, cfg.dump(), options.candidates, captions)
            # The first image of each process is a warm-up and not counted.
            with Workers(Processes(processes=PROCESSES), _Worker, settings) as workers:
                workers.run("answer", range(num_images))
            counted = [json.loads(path.read_bytes()) for path in shards.paths("times")]
            index = Path(folder) / "index.npy"
            merge_rows(list(shards.paths(PAIRS)), "index", index)
            bytes_per_pair = index.stat().st_size / (num_images * captions)
        counted = [one for one in counted if one is not None]
        seconds = max(end for _, end, _ in counted) - min(start for start, _, _ in counted)
        per_second = len(counted) * captions / seconds
        cpu_seconds = sum(spent for _, _, spent in counted)
        whole_images, whole_captions = WHOLE
        return {
            "relatedness": cfg.MODEL.VLNMS.RELATEDNESS,
            "candidates": options.candidates,
            "images": len(counted),
            "captions": captions,
            "top_n": TOP_N,
            "processes": PROCESSES,
            "pairs_per_second": round(per_second, 1),
            "pairs_per_cpu_second": round(len(counted) * captions / cpu_seconds, 1),
            "seconds_projected": round(whole_images * whole_captions / per_second, 1),
            "bytes_projected": round(whole_images * whole_captions * bytes_per_pair),
            "load_average": os.getloadavg()[0],
            "machine": describe_machine(options.torch_device),
        }

    def show(self, results: dict[str, Any]) -> str:
        """See `Benchmark.show`."""
        images, captions = WHOLE
        return (
            f"{results['relatedness']}, {results['candidates']} candidates, {results['images']} "
            f"images x {results['captions']:,} captions on {results['processes']} processes:\n"
            f"{results['pairs_per_second']:,.0f} pairs a second, "
            f"{results['pairs_per_cpu_second']:,.0f} a second of one core at work\n"
            f"{images:,} x {captions:,} pairs: {results['seconds_projected']:,.0f} s and "
            f"{results['bytes_projected'] / 1e6:.1f} MB besides the pools (projected)\n"
            f"{show_machine(results)}, load average {results['load_average']:.1f}"
        )


@dataclass(frozen=True)
class _Settings:
    shards: Shards
    config_text: str
    num_candidates: int
    num_captions: int


class _Worker:
    """Answers the captions on images and records the times."""

    def __init__(self, settings: _Settings):
        self.settings = settings
        cfg = default_config()
        cfg.merge_from_other_cfg(CfgNode.load_cfg(settings.config_text))
        head = build_model(cfg).eval().roi_heads
        self.head, self.text = head, _made_up_text(head, settings.num_captions)
        self.num_classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
        self.visual_dim = head.vlnms.relatedness.mlp_b[0].in_features
        self.is_warm = False

    def answer(self, number: int) -> None:
        """Store the candidates of an image, then answer all captions and record the time."""
        shards = self.settings.shards
        rng = np.random.default_rng(number)
        pool = _made_up_pool(rng, self.settings.num_candidates, self.num_classes, self.visual_dim)
        pool.save(shards.path(number, POOL))
        start, spent = time.time(), time.process_time()
        with one_thread():
            pool = ScoredPool.load(shards.path(number, POOL))
            selection = choose(self.head, self.text, pool, TOP_N)
        save_arrays(shards.path(number, PAIRS), selection)
        span = [start, time.time(), time.process_time() - spent] if self.is_warm else None
        shards.path(number, "times").write_text(json.dumps(span))
        self.is_warm = True


def _made_up_text(head: QueryConditionedMixin, count: int) -> TextFeatures:
    torch.manual_seed(0)
    words = torch.randn(count, WORDS, head.vlnms.text_encoder.output_dim)
    with torch.no_grad():
        text = TextFeatures(words, torch.ones(count, WORDS, dtype=torch.bool))
        return head.vlnms.relatedness.condense(text)


def _made_up_pool(
    rng: np.random.Generator, count: int, num_classes: int, visual_dim: int
) -> ScoredPool:
    num_objects = -(-count // BOXES_PER_OBJECT)
    of = np.arange(count) % num_objects
    height, width = IMAGE_SIZE
    corners = rng.uniform(10, [0.7 * width, 0.7 * height], (num_objects, 2))
    sizes = rng.uniform(30, [0.25 * width, 0.25 * height], (num_objects, 2))
    boxes = np.concatenate([corners, corners + sizes], axis=1)[of] + rng.normal(0, 6, (count, 4))
    boxes = boxes.clip(0, [width, height, width, height]).astype(np.float32)
    return ScoredPool(
        input_boxes=boxes,
        boxes=boxes,
        scores=rng.uniform(0.05, 1, count).astype(np.float32),
        classes=rng.integers(0, num_classes, num_objects)[of],
        has_area=np.ones(count, dtype=bool),
        visual=rng.standard_normal((count, visual_dim), dtype=np.float32),
        features=np.zeros((count, 0), dtype=np.float32),
        input_size=np.array(IMAGE_SIZE),
        image_size=np.array(IMAGE_SIZE),
    )
