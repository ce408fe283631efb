"""The data sets with expressions of a config, with their pseudo ground truth."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from detectron2.data import DatasetCatalog

from .builtin import datasets_root
from .pseudo_gt import add_pseudo_gt
from .refer import merge_by_image


def prepared_folder(folder: str | Path = "") -> Path:
    """Where tools/prepare_data.py writes: a folder, by default one under `$DETECTRON2_DATASETS`."""
    return Path(folder) if folder else datasets_root() / "vlnms_d2"


def pseudo_gt_file(folder: Path, dataset_name: str) -> Path:
    """Where in such a folder the pseudo ground truth of a data set is."""
    return folder / dataset_name / "pseudo_gt.json"


def load_expressions(
    dataset_names: Iterable[str], pseudo_gt_dir: str | Path = "", required: bool = False
) -> list[dict]:
    """The data sets' images, those that occur in several of them with all their expressions.

    Args:
        dataset_names: registered names.
        pseudo_gt_dir: folder of the pseudo ground truth; see `prepared_folder`.
        required: a data set without contextual objects of its own must have some there.

    Raises:
        FileNotFoundError: pseudo ground truth is required and is not there.
        ValueError: a file of it is damaged or of another data set.
    """
    loaded = []
    folder = prepared_folder(pseudo_gt_dir)
    for name in dataset_names:
        images = DatasetCatalog.get(name)
        path = pseudo_gt_file(folder, name)
        if path.is_file():
            images = add_pseudo_gt(images, path)
        elif required and not has_contexts(images):
            raise FileNotFoundError(
                f"{path}: no such file, and {name} has no contextual objects of its own. Make it "
                f"with `python tools/prepare_data.py --datasets {name} --out {folder}` "
                "(MODEL.VLNMS.PSEUDO_GT.DIR), or set MODEL.VLNMS.PSEUDO_GT.CONTEXT to False to "
                "train on referents alone."
            )
        loaded.append(images)
    return merge_by_image(*loaded)


def has_contexts(images: list[dict]) -> bool:
    """Whether the contextual objects of all expressions are annotated."""
    return all(e["context_ann_ids"] is not None for image in images for e in image["expressions"])
