"""Which model answers the queries of which data set, and how to tell that it is still the same."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.utils.file_io import PathManager

from ..config import load_config
from .resumable import identity_of_files, versions

IDENTITY_VERSION = 1


@dataclass(frozen=True)
class ModelSettings:
    """A model, and the data set whose queries it answers.

    Attributes:
        config_file: see `load_config`.
        opts: KEY VALUE pairs.
        dataset: a registered name, whose images have "expressions".
    """

    config_file: Path
    dataset: str
    opts: tuple[str, ...] = ()

    def config(self, device: str) -> CfgNode:
        """The config, for a device.

        Raises:
            FileNotFoundError: config file or weights are missing.
            ValueError: a key or value is wrong, or there are no weights.
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

    def images(self) -> list[dict[str, Any]]:
        """The images of the data set.

        Raises:
            ValueError: it is not registered, has no expressions, or uses an id twice.
        """
        if self.dataset not in DatasetCatalog.list():
            raise ValueError(
                f"{self.dataset!r} is no registered data set; those of datasets/README.md are, "
                "and what your own code registers"
            )
        images = [one for one in DatasetCatalog.get(self.dataset) if one.get("expressions")]
        if not images:
            raise ValueError(f"the data set {self.dataset} has no image with expressions")
        ids = Counter(e["sent_id"] for image in images for e in image["expressions"])
        [(twice, times)] = ids.most_common(1)
        if times > 1:
            raise ValueError(
                f"the data set {self.dataset} has {times} expressions of the id {twice!r}, by "
                "which second stages tell them apart. If it is several data sets in one, export "
                "each of them."
            )
        return images


def identity_of(
    cfg: CfgNode, images: Sequence[dict[str, Any]], settings: dict[str, Any]
) -> dict[str, Any]:
    """All that an export depends on.

    Args:
        cfg: of the model; files are told by their content.
        images: of the data set, which are told by their ids and queries, not by their pixels.
        settings: of the export.
    """
    relevant = ("MODEL", "INPUT", "TEST")
    config = {key: yaml.safe_load(cfg[key].dump()) for key in relevant}
    weights, vocabulary = cfg.MODEL.WEIGHTS, cfg.MODEL.VLNMS.VOCAB
    config["MODEL"]["WEIGHTS"] = Path(weights).name
    config["MODEL"]["VLNMS"]["VOCAB"] = Path(vocabulary).name
    config["MODEL"]["VLNMS"]["CACHE_DIR"] = ""
    files = {"weights": Path(PathManager.get_local_path(weights))}
    if vocabulary:
        files["vocabulary"] = Path(vocabulary)
    return {
        "run_version": IDENTITY_VERSION,
        "inputs": identity_of_files(files),
        "images": digest_of_images(images),
        "settings": settings,
        "config": config,
        "versions": versions(),
    }


def digest_of_images(images: Sequence[dict[str, Any]]) -> str:
    """sha256 of the images' ids and file names and of their queries."""
    digest = hashlib.sha256()
    for image in images:
        queries = [
            (e["sent_id"], e["ref_id"], e["split"], e["query"]) for e in image["expressions"]
        ]
        name = Path(image["file_name"]).name
        digest.update(json.dumps([image["image_id"], name, queries]).encode() + b"\n")
    return digest.hexdigest()
