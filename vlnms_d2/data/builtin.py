"""Registers the data sets that come with the plugin, under `$DETECTRON2_DATASETS`."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from .refer import load_refer, merge_by_image
from .refshapes.scene import CATEGORIES, MANNERS, SPLITS


def register_refshapes(root: str | Path, name: str = "refshapes") -> None:
    """Register RefShapes as `tools/make_refshapes.py` wrote it.

    For each split: `{name}_{split}` has the expressions of all three manners,
    `{name}_{manner}_{split}` those of one, and `{name}_instances_{split}` is the plain detection
    data set. Nothing is read before a data set is asked for.

    Args:
        root: the folder given to `--out`.
        name: first part of the names.
    """
    root = Path(root)
    images = root / "images"
    for split in SPLITS:
        register_coco_instances(
            f"{name}_instances_{split}",
            {},
            str(root / "annotations" / f"instances_{split}.json"),
            str(images),
        )
        loaders = {manner: partial(_load_manner, root, split, manner) for manner in MANNERS}
        for manner, loader in loaders.items():
            _register_expressions(f"{name}_{manner}_{split}", loader)
        _register_expressions(f"{name}_{split}", partial(_load_all, list(loaders.values())))


def _load_manner(root: Path, split: str, manner: str) -> list[dict]:
    return load_refer(
        root / f"refs({manner}).p",
        root / "instances.json",
        root / "images",
        split=split,
        contexts_file=root / "contexts.json",
        manner=manner,
    )


def _load_all(loaders) -> list[dict]:
    return merge_by_image(*(load() for load in loaders))


def _register_expressions(name: str, loader) -> None:
    DatasetCatalog.register(name, loader)
    MetadataCatalog.get(name).set(evaluator_type="refer", thing_classes=list(CATEGORIES))


def datasets_root() -> Path:
    """The folder of all data sets, read as Detectron2 reads it."""
    return Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser()


register_refshapes(datasets_root() / "refshapes")
