"""Running the ablations: training in parallel processes, timing, and the table."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from benchmarks.base import describe_machine
from vlnms_d2.data import GroundingMapper
from vlnms_d2.data.builtin import registered_images
from vlnms_d2.engine.checkpoint import load_weights
from vlnms_d2.file_io import atomic_write, claim, refuse_foreign, write_json
from vlnms_d2.language.nouns import end_with

from .runs import Run, settings
from .seeds import read_results
from .table import Variant, markdown, summarise

TRAIN_NET = Path(__file__).resolve().parents[3] / "tools" / "train_net.py"
POLL_SECONDS = 0.2
WARM_UP_IMAGES = 2


class Session:
    """A process that executes a run.

    Args:
        run: the run.
        threads: maximum number of threads.

    Raises:
        BlockingIOError: another process is executing the run.
    """

    def __init__(self, run: Run, threads: int):
        self.run = run
        self.started = time.monotonic()
        run.folder.mkdir(parents=True, exist_ok=True)
        count = str(threads)
        env = {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}
        with (run.folder / "run.log").open("ab") as log:
            # The process inherits the lock and holds it until it ends.
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if run.digest() is None:
                write_json(run.folder / "settings.json", settings(run.cfg))
            # Its own process group, so that it can be killed with all its workers.
            self.process = subprocess.Popen(
                command(run),
                stdout=log,
                stderr=log,
                env=env,
                start_new_session=True,
                # Its data loader's workers notice by themselves.
                preexec_fn=partial(end_with, os.getpid()),
            )

    def outcome(self) -> str | None:
        """None while the process is running, then "" or a description of the failure."""
        status = self.process.poll()
        if status is None:
            return None
        if status:
            lines = (self.run.folder / "run.log").read_text(errors="replace").splitlines()
            return "\n    ".join([f"exit status {status}; its log ends:", *lines[-12:]])
        try:
            self.run.finish(self.seconds())
        except ValueError as error:
            return str(error)
        return ""

    def seconds(self) -> float:
        return round(time.monotonic() - self.started, 1)

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            self.process.wait()


def run_all(runs: Sequence[Run], jobs: int) -> int:
    """Execute the runs that are not finished, `jobs` in parallel; returns how many failed.

    No process is left running, not even after an exception.
    """
    waiting = deque(run for run in runs if run.done() is None)
    print(f"{len(runs) - len(waiting)} of {len(runs)} runs are done", flush=True)
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    start, failed, sessions = time.monotonic(), 0, []

    def report(text: str) -> None:
        left = f"{len(waiting)} waiting, {len(sessions)} running"
        print(f"[{_clock(time.monotonic() - start)}] {text} ({left})", flush=True)

    try:
        while waiting or sessions:
            while waiting and len(sessions) < jobs:
                run = waiting.popleft()
                try:
                    sessions.append(Session(run, threads))
                    report(f"{run.title} started")
                except BlockingIOError:
                    failed += 1
                    report(f"{run.title} LEFT OUT: another process is at work in {run.folder}")
            time.sleep(POLL_SECONDS)
            for session in list(sessions):
                outcome = session.outcome()
                if outcome is None:
                    continue
                sessions.remove(session)
                failed += bool(outcome)
                title, took = session.run.title, _clock(session.seconds())
                report(f"{title} {'FAILED' if outcome else 'finished'} after {took}")
                if outcome:
                    print(f"    {outcome}", flush=True)
    finally:
        for session in sessions:
            session.kill()
    return failed


def command(run: Run) -> list[str]:
    """The command that trains, resuming after an interruption, and evaluates."""
    python = [sys.executable, "-W", "ignore", str(TRAIN_NET)]
    mode = "--resume" if run.trains else "--eval-only"
    return [*python, "--config-file", str(run.config_file), mode, *run.opts]


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def measure_all(runs: Sequence[Run], num_images: int) -> None:
    """Time the first finished run of each config whose weights exist, unless already done."""
    first = {run.name: run for run in reversed(runs) if run.done() and run.weights.is_file()}
    for run in sorted(first.values(), key=runs.index):
        path = run.folder.parent / "timing.json"
        if path.is_file():
            known = json.loads(path.read_text())
            if (known["digest"], known["requested_images"]) == (run.digest(), num_images):
                continue
        print(f"measuring the extra time of {run.title}", flush=True)
        timing = measure_extra_time(_final_config(run), num_images)
        known = {"digest": run.digest(), "requested_images": num_images, "seed": run.seed}
        write_json(path, timing | known)


def _final_config(run: Run) -> CfgNode:
    """The config of the trained model of a finished run, without the cache of detections."""
    cfg = run.cfg.clone()
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    cfg.MODEL.WEIGHTS = str(run.weights)
    vocabulary = run.folder / "vocab.json"
    if not cfg.MODEL.VLNMS.VOCAB and vocabulary.is_file():
        cfg.MODEL.VLNMS.VOCAB = str(vocabulary)
    return cfg


def measure_extra_time(cfg: CfgNode, num_images: int) -> dict[str, Any]:
    """Time the detector alone, with one expression, and with all expressions of an image.

    Each is timed in a separate pass over the images, as the effects of a query, such as threads
    that still wait for work, can slow down the detector on the next image. Masks are off, as in the
    evaluation of recall.

    Args:
        cfg: config of a trained model; its weights are loaded.
        num_images: number of images, the first of the last test set.

    Returns:
        Medians over the images in ms, and a description of the machine.
    """
    model = build_model(cfg).eval()
    load_weights(cfg, model)
    model.roi_heads.mask_on = False
    mapper = GroundingMapper(cfg, is_train=False)
    images = [mapper(d) for d in registered_images(cfg.DATASETS.TEST[-1])[:num_images]]
    # The number of queries of each image; None for all of its expressions.
    alone, one, every = (1000 * _median_seconds(model, images, n) for n in (0, 1, None))
    return {
        "detector_ms": alone,
        "one_query_ms": one,
        "all_queries_ms": every,
        "queries_per_image": statistics.fmean(len(image["query"]) for image in images),
        "images": len(images),
        "dataset": cfg.DATASETS.TEST[-1],
        "machine": describe_machine(model.device),
    }


def _median_seconds(model: torch.nn.Module, images: list[dict], num_queries: int | None) -> float:
    """The median over the images, each with the first `num_queries` of its queries."""
    for image in images[:WARM_UP_IMAGES]:
        _time_image(model, image, num_queries)
    return statistics.median(_time_image(model, image, num_queries) for image in images)


@torch.no_grad()
def _time_image(model: torch.nn.Module, image: dict, num_queries: int | None) -> float:
    image_input = {key: image[key] for key in ("image", "height", "width")}
    if queries := image["query"][:num_queries]:
        image_input["query"] = queries
    start = time.perf_counter()
    model([image_input])
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - start


def table_files(stem: Path) -> tuple[Path, Path]:
    """The files of `write_table`."""
    return Path(f"{stem}.json"), Path(f"{stem}.md")


def write_table(runs: Sequence[Run], stem: Path, command_line: str) -> None:
    """Write `stem`.md and `stem`.json from the finished runs."""
    variants = {run.name: Variant() for run in runs}
    for run in runs:
        done = run.done()
        if done is None:
            continue
        variant = variants[run.name]
        variant.results[run.seed] = {n: read_results(p) for n, p in run.recall_files().items()}
        variant.seconds[run.seed] = done["seconds"]
        timing = run.folder.parent / "timing.json"
        if timing.is_file():
            variant.timing = json.loads(timing.read_text())
    variants = {name: variant for name, variant in variants.items() if variant.results}
    if not variants:
        print("no run is finished, so there is no table")
        return
    summary = summarise(variants) | {"command": command_line}
    for warning in summary["warnings"]:
        print(f"WARNING: {warning}", flush=True)
    outputs = table_files(stem)
    refuse_foreign(*outputs)
    claim(*outputs)
    write_json(outputs[0], summary)
    with atomic_write(outputs[1]) as file:
        file.write(markdown(summary).encode())
    print(f"wrote {stem}.md and {stem}.json", flush=True)
