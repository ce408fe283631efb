"""Registering folders of data sets in Detectron2's catalogs, under names of your own.

Nothing is read before a data set is asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from .entries import check_images
from .flickr30k_entities import SPLITS as FLICKR30K_SPLITS
from .flickr30k_entities import load_flickr30k_entities
from .karpathy import load_karpathy
from .known_sizes import check_counts
from .refer import load_refer

logger = logging.getLogger(__name__)

Loader = Callable[[], list[dict[str, Any]]]


def register_refer(
    root: str | Path,
    name: str,
    *,
    refs_file: str = "refs(unc).p",
    image_root: str | Path | None = None,
    splits: Sequence[str] = ("train", "val", "testA", "testB"),
    categories: Mapping[int, str] | None = None,
    images_from: str = "",
) -> None:
    """Register a folder in the format of REFER: `{name}_{split}` for each split.

    Args:
        root: folder with the refs and `instances.json`.
        name: first part of the names.
        refs_file: the pickled refs in `root`, as `refs(unc).p`; they say which split they are of.
        image_root: folder of the images; None: `root/images`.
        splits: those to register.
        categories: name of each category id of `instances.json`; None: the 80 of COCO.
        images_from: a sentence on where to get the images, for error messages.
    """
    root = Path(root)
    categories = dict(sorted((coco_categories() if categories is None else categories).items()))
    classes = {category_id: number for number, category_id in enumerate(categories)}
    for split in splits:
        load = partial(
            load_refer,
            root / refs_file,
            root / "instances.json",
            root / "images" if image_root is None else image_root,
            split=split,
            classes=classes,
        )
        _register_expressions(
            f"{name}_{split}",
            partial(_load_checked, f"{name}_{split}", load, images_from),
            thing_classes=list(categories.values()),
            thing_dataset_id_to_contiguous_id=classes,
        )


def register_flickr30k_entities(
    root: str | Path,
    name: str = "flickr30k_entities",
    *,
    image_root: str | Path | None = None,
    splits: Sequence[str] = FLICKR30K_SPLITS,
    images_from: str = "",
) -> None:
    """Register a folder in the format of Flickr30k Entities: for each split `{name}_{split}`, its
    phrases, and `{name}_captions_{split}`, its sentences; see `load_flickr30k_entities`.

    Args:
        root: folder of `Annotations/`, `Sentences/` and a list of image ids `<split>.txt` for
            each split.
        name: first part of the names.
        image_root: folder of the images; None: `root/flickr30k-images`.
        splits: those to register.
        images_from: a sentence on where to get the images, for error messages.
    """
    image_root = Path(root) / "flickr30k-images" if image_root is None else image_root
    for split in splits:
        for kind, captions in (("", False), ("captions_", True)):
            load = partial(
                load_flickr30k_entities, root, image_root, split=split, captions=captions
            )
            full_name = f"{name}_{kind}{split}"
            _register_expressions(full_name, partial(_load_checked, full_name, load, images_from))


def register_karpathy(
    json_file: str | Path,
    name: str,
    *,
    image_root: str | Path,
    splits: Sequence[str] = ("train", "val", "test"),
    images_from: str = "",
) -> None:
    """Register captions in the format of Karpathy's splits: `{name}_{split}` for each split.

    Args:
        json_file: as `dataset_coco.json`.
        name: first part of the names.
        image_root: folder of the images, or of the folders that the file names ("filepath").
        splits: those to register.
        images_from: a sentence on where to get the images, for error messages.
    """
    for split in splits:
        load = partial(load_karpathy, json_file, image_root, split)
        full_name = f"{name}_{split}"
        _register_expressions(full_name, partial(_load_checked, full_name, load, images_from))


def coco_categories() -> dict[int, str]:
    """Names of COCO's 80 categories by their ids (1 to 90), as Detectron2 has them."""
    coco = MetadataCatalog.get("coco_2017_train")
    classes = coco.thing_dataset_id_to_contiguous_id
    return {category_id: coco.thing_classes[number] for category_id, number in classes.items()}


def _load_checked(name: str, load: Loader, images_from: str) -> list[dict]:
    """What a reader gives; missing images are an error at once, not in the midst of training."""
    dataset_dicts = load()
    check_images(dataset_dicts, images_from)
    num_expressions = sum(len(one["expressions"]) for one in dataset_dicts)
    differs = check_counts(name, len(dataset_dicts), num_expressions)
    if differs is not None:
        logger.warning(differs)
    return dataset_dicts


def _register_expressions(name: str, loader: Loader, **metadata: Any) -> None:
    DatasetCatalog.register(name, loader)
    MetadataCatalog.get(name).set(evaluator_type="refer", **metadata)
