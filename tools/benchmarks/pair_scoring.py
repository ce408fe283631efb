"""Rate and memory of comparing stored (image, caption) pairs by stacked cross-attention."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlnms_d2.evaluation import score_pairs
from vlnms_d2.export import PairStore
from vlnms_d2.modeling.text import Vocabulary

from .base import (
    Benchmark,
    Options,
    describe_machine,
    in_fresh_process,
    peak_increase,
    show_machine,
)

IMAGES, BOXES, DIM = 64, 36, 2048  # of the store, per pair, of a feature
WORDS = 12  # of a caption
WHOLE = (1000, 5000)  # images, captions of the projection


class PairScoring(Benchmark):
    """`score_pairs` in one process of one thread, with a model of random weights as large as SCAN's
    and a made-up store."""

    def measure(self, options: Options) -> dict[str, Any]:
        """See `Benchmark.measure`.

        "pairs_per_second" is the rate once the text is encoded, "pairs_per_cpu_second" the rate per
        CPU time, which depends less on other load, and "peak_mib" the increase of peak memory.
        "seconds_projected" is for the pairs of `WHOLE`, whose memory is the same.
        """
        if options.device != "cpu":
            raise ValueError("pair_scoring is measured on the CPU only; leave --device out")
        with tempfile.TemporaryDirectory() as folder:
            _make_store(Path(folder), IMAGES, options.captions, options.candidates)
            seconds, cpu_seconds, peak = in_fresh_process(_score, folder)
        pairs = IMAGES * options.captions
        return {
            "candidates": options.candidates,
            "images": IMAGES,
            "captions": options.captions,
            "boxes": BOXES,
            "pairs_per_second": round(pairs / seconds, 1),
            "pairs_per_cpu_second": round(pairs / cpu_seconds, 1),
            "peak_mib": round(peak, 1),
            "seconds_projected": round(WHOLE[0] * WHOLE[1] / pairs * seconds, 1),
            "load_average": os.getloadavg()[0],
            "machine": describe_machine(options.torch_device),
        }

    def show(self, results: dict[str, Any]) -> str:
        """See `Benchmark.show`."""
        images, captions = WHOLE
        return (
            f"{results['images']} images x {results['captions']:,} captions, {results['boxes']} of "
            f"{results['candidates']} candidates per pair, one process:\n"
            f"{results['pairs_per_second']:,.0f} pairs a second, "
            f"{results['pairs_per_cpu_second']:,.0f} a second of one core at work, "
            f"{results['peak_mib']:,.0f} MiB\n"
            f"{images:,} x {captions:,} pairs: {results['seconds_projected']:,.0f} s (projected)\n"
            f"{show_machine(results)}, load average {results['load_average']:.1f}"
        )


def _score(folder: str) -> tuple[float, float, float]:
    """Seconds, CPU seconds, and the increase of peak memory in MiB."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "projects" / "SecondStages"))
    from second_stages.pair_similarity import TextImageAttention

    torch.manual_seed(0)
    model = TextImageAttention(Vocabulary(map(str, range(8000))), DIM).eval()
    torch.set_num_threads(1)
    with torch.no_grad():
        for caption in PairStore(folder).captions:
            model(torch.zeros(1, 1, 1024), [caption.caption])
    start, spent = time.perf_counter(), time.process_time()
    peak = peak_increase(
        lambda: score_pairs(folder, model, f"{folder}/out", encode_boxes=model.encode_boxes)
    )
    return time.perf_counter() - start, time.process_time() - spent, peak


def _make_store(folder: Path, images: int, captions: int, candidates: int) -> None:
    rng = np.random.default_rng(0)
    (folder / "pools").mkdir()
    rows = images * candidates
    boxes = min(BOXES, candidates)
    chosen = [rng.permuted(np.tile(np.arange(candidates), (captions, 1)), axis=1)[:, :boxes]]
    index = np.array(chosen * images, np.uint16)  # each caption keeps the same of every image
    arrays = {
        "index": index,
        "pools/starts": np.arange(images + 1) * candidates,
        "pools/features": rng.standard_normal((rows, DIM), np.float32),
        "pools/boxes": np.zeros((rows, 4), np.float32),
        "pools/scores": np.zeros(rows, np.float32),
        "pools/classes": np.zeros(rows, np.int64),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    image = {"file_name": "", "height": 0, "width": 0}
    texts = [" ".join(map(str, rng.integers(0, 8000, WORDS))) for _ in range(captions)]
    contents = {
        "images": [image | {"image_id": i} for i in range(images)],
        "captions": [
            {"caption_id": j, "caption": text, "image_id": j % images, "split": None}
            for j, text in enumerate(texts)
        ],
        "manifest": {"outputs": {}},
    }
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
