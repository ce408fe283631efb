"""Registration of RefShapes, the drawn data set that `tools/make_refshapes.py` writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from .refer import load_refer, merge_by_image

CATEGORIES = (
    "ball",
    "cup",
    "key",
    "tree",
    "house",
    "car",
    "fish",
    "flower",
    "umbrella",
    "chair",
    "clock",
    "book",
    "bird",
    "boat",
    "hat",
    "bottle",
)
"""Category names; the COCO category id is the position plus one."""

SPLITS = ("train", "val", "testA", "testB")
STYLES = ("refcoco", "refcoco+", "refcocog")
"""Styles of expressions, each named after the real data set that it imitates."""


def register_refshapes(root: str | Path, name: str = "refshapes") -> None:
    """Register a folder written by `tools/make_refshapes.py`. Nothing is read until a data set is
    requested from the catalog.

    For each split, `{name}_{split}` has the expressions of all three styles,
    `{name}_{style}_{split}` those of one, and `{name}_instances_{split}` is the plain detection
    data set. `{name}_referents_{split}` is `{name}_{split}` without the contextual objects, as in
    RefCOCO: pseudo ground truth is made for it and measured on it.

    Args:
        root: the folder given to `--out`.
        name: prefix of the registered names.
    """
    root = Path(root)
    for split in SPLITS:
        register_coco_instances(
            f"{name}_instances_{split}",
            _metadata(),
            str(root / "annotations" / f"instances_{split}.json"),
            str(root / "images"),
        )
        for style in STYLES:
            _register(f"{name}_{style}_{split}", partial(_load, root, split, [style]))
        _register(f"{name}_{split}", partial(_load, root, split, STYLES))
        _register(
            f"{name}_referents_{split}", partial(_load, root, split, STYLES, with_contexts=False)
        )


def _register(name: str, loader: Callable[[], list[dict[str, Any]]]) -> None:
    DatasetCatalog.register(name, loader)
    MetadataCatalog.get(name).set(evaluator_type="refer", **_metadata())


def _metadata() -> dict[str, Any]:
    class_of = {number + 1: number for number in range(len(CATEGORIES))}
    return {"thing_classes": list(CATEGORIES), "thing_dataset_id_to_contiguous_id": class_of}


def _load(
    root: Path, split: str, styles: Sequence[str], with_contexts: bool = True
) -> list[dict[str, Any]]:
    parts = [
        load_refer(
            root / f"refs({style}).p",
            root / "instances.json",
            root / "images",
            split=split,
            contexts_file=root / "contexts.json" if with_contexts else None,
            manner=style,
        )
        for style in styles
    ]
    return parts[0] if len(parts) == 1 else merge_by_image(*parts)
