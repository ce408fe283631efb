"""Registers data sets in Detectron2's catalogs, and on import those that the plugin knows by name,
under `$DETECTRON2_DATASETS`. `datasets/README.md` shows the tree of folders.

Nothing is read until a data set is requested from the catalog.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from ..file_io import shown
from .datasets.flickr30k import SPLITS as FLICKR30K_SPLITS
from .datasets.flickr30k import load_flickr30k_entities
from .datasets.karpathy import load_karpathy
from .datasets.refer import load_refer, read_refs
from .datasets.refshapes import SPLITS, register_refshapes
from .entries import check_exists, check_images

logger = logging.getLogger(__name__)

COCO = (
    "The images of COCO (train2014, val2014) and its annotations (instances_train2014.json, "
    "instances_val2014.json) come from https://cocodataset.org."
)
FLICKR30K_IMAGES = (
    "The images of Flickr30k (flickr30k-images) come from the University of Illinois, which sends "
    "the address to those who fill in its form: "
    "https://shannon.cs.illinois.edu/DenotationGraph/."
)


# --- folders of your own ---------------------------------------------------------------------


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
        name: prefix of the registered names.
        refs_file: the pickled refs in `root`, such as `refs(unc).p`; each ref names its split.
        image_root: folder of the images; None for `root/images`.
        splits: the splits to register.
        categories: category id of `instances.json` -> name; None for the 80 of COCO.
        images_from: a sentence on where to get the images, for error messages.
    """
    root = Path(root)
    metadata = _metadata(coco_categories() if categories is None else categories)
    for split in splits:
        load = partial(
            load_refer,
            root / refs_file,
            root / "instances.json",
            root / "images" if image_root is None else image_root,
            split=split,
            classes=metadata["thing_dataset_id_to_contiguous_id"],
        )
        _register(f"{name}_{split}", load, images_from, **metadata)


def register_flickr30k_entities(
    root: str | Path,
    name: str = "flickr30k_entities",
    *,
    image_root: str | Path | None = None,
    splits: Sequence[str] = FLICKR30K_SPLITS,
    images_from: str = "",
) -> None:
    """Register a folder in the format of Flickr30k Entities: for each split its phrases as
    `{name}_{split}` and its sentences as `{name}_captions_{split}`; see `load_flickr30k_entities`.

    Args:
        root: folder of `Annotations/`, `Sentences/` and a list of image ids `<split>.txt` for
            each split.
        name: prefix of the registered names.
        image_root: folder of the images; None for `root/flickr30k-images`.
        splits: the splits to register.
        images_from: a sentence on where to get the images, for error messages.
    """
    image_root = Path(root) / "flickr30k-images" if image_root is None else image_root
    for split in splits:
        for kind, captions in (("", False), ("captions_", True)):
            load = partial(
                load_flickr30k_entities, root, image_root, split=split, captions=captions
            )
            _register(f"{name}_{kind}{split}", load, images_from)


def register_karpathy(
    json_file: str | Path,
    name: str,
    *,
    image_root: str | Path,
    splits: Sequence[str] = ("train", "val", "test"),
    images_from: str = "",
    instances_files: Sequence[str | Path] = (),
) -> None:
    """Register captions in the format of Karpathy's splits: `{name}_{split}` for each split.

    Args:
        json_file: such as `dataset_coco.json`.
        name: prefix of the registered names.
        image_root: folder of the images, or of the folders that the file names ("filepath").
        splits: the splits to register.
        images_from: a sentence on where to get the images, for error messages.
        instances_files: COCO's annotations of the images, which give them "annotations"; files
            that do not exist are skipped.
    """
    metadata = _metadata(coco_categories()) if instances_files else {}
    classes = metadata.get("thing_dataset_id_to_contiguous_id")
    for split in splits:
        load = partial(load_karpathy, json_file, image_root, split, instances_files, classes)
        _register(f"{name}_{split}", load, images_from, **metadata)


def coco_categories() -> dict[int, str]:
    """Category id (1 to 90) -> name of COCO's 80 categories, as in Detectron2."""
    coco = MetadataCatalog.get("coco_2017_train")
    classes = coco.thing_dataset_id_to_contiguous_id
    return {category_id: coco.thing_classes[number] for category_id, number in classes.items()}


def _metadata(categories: Mapping[int, str]) -> dict[str, Any]:
    """The classes of a data set, in the order of their category ids, as Detectron2 has them."""
    categories = dict(sorted(categories.items()))
    classes = {category_id: number for number, category_id in enumerate(categories)}
    return {
        "thing_classes": list(categories.values()),
        "thing_dataset_id_to_contiguous_id": classes,
    }


def _register(
    name: str, load: Callable[[], list[dict[str, Any]]], images_from: str, **metadata: Any
) -> None:
    """Register a reader; missing images are an error at once, not during training."""

    def load_checked() -> list[dict[str, Any]]:
        dataset_dicts = load()
        check_images(dataset_dicts, images_from)
        num_expressions = sum(len(one["expressions"]) for one in dataset_dicts)
        differs = check_counts(name, len(dataset_dicts), num_expressions)
        if differs is not None:
            logger.warning(differs)
        return dataset_dicts

    DatasetCatalog.register(name, load_checked)
    MetadataCatalog.get(name).set(evaluator_type="refer", **metadata)


# --- the public data sets --------------------------------------------------------------------


class ReferSet(NamedTuple):
    """One partition into splits of a folder of REFER."""

    name: str  # prefix of the registered names
    folder: str  # under `refer/`
    refs_file: str  # in the folder
    splits: tuple[str, ...]  # of its refs


_UNC = ("train", "val", "testA", "testB")  # of RefCOCO and RefCOCO+: people, other objects
REFER_SETS = (
    ReferSet("refcoco_unc", "refcoco", "refs(unc).p", _UNC),
    ReferSet("refcoco_google", "refcoco", "refs(google).p", ("train", "val", "test")),
    ReferSet("refcoco+_unc", "refcoco+", "refs(unc).p", _UNC),
    ReferSet("refcocog_umd", "refcocog", "refs(umd).p", ("train", "val", "test")),
    ReferSet("refcocog_google", "refcocog", "refs(google).p", ("train", "val")),
)
COCO_INSTANCES = tuple(f"annotations/instances_{split}2014.json" for split in ("train", "val"))


class Size(NamedTuple):
    """Size of a data set; None if it is not known for certain."""

    images: int | None  # with at least one expression
    expressions: int | None  # of all images


_SIZES = json.loads(Path(__file__).with_name("sizes.json").read_bytes())
PUBLISHED_SIZES = {name: Size(*size) for name, size in _SIZES["published"].items()}
"""Sizes of whole data sets, from their papers. RefCOCOg's includes a test split that was never
published: REFER's files have 95,010 expressions."""

KNOWN_SIZES = {name: Size(*size) for name, size in _SIZES["known"].items()}
"""Sizes of the registered data sets, by name, which reveal incomplete downloads. The phrases of
Flickr30k Entities are missing, as they are counted in several ways."""


def check_counts(name: str, num_images: int, num_expressions: int) -> str | None:
    """Compare a data set that was read with its known size.

    Args:
        name: of a registered data set, or of a whole one (`PUBLISHED_SIZES`).
        num_images, num_expressions: that were read.

    Returns:
        A sentence for the user if they differ; None if they agree or the size is unknown.
    """
    known = KNOWN_SIZES.get(name) or PUBLISHED_SIZES.get(name)
    if known is None:
        return None
    pairs = (
        (num_images, known.images, "images"),
        (num_expressions, known.expressions, "expressions"),
    )
    wrong = [
        f"{num:,} {what} where the published one has {expected:,}"
        for num, expected, what in pairs
        if expected is not None and num != expected
    ]
    if not wrong:
        return None
    return (
        f"Data set {name} has {' and '.join(wrong)}; if it should be the published one, fetch its "
        "files again."
    )


def datasets_root() -> Path:
    """The folder of all data sets, determined as in Detectron2."""
    return Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser()


def register_all(root: str | Path, prefix: str = "") -> None:
    """Register every data set that the plugin knows by name.

    Args:
        root: the folder of all data sets.
        prefix: of each name.
    """
    root = Path(root)
    register_refshapes(root / "refshapes", f"{prefix}refshapes")
    entities = root / "refshapes_entities"  # tools/make_refshapes_captions.py
    register_flickr30k_entities(
        entities, f"{prefix}refshapes_entities", image_root=entities / "images", splits=SPLITS
    )
    for one in REFER_SETS:
        register_refer(
            root / "refer" / one.folder,
            prefix + one.name,
            refs_file=one.refs_file,
            image_root=root / "coco" / "train2014",
            splits=one.splits,
            images_from=COCO,
        )
    flickr30k_images = root / "flickr30k" / "flickr30k-images"
    register_flickr30k_entities(
        root / "flickr30k_entities",
        f"{prefix}flickr30k_entities",
        image_root=flickr30k_images,
        images_from=FLICKR30K_IMAGES,
    )
    register_karpathy(
        root / "karpathy" / "dataset_flickr30k.json",
        f"{prefix}flickr30k_captions",
        image_root=flickr30k_images,
        images_from=FLICKR30K_IMAGES,
    )
    register_karpathy(
        root / "karpathy" / "dataset_coco.json",
        f"{prefix}coco_captions",
        image_root=root / "coco",
        splits=("train", "restval", "val", "test"),
        images_from=COCO,
        instances_files=[root / "coco" / file for file in COCO_INSTANCES],
    )
    for name, left_out in (
        ("coco_2014_trainval_without_refer", False),
        ("coco_2014_refer_val_test", True),
    ):
        DatasetCatalog.register(prefix + name, partial(_load_coco, root, prefix + name, left_out))
        MetadataCatalog.get(prefix + name).set(evaluator_type="coco")


def refer_val_test_images(root: str | Path) -> set[int]:
    """Ids of COCO's images in val and test of RefCOCO, RefCOCO+ and RefCOCOg (UNC's and UMD's
    splits, which the paper uses). Detectors that are evaluated there must not be trained on them.

    Args:
        root: the folder of all data sets.
    """
    ids = set()
    for one in REFER_SETS:
        if "google" not in one.name:
            path = Path(root) / "refer" / one.folder / one.refs_file
            refs = read_refs(path, {"image_id": int, "split": str})
            ids |= {ref["image_id"] for ref in refs if ref["split"] != "train"}
    return ids


def _load_coco(root: Path, name: str, left_out: bool) -> list[dict[str, Any]]:
    """The images of `refer_val_test_images`, or all others of COCO's train2014 and val2014."""
    ids = refer_val_test_images(root)
    MetadataCatalog.get(name).refer_val_test_images = sorted(ids)
    images = []
    for file in COCO_INSTANCES:
        path = root / "coco" / file
        check_exists(path, COCO)
        folder = root / "coco" / path.stem.removeprefix("instances_")
        images += load_coco_json(str(path), str(folder), name)
    images = [image for image in images if (image["image_id"] in ids) == left_out]
    check_images(images, COCO)
    return images


def registered_images(name: str) -> list[dict[str, Any]]:
    """The images of a registered data set, as Detectron2's catalog gives them.

    Raises:
        ValueError: no data set of the name is registered; the catalog's own error lists them all.
    """
    names = DatasetCatalog.list()
    if name not in names:
        near = ", ".join(get_close_matches(name, names))
        raise ValueError(
            f"{shown(name)} is no registered data set{near and f' (near: {near})'}; those of "
            "datasets/README.md are, and those that your own module registers: name it with "
            "--import"
        )
    return DatasetCatalog.get(name)


register_all(datasets_root())
