"""A small model, a data set of five images and what tests of exports do with them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import dataset_folders
import torch
from detectron2.data import DatasetCatalog
from killing import exit_code, kill_at_move
from small_models import build

from vlnms_d2.data import register_refer
from vlnms_d2.export.model import ModelSettings

DATASET = "exported_val"


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
    run: Callable[..., object], root: Path, settings: Any, kills: Iterable[tuple[str, int]]
) -> None:
    """Run in another process, kill it at each of the given points, and let the last run finish.

    Args:
        run: a module's function, called with `settings`.
        root: the folder of the data set.
        settings: the run's settings, with its folder `settings.out`.
        kills: for each process to kill, a folder below `settings.out` and a number N: the process
            is killed just before it moves its N-th file into that folder.
    """
    for kill in [*kills, None]:
        point = kill and (settings.out / kill[0], kill[1])
        code = exit_code(_run_registered, run, root, settings, point)
        assert code == (0 if kill is None else -signal.SIGKILL), kill
        assert (settings.out / "manifest.json").exists() == (kill is None)


def _run_registered(
    run: Callable[..., object], root: Path, settings: Any, kill: tuple[Path, int] | None
) -> None:
    if kill is not None:
        kill_at_move(*kill)
    register(root)
    run(settings)
