"""The model that answers the queries of a registered data set: its config, images and classes, and
the identity of all of them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.utils.file_io import PathManager
from torch.utils.data import SequentialSampler

from ..config import load_config
from ..data import GroundingMapper
from ..data.builtin import registered_images
from ..data.datasets.refer import merge_by_image
from ..data.entries import CATEGORIES_SOURCE, category_names, read_json
from ..file_io import shown
from .job import Block, identity_of_files, versions

logger = logging.getLogger(__name__)

IDENTITY_VERSION = 2


@dataclass(frozen=True)
class ModelSettings:
    """A model, and the data sets whose queries it answers.

    Attributes:
        config_file: see `load_config`.
        dataset: a registered name; its images have "expressions".
        opts: KEY VALUE pairs that override the config.
        more_datasets: further registered names, answered in the same run.
        skip_bad_images: leave out images that cannot be read, with a warning for each; all are
            read once more for this.
    """

    config_file: Path
    dataset: str
    opts: tuple[str, ...] = ()
    more_datasets: tuple[str, ...] = ()
    skip_bad_images: bool = False

    @property
    def datasets(self) -> tuple[str, ...]:
        """All names."""
        return (self.dataset, *self.more_datasets)

    def config(self, device: str) -> CfgNode:
        """The config, for a device.

        Raises:
            FileNotFoundError: the config file or the weights are missing.
            ValueError: a key or value is wrong, or no weights are named.
        """
        if not self.config_file.is_file():
            raise FileNotFoundError(f"{self.config_file}: no such config file. Check the path.")
        try:
            cfg = load_config(self.config_file, self.opts)
        except (AssertionError, KeyError, ValueError) as error:
            raise ValueError(
                f"{self.config_file}, {' '.join(self.opts) or 'no options'}: {error}"
            ) from error
        weights = cfg.MODEL.WEIGHTS
        if not weights:
            raise ValueError(
                f"{self.config_file}: MODEL.WEIGHTS is empty, expected the weights of a trained "
                "model; add MODEL.WEIGHTS model_final.pth"
            )
        if "://" not in weights and not Path(weights).is_file():
            raise FileNotFoundError(f"{weights}: no such weights file (MODEL.WEIGHTS)")
        cfg.MODEL.DEVICE = device
        return cfg

    def files(self, cfg: CfgNode) -> list[Path]:
        """The files of the model with this config."""
        names = (self.config_file, cfg.MODEL.WEIGHTS, cfg.MODEL.VLNMS.VOCAB)
        return [Path(name) for name in names if name]

    def images(self) -> list[dict[str, Any]]:
        """The images of the data sets that have expressions, as in Detectron2's catalog.

        Of several data sets, and of one that lists an image more than once, each image appears
        once, with its distinct expressions; those of the first data set come first, and
        "num_of_first" says how many they are.

        Raises:
            ValueError: a data set is not registered or has no expressions, or an id is repeated.
        """
        images, *others = map(_with_expressions, self.datasets)
        num_of_first = Counter()
        for image in images:
            num_of_first[image["image_id"]] += len(image["expressions"])
        if others or len(num_of_first) < len(images):
            images = merge_by_image(images, *others)
            for image in images:
                image["num_of_first"] = num_of_first[image["image_id"]]
                # RefCLEF's split testAB belongs to testA and to testB.
                image["expressions"] = list({repr(e): e for e in image["expressions"]}.values())
        ids = Counter(e["sent_id"] for image in images for e in image["expressions"])
        [(twice, times)] = ids.most_common(1)
        if times > 1:
            raise ValueError(
                f"the data set {' + '.join(self.datasets)} has {times} expressions of the id "
                f"{shown(twice)}, by which second stages tell them apart. If it is several data "
                "sets in one, export each of them."
            )
        return self._readable(images) if self.skip_bad_images else images

    def _readable(self, images: list[dict[str, Any]]) -> list[dict[str, Any]]:
        mapper, kept = GroundingMapper(self.config("cpu"), is_train=False), []
        for image in images:
            try:
                mapper(image)
                kept.append(image)
            except (OSError, ValueError) as error:
                logger.warning("left out: %s", error)
        if not kept:
            raise ValueError(f"no image of {' + '.join(self.datasets)} can be read")
        return kept


def _with_expressions(dataset: str) -> list[dict[str, Any]]:
    images = [image for image in registered_images(dataset) if image.get("expressions")]
    if not images:
        raise ValueError(f"the data set {dataset} has no image with expressions")
    return images


def model_identity(
    cfg: CfgNode, images: Sequence[dict[str, Any]], settings: dict[str, Any]
) -> dict[str, Any]:
    """Everything that an export of a model depends on.

    Args:
        cfg: of the model; its files are identified by their content.
        images: of the data set, identified by their ids and queries, not by their pixels.
        settings: of the export.
    """
    config = {key: yaml.safe_load(cfg[key].dump()) for key in ("MODEL", "INPUT", "TEST")}
    weights, vocabulary = cfg.MODEL.WEIGHTS, cfg.MODEL.VLNMS.VOCAB
    config["MODEL"]["WEIGHTS"] = Path(weights).name
    config["MODEL"]["VLNMS"]["VOCAB"] = Path(vocabulary).name
    config["MODEL"]["VLNMS"]["CACHE_DIR"] = ""
    files = {"weights": Path(PathManager.get_local_path(weights))}
    if vocabulary:
        files["vocabulary"] = Path(vocabulary)
    digest = hashlib.sha256()
    for image in images:
        queries = [
            (e["sent_id"], e["ref_id"], e["split"], e["query"]) for e in image["expressions"]
        ]
        line = [image["image_id"], Path(image["file_name"]).name, queries]
        digest.update(json.dumps(line).encode() + b"\n")
    return {
        "run_version": IDENTITY_VERSION,
        "inputs": identity_of_files(files),
        "images": digest.hexdigest(),
        "settings": settings,
        "config": config,
        "versions": versions(),
    }


def detector_classes(
    cfg: CfgNode, dataset: str, categories_of: str | None = None
) -> tuple[list[int], list[str]]:
    """The category id and the name of each class of the detector, from a data set's metadata.

    Args:
        cfg: of the model.
        dataset: a registered name.
        categories_of: the data set that has the classes; None takes the first of `dataset`, the
            config's test and its training sets with `MODEL.ROI_HEADS.NUM_CLASSES` classes.

    Returns:
        Ids and names by class. Without ids in the metadata they are read from the data set's own
        annotation file; without one, they are the classes' numbers, with a warning.

    Raises:
        ValueError: no data set has that many classes, or its annotation file has others.
    """
    num_classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    names: Sequence[str] = (dataset, *cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN)
    if categories_of is not None:
        names = [categories_of]
    for name in names:
        metadata = MetadataCatalog.get(name)
        things = metadata.get("thing_classes") or ()
        if len(things) == num_classes:
            return _category_ids(name, list(things)), list(things)
    raise ValueError(
        f"none of {', '.join(dict.fromkeys(names))} has the names of {num_classes} classes "
        "(MODEL.ROI_HEADS.NUM_CLASSES). Name a data set that has the detector's, with "
        "--categories-of, as coco_2017_val."
    )


def _category_ids(dataset: str, names: list[str]) -> list[int]:
    """The category id of each class of a data set."""
    metadata = MetadataCatalog.get(dataset)
    class_of = metadata.get("thing_dataset_id_to_contiguous_id")
    if class_of:
        id_of = {number: category_id for category_id, number in class_of.items()}
        return [id_of[number] for number in range(len(names))]
    if metadata.get("evaluator_type") == "lvis":  # whose ids are those of Detectron2 plus one
        return list(range(1, len(names) + 1))
    # Detectron2 sets the ids of COCO's format only when it reads the data set.
    path = Path(PathManager.get_local_path(metadata.get("json_file") or ""))
    if path.is_file():
        categories = category_names(read_json(path, CATEGORIES_SOURCE), path)
        id_of_name = {name: category_id for category_id, name in categories.items()}
        for name in names:
            if name not in id_of_name:
                raise ValueError(
                    f"{path}: no category is called {shown(name)}, a class of the data set "
                    f"{dataset} (thing_classes); register the names that its file has"
                )
        return [id_of_name[name] for name in names]
    logger.warning(
        "Data set %s has names of classes but no category ids, so category_id counts from 0. If "
        "its annotations differ, add thing_dataset_id_to_contiguous_id to its metadata.",
        dataset,
    )
    return list(range(len(names)))


def read_images(
    cfg: CfgNode, blocks: Sequence[Block]
) -> Iterator[tuple[int, Iterator[tuple[dict[str, Any], dict[str, Any]]]]]:
    """Read the images of blocks, dicts as in Detectron2's catalog, from their files; for a GPU,
    other processes read ahead.

    Yields:
        For each block its number and its images, each as a dict and a model input. The images of a
        block must be consumed before the next block.
    """
    images = [image for block in blocks for image in block.images]
    loader = build_detection_test_loader(
        images,
        mapper=GroundingMapper(cfg, is_train=False),
        sampler=SequentialSampler(images),
        num_workers=0 if cfg.MODEL.DEVICE == "cpu" else cfg.DATALOADER.NUM_WORKERS,
    )
    inputs = (image_input for [image_input] in loader)
    for number, block_images in blocks:
        yield number, zip(block_images, inputs, strict=False)
