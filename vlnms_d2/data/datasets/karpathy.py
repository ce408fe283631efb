"""Captions in Karpathy's splits of Flickr30k and COCO, in Detectron2's standard format."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..entries import check_new, read_json, require, single_spaces
from .refer import read_instances

logger = logging.getLogger(__name__)

SOURCE = (
    "Karpathy's splits (dataset_flickr30k.json, dataset_coco.json) come from "
    "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip."
)


def load_karpathy(
    json_file: str | Path,
    image_root: str | Path,
    split: str,
    instances_files: Iterable[str | Path] = (),
    classes: Mapping[int, int] | None = None,
) -> list[dict[str, Any]]:
    """Reads the images of a split with their captions.

    Which objects a caption mentions is not annotated. A sentence without words is dropped with a
    warning; images without sentences are dropped.

    Args:
        json_file: `dataset_flickr30k.json` or `dataset_coco.json`, or another of that format.
        image_root: folder of the images, or of the folders that the entries' "filepath" names.
        split: "train", "val" or "test"; COCO also has "restval", which is commonly added to
            train.
        instances_files: annotations of the images in COCO's format; files that do not exist are
            skipped.
        classes: of their category ids, as in `load_refer`.

    Returns:
        Dicts in the order of the file, which COCO's folds of 1,000 images follow, with "file_name",
        "image_id" (COCO's id; otherwise the number in the file name if all files are named by
        numbers, as in Flickr30k; otherwise Karpathy's "imgid"), "annotations" (of
        `instances_files`, without segmentations) and "expressions": dicts with "sent_id", "ref_id"
        (None), "query", "ann_id" (None), "context_ann_ids" (None), "split" and "manner" (None).
        "height" and "width" are not in the file; the mapper reads them from the image.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is damaged, lacks a key, uses an id twice or has no image of the
            split.
    """
    path = Path(json_file)
    entries = require(read_json(path, SOURCE), "images", list, str(path))
    for number, entry in enumerate(entries):
        where = f"{path}: image number {number}"
        for key, kind in (("filename", str), ("split", str), ("imgid", int), ("sentences", list)):
            require(entry, key, kind, where)
    image_ids = _image_ids(entries, path)
    images: dict[int, dict[str, Any]] = {}
    sent_ids: set[int] = set()
    for number, (entry, image_id) in enumerate(zip(entries, image_ids, strict=True)):
        if entry["split"] != split:
            continue
        where = f"{path}: image number {number}"
        folder = require(entry, "filepath", str, where) if "filepath" in entry else ""
        expressions = _expressions(entry, where, sent_ids)
        check_new(image_id, images, "the id", where)
        images[image_id] = {
            "file_name": str(Path(image_root, folder, entry["filename"])),
            "image_id": image_id,
            "annotations": [],
            "expressions": expressions,
        }
    if not images:
        available = ", ".join(sorted({entry["split"] for entry in entries})) or "none"
        raise ValueError(
            f"{path} holds no image of the split '{split}', available splits: {available}. Choose "
            "one of them."
        )
    for file in filter(Path.is_file, map(Path, instances_files)):
        for image_id, objects in read_instances(file, images.keys(), classes)[1].items():
            annotations = [one for one in objects.values() if one is not None]
            for annotation in annotations:
                annotation.pop("segmentation", None)
            images[image_id]["annotations"] = annotations
    return [image for image in images.values() if image["expressions"]]


def _image_ids(entries: list[dict[str, Any]], path: Path) -> list[int]:
    """The ids of the images, all from one source, that of other data sets of these images."""
    has_coco_id = ["cocoid" in entry for entry in entries]
    if any(has_coco_id):
        if not all(has_coco_id):
            raise ValueError(
                f"{path}: image number {has_coco_id.index(False)} has no 'cocoid', expected an "
                f"integer as in image number {has_coco_id.index(True)}. Repair the entry or fetch "
                f"the file again. {SOURCE}"
            )
        return [
            require(entry, "cocoid", int, f"{path}: image number {number}")
            for number, entry in enumerate(entries)
        ]
    stems = [Path(entry["filename"]).stem for entry in entries]
    if all(stem.isascii() and stem.isdigit() for stem in stems):
        return [int(stem) for stem in stems]
    return [entry["imgid"] for entry in entries]


def _expressions(entry: dict[str, Any], where: str, sent_ids: set[int]) -> list[dict[str, Any]]:
    """The captions of an image; their ids are added to `sent_ids`, those of previous images."""
    made = []
    for number, sentence in enumerate(entry["sentences"]):
        sent_id = require(sentence, "sentid", int, f"{where}, sentence number {number}")
        check_new(sent_id, sent_ids, "'sentid'", f"{where}, sentence number {number}")
        sent_ids.add(sent_id)
        query = _words(sentence)
        if not query:
            logger.warning("%s: left out sentence %d, which has no words", where, sent_id)
            continue
        unknown = dict.fromkeys(("ref_id", "ann_id", "context_ann_ids", "manner"))
        made.append({"sent_id": sent_id, "query": query, "split": entry["split"]} | unknown)
    return made


def _words(sentence: dict[str, Any]) -> str:
    """The sentence as written, with single spaces; captions of COCO contain line breaks."""
    raw, tokens = sentence.get("raw"), sentence.get("tokens")
    if isinstance(raw, str) and raw.strip():
        return single_spaces(raw)
    if isinstance(tokens, list):
        return " ".join(token.strip() for token in tokens if isinstance(token, str)).strip()
    return ""
