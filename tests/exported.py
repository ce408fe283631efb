"""A small model, a data set of five images and what tests of exports do with them."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import dataset_folders
import torch
from conftest import build
from detectron2.data import DatasetCatalog

from vlnms_d2.data import register_refer
from vlnms_d2.export.job import WORK
from vlnms_d2.export.model import ModelSettings

DATASET = "exported_val"
SAME_IN_OTHER_PROCESSES = "refcoco_unc_val"  # where $DETECTRON2_DATASETS is the folder


def register(root: Path) -> None:
    """Register the data set that `make_dataset` wrote, in this process."""
    if DATASET not in DatasetCatalog.list():
        register_refer(
            root / "refer" / "refcoco",
            "exported",
            image_root=root / "coco" / "train2014",
            splits=("val",),
        )


def make_dataset(root: Path) -> None:
    """Five images of a split, with two sentences each."""
    dataset_folders.make_refer_folder(root)
    refs = dataset_folders._refs(("val",) * 5)
    dataset_folders.dump_python2(refs, root / "refer" / "refcoco" / "refs(unc).p")


def save_model(cfg, folder: Path) -> ModelSettings:
    """Build a model and write its weights and its config."""
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    torch.save({"model": build(cfg).state_dict()}, folder / "weights.pth")
    cfg.MODEL.WEIGHTS = str(folder / "weights.pth")
    (folder / "config.yaml").write_text(cfg.dump())
    return ModelSettings(folder / "config.yaml", DATASET)


def files_of(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def run_with_kills(
    run: Callable[..., object], root: Path, settings: object, out: Path, kills: int, seed: int
) -> int:
    """Run in another process, kill it at random moments, and let the last run end.

    Args:
        run: of a module; called with `settings`.
        root: of the data set.
        settings: of the run, whose folder is `out`.
        out: the folder.
        kills: how many processes to kill.
        seed: of the moments.

    Returns:
        How many were killed in the midst of the work.
    """
    draw = random.Random(seed)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, run.__module__])
    killed = 0
    for _ in range(kills + 1):
        process = context.Process(target=_run_registered, args=(run, root, settings))
        process.start()
        if killed < kills:
            wanted = len(_work(out)) + draw.randint(1, 4)
            while process.is_alive() and len(_work(out)) < wanted:
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.02))
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        killed += 1
        assert not (out / "manifest.json").exists() or (out / WORK).exists()
    assert process.exitcode == 0
    return killed


def _work(out: Path) -> list[Path]:
    return list((out / WORK / "shards").glob("*"))


def _run_registered(run: Callable[..., object], root: Path, settings: object) -> None:
    register(root)
    run(settings)
