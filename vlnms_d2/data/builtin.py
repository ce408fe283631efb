"""Registers the data sets that the plugin knows by name, under `$DETECTRON2_DATASETS`.

`datasets/README.md` shows the tree of folders.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from .datasets.refshapes import SPLITS, register_refshapes
from .register import register_flickr30k_entities, register_karpathy, register_refer
from .sources import COCO, FLICKR30K_IMAGES


class ReferSet(NamedTuple):
    """A way in which the expressions of a folder of REFER are split.

    Attributes:
        name: first part of the names of its data sets.
        folder: under `refer/`.
        refs_file: in the folder.
        splits: of its refs.
    """

    name: str
    folder: str
    refs_file: str
    splits: tuple[str, ...]


class CaptionSet(NamedTuple):
    """A file of Karpathy's.

    Attributes:
        name: first part of the names of its data sets.
        json_file: under `karpathy/`.
        image_root: folder of the images, or of the folders that the file names.
        splits: of its images.
        images_from: where to get the images.
    """

    name: str
    json_file: str
    image_root: str
    splits: tuple[str, ...]
    images_from: str


_UNC = ("train", "val", "testA", "testB")  # of RefCOCO and RefCOCO+: people, other objects
REFER_SETS = (
    ReferSet("refcoco_unc", "refcoco", "refs(unc).p", _UNC),
    ReferSet("refcoco_google", "refcoco", "refs(google).p", ("train", "val", "test")),
    ReferSet("refcoco+_unc", "refcoco+", "refs(unc).p", _UNC),
    ReferSet("refcocog_umd", "refcocog", "refs(umd).p", ("train", "val", "test")),
    ReferSet("refcocog_google", "refcocog", "refs(google).p", ("train", "val")),
)
FLICKR30K_IMAGE_ROOT = "flickr30k/flickr30k-images"
CAPTION_SETS = (
    CaptionSet(
        "flickr30k_captions",
        "dataset_flickr30k.json",
        FLICKR30K_IMAGE_ROOT,
        ("train", "val", "test"),
        FLICKR30K_IMAGES,
    ),
    CaptionSet(
        "coco_captions", "dataset_coco.json", "coco", ("train", "restval", "val", "test"), COCO
    ),
)


def datasets_root() -> Path:
    """The folder of all data sets, read as Detectron2 reads it."""
    return Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser()


def register_all(root: str | Path, prefix: str = "") -> None:
    """Register every data set that the plugin knows by name.

    Args:
        root: the folder of all data sets.
        prefix: put before each name.
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
    register_flickr30k_entities(
        root / "flickr30k_entities",
        f"{prefix}flickr30k_entities",
        image_root=root / FLICKR30K_IMAGE_ROOT,
        images_from=FLICKR30K_IMAGES,
    )
    for one in CAPTION_SETS:
        register_karpathy(
            root / "karpathy" / one.json_file,
            prefix + one.name,
            image_root=root / one.image_root,
            splits=one.splits,
            images_from=one.images_from,
        )


register_all(datasets_root())
