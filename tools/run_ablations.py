#!/usr/bin/env python
"""Run the ablations: every config with every seed, then one table as Markdown and JSON.

    python tools/run_ablations.py --out output/refshapes/ablations
    python tools/run_ablations.py --out output/few --configs configs/refshapes/vlnms_fc.yaml \\
        --jobs 2 --seeds 0 1 -- SOLVER.MAX_ITER 10

The same command may be given again: what is finished is skipped, what was cut off goes on. It
goes seed by seed, so that a half-done run already gives a whole table of fewer seeds. The runs
share what the frozen detector says of each image (CachedRCNN), in OUT/cache. When all is done,
the extra time per image is measured, without that cache and with nothing else running.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from detectron2.config import CfgNode

from vlnms_d2.engine.command_line import make_parser
from vlnms_d2.file_io import write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "projects" / "RefShapes"))

from ablations.runs import Run, check_settings, plan, settings
from ablations.seeds import read_results
from ablations.table import Variant, markdown, summarise
from ablations.timing import measure_extra_time

REPO = Path(__file__).resolve().parents[1]
TRAIN_NET = REPO / "tools" / "train_net.py"
BRANCHES = (
    "vlnms_fc",
    "vlnms_fc_ranking",
    "vlnms_fc_additive",
    "vlnms_fc_bert",
    "vlnms_trans_joint",
    "vlnms_trans_co_attention",
    "vlnms_trans_no_refinement",
)
NAMES = ["vlnms_category"]
NAMES += [branch + suffix for suffix in ("", "_no_context") for branch in BRANCHES]
POLL_SECONDS = 0.2


class Session:
    """One process at work on a run.

    Args:
        run: the run.
        threads: how many threads it may use.

    Raises:
        BlockingIOError: another process is at work in the run's folder.
    """

    def __init__(self, run: Run, threads: int):
        self.run = run
        self.started = time.monotonic()
        run.folder.mkdir(parents=True, exist_ok=True)
        count = str(threads)
        env = {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}
        with (run.folder / "run.log").open("ab") as log:
            # The process inherits the lock: it lasts as long as the process, whatever becomes of
            # this one.
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if run.digest() is None:
                write_json(run.folder / "settings.json", settings(run.cfg))
            # Its own process group, to be killed with all its workers.
            self.process = subprocess.Popen(
                command(run), stdout=log, stderr=log, env=env, start_new_session=True
            )

    def outcome(self) -> str | None:
        """None while it works; then "" if all went well, otherwise what did not."""
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
    """Run what is not done yet, `jobs` side by side; returns how many failed.

    However it ends, no process is left behind.
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
    """What trains, from wherever an earlier process was cut off, and evaluates."""
    python = [sys.executable, "-W", "ignore", str(TRAIN_NET)]
    mode = "--resume" if run.trains else "--eval-only"
    return [*python, "--config-file", str(run.config_file), mode, *run.opts]


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def measure_all(runs: Sequence[Run], num_images: int) -> None:
    """Measure the first finished run of each config that has its weights, unless that is done."""
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
    """The trained model of a finished run, as a plain detector without the cache."""
    cfg = run.cfg.clone()
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    cfg.MODEL.WEIGHTS = str(run.weights)
    vocabulary = run.folder / "vocab.json"
    if not cfg.MODEL.VLNMS.VOCAB and vocabulary.is_file():
        cfg.MODEL.VLNMS.VOCAB = str(vocabulary)
    return cfg


def write_table(runs: Sequence[Run], stem: Path, command_line: str) -> None:
    """Write `stem`.md and `stem`.json from the runs that are finished."""
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
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_json(f"{stem}.json", summary)
    Path(f"{stem}.md").write_text(markdown(summary))
    print(f"wrote {stem}.md and {stem}.json", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = make_parser(__doc__)
    default_configs = [REPO / "configs" / "refshapes" / f"{name}.yaml" for name in NAMES]
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    parser.add_argument(
        "--configs",
        type=Path,
        nargs="+",
        default=default_configs,
        metavar="FILE",
        help="default: all ablations of configs/refshapes",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side; share the cores")
    parser.add_argument(
        "--table", type=Path, metavar="STEM", help="STEM.md and STEM.json; default: OUT/table"
    )
    parser.add_argument("--table-only", action="store_true", help="run and measure nothing")
    parser.add_argument(
        "--timing-images", type=int, default=30, metavar="N", help="0: do not measure the time"
    )
    parser.add_argument(
        "overrides",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help="for every run; after -- where the option before takes several words",
    )
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error("--jobs must be at least 1")
    overrides = args.overrides[1:] if args.overrides[:1] == ["--"] else args.overrides
    stem = args.table or args.out / "table"
    words = sys.argv[1:] if argv is None else argv
    command_line = shlex.join(["python", "tools/run_ablations.py", *map(str, words)])
    try:
        runs = plan(args.out, args.configs, args.seeds, overrides)
        for run in runs:
            check_settings(run)
    # Detectron2's configs raise any of these at a wrong key or value.
    except (AssertionError, KeyError, ValueError) as error:
        parser.error(str(error))
    failed = 0
    try:
        if not args.table_only:
            failed = run_all(runs, args.jobs)
            if args.timing_images:
                write_table(runs, stem, command_line)
                measure_all(runs, args.timing_images)
        write_table(runs, stem, command_line)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", flush=True)
        return 130
    return 1 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
