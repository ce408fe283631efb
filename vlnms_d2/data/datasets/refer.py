"""Expressions of REFER (RefCOCO, RefCOCO+, RefCOCOg, RefShapes) in Detectron2's standard format.

A data set is a list of dicts, one per image, with all annotated objects of the image under
"annotations" and all of its expressions under "expressions".
"""

from __future__ import annotations

import io
import logging
import pickle
from collections.abc import Iterable, Mapping, Set
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...file_io import shown
from ..entries import (
    check_exists,
    check_new,
    is_finite,
    is_integer,
    iter_json_list,
    read_json,
    require,
)

logger = logging.getLogger(__name__)

SOURCE = (
    "RefCOCO, RefCOCO+ and RefCOCOg come from https://github.com/lichengunc/refer (refs(...).p "
    "and instances.json of each); RefShapes is made by tools/make_refshapes.py."
)

XYWH_ABS = 1
"""Value of Detectron2's `BoxMode.XYWH_ABS`, an IntEnum: boxes [x, y, width, height] in pixels."""

CONTEXTS_VERSION = 1

_KEYS = {"ref_id": int, "ann_id": int, "image_id": int, "split": str, "sentences": list}

_MAX_IDS = 10  # listed in a warning


def load_refer(
    refs_file: str | Path,
    instances_file: str | Path,
    image_root: str | Path,
    split: str | None = None,
    contexts_file: str | Path | None = None,
    manner: str | None = None,
    classes: Mapping[int, int] | None = None,
) -> list[dict[str, Any]]:
    """Reads the images of a split with their annotations and expressions.

    Boxes are clipped to the image. An annotation whose box is then empty is dropped with a warning,
    unless an expression refers to it, which is an error. A sentence without words is dropped with a
    warning. Images without expressions are dropped.

    Args:
        refs_file: pickled refs of REFER, as `refs(unc).p`.
        instances_file: annotations in COCO's JSON format.
        image_root: folder of the images.
        split: the split to read, as in REFER's own reader: testA has testAB too, and test has every
            split of that beginning. None reads all.
        contexts_file: ids of the contextual objects per sentence, as RefShapes has them.
        manner: the style of the expressions, kept with each of them to distinguish merged data
            sets.
        classes: the class, counted from 0, of each category id. None counts the categories of
            `instances_file` in the order of their ids, as Detectron2 does for its own COCO data
            sets.

    Returns:
        Dicts sorted by image id with "file_name", "image_id", "height" and "width" in pixels,
        "annotations" ("bbox" in the mode `XYWH_ABS`; "category_id" the class, see `classes`) and
        "expressions": dicts with "sent_id", "ref_id", "query" (the words), "ann_id" (the
        referent), "context_ann_ids" (a list, or None if not annotated), "split" and "manner".

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, lacks a key, uses an id twice, refers to an annotation or
            image that does not exist, or has no ref of the split.
    """
    refs = _of_split(read_refs(Path(refs_file), _KEYS), split, Path(refs_file))
    contexts = None if contexts_file is None else _read_contexts(Path(contexts_file))
    wanted = {ref["image_id"] for ref in refs}
    images, annotations = read_instances(Path(instances_file), wanted, classes)

    expressions: dict[int, list[dict[str, Any]]] = {}
    sent_ids: set[int] = set()
    for ref in refs:
        image_id = ref["image_id"]
        where = f"{refs_file}: ref {ref['ref_id']}"
        if image_id not in images:
            raise ValueError(
                f"{where}: 'image_id' {image_id} is not among the images of {instances_file}. "
                "Use the instances file that belongs to the refs."
            )
        made = _expressions(ref, where, contexts, contexts_file, manner)
        for expression in made:
            check_new(expression["sent_id"], sent_ids, "'sent_id'", where)
            sent_ids.add(expression["sent_id"])
            for ann_id in [expression["ann_id"], *(expression["context_ann_ids"] or [])]:
                if annotations[image_id].get(ann_id) is None:
                    raise ValueError(_unusable(expression, ann_id, where, instances_file))
        expressions.setdefault(image_id, []).extend(made)

    dropped = [
        ann_id
        for image_id in sorted(wanted)
        for ann_id, one in annotations[image_id].items()
        if one is None
    ]
    if dropped:
        logger.warning(
            "%s: left out %d annotations with an empty box, ids %s",
            instances_file,
            len(dropped),
            ", ".join(map(str, dropped[:_MAX_IDS])) + ("" if len(dropped) <= _MAX_IDS else ", ..."),
        )
    return [
        {
            "file_name": str(Path(image_root) / images[image_id]["file_name"]),
            "image_id": image_id,
            "height": images[image_id]["height"],
            "width": images[image_id]["width"],
            "annotations": [one for one in annotations[image_id].values() if one is not None],
            "expressions": expressions[image_id],
        }
        for image_id in sorted(expressions)
        if expressions[image_id]
    ]


def merge_by_image(*dataset_dicts: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merges data sets so that all expressions of an image are in one dict.

    Args:
        *dataset_dicts: what `load_refer` returns; left unchanged.

    Returns:
        Dicts sorted by image id, with the expressions in the order of the arguments and every
        annotation once.

    Raises:
        ValueError: an image id stands for different files.
    """
    merged: dict[int, dict[str, Any]] = {}
    for one in (one for images in dataset_dicts for one in images):
        image = merged.get(one["image_id"])
        if image is None:
            merged[one["image_id"]] = {
                **one,
                "annotations": list(one["annotations"]),
                "expressions": list(one["expressions"]),
            }
            continue
        if image["file_name"] != one["file_name"]:
            raise ValueError(
                f"Image id {one['image_id']} stands for {image['file_name']} and for "
                f"{one['file_name']}: expected one file. Merge data sets of the same images only."
            )
        known = {annotation["id"] for annotation in image["annotations"]}
        image["annotations"] += [a for a in one["annotations"] if a["id"] not in known]
        image["expressions"] += one["expressions"]
    return [merged[image_id] for image_id in sorted(merged)]


def read_refs(path: Path, keys: Mapping[str, type]) -> list[dict[str, Any]]:
    """Reads the refs of a file of REFER.

    Args:
        path: pickled refs, or a JSON list of them.
        keys: required of each ref, with the types of their values; see `entries.require`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged or not a list, or a ref lacks a key; `RefusedPickle` is a
            subclass.
    """
    check_exists(path, SOURCE)
    try:
        is_json = path.suffix == ".json"
        refs = list(iter_json_list(path, SOURCE)) if is_json else load_plain_pickle(path)
    except RefusedPickle as error:
        raise RefusedPickle(f"{error} {SOURCE}") from error
    if not isinstance(refs, list):
        raise ValueError(f"{path}: expected a list of refs, found {type(refs).__name__}. {SOURCE}")
    for number, ref in enumerate(refs):
        where = f"{path}: ref number {number}"
        if "ann_id" in keys and isinstance(ref, dict) and isinstance(ref.get("ann_id"), list):
            raise ValueError(
                f"{where}: 'ann_id' is the list {shown(ref['ann_id'])}, as in gRefCOCO, whose "
                "expressions have one, several or no targets; expected an integer, the one "
                "referent. Use RefCOCO, or keep refs of one target and write its id without list."
            )
        for key, kind in keys.items():
            require(ref, key, kind, where)
    return refs


def _of_split(refs: list[dict[str, Any]], split: str | None, path: Path) -> list[dict[str, Any]]:
    def belongs(of_ref: str) -> bool:
        if split in ("testA", "testB", "testC"):
            return of_ref.startswith("test") and split[-1] in of_ref[len("test") :]
        return split is None or of_ref == split or (split == "test" and of_ref.startswith(split))

    chosen = [ref for ref in refs if belongs(ref["split"])]
    if not chosen:
        missing = "refs" if split is None else f"ref of the split '{split}'"
        available = ", ".join(sorted({ref["split"] for ref in refs})) or "none"
        raise ValueError(
            f"{path} holds no {missing}, available splits: {available}. Choose one of them."
        )
    return chosen


def _expressions(
    ref: dict[str, Any],
    where: str,
    contexts: Mapping[str, list[int]] | None,
    contexts_file: str | Path | None,
    manner: str | None,
) -> list[dict[str, Any]]:
    """The expressions of a ref; those without words are dropped with a warning."""
    made = []
    for number, sentence in enumerate(ref["sentences"]):
        sent_id = require(sentence, "sent_id", int, f"{where}, sentence number {number}")
        tokens = sentence.get("tokens")  # what the authors' code reads
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
            tokens = []
        texts = [" ".join(tokens), *(sentence.get(key) for key in ("sent", "raw"))]
        query = next((q.strip() for q in texts if isinstance(q, str) and q.strip()), None)
        if query is None:
            logger.warning("%s: left out sentence %d, which has no words", where, sent_id)
            continue
        context = None if contexts is None else contexts.get(str(sent_id))
        if context is None and contexts is not None:
            raise ValueError(
                f"{contexts_file}: 'contexts' has no entry '{sent_id}', a sentence of {where}. "
                "Use the contexts file that was written with the refs."
            )
        made.append(
            {
                "sent_id": sent_id,
                "ref_id": ref["ref_id"],
                "query": query,
                "ann_id": ref["ann_id"],
                "context_ann_ids": None if context is None else list(context),
                "split": ref["split"],
                "manner": manner,
            }
        )
    return made


def _read_contexts(path: Path) -> Mapping[str, list[int]]:
    content = read_json(path, SOURCE)
    if content.get("version") != CONTEXTS_VERSION:
        raise ValueError(
            f"{path}: 'version' is {shown(content.get('version'))}, expected {CONTEXTS_VERSION}. "
            "Make RefShapes again with this version of vlnms_d2."
        )
    contexts = require(content, "contexts", dict, str(path))
    for sent_id, ids in contexts.items():
        if not isinstance(ids, list) or not all(is_integer(one) for one in ids):
            raise ValueError(
                f"{path}: 'contexts', entry '{sent_id}' is {shown(ids)}, expected a list of "
                "annotation ids. Repair the entry or make the file again."
            )
    return contexts


def read_instances(
    path: Path, wanted: Set[int], classes: Mapping[int, int] | None
) -> tuple[dict[int, dict[str, Any]], dict[int, dict[int, dict[str, Any] | None]]]:
    """Images by id, and annotations by image id and annotation id (None: empty box)."""
    content = read_json(path, SOURCE)
    images = {}
    for number, image in enumerate(require(content, "images", list, str(path))):
        where = f"{path}: image number {number}"
        image_id = require(image, "id", int, where)
        check_new(image_id, images, "'id'", where)
        if image_id in wanted:
            require(image, "file_name", str, where)
            for key in ("height", "width"):
                if require(image, key, int, where) <= 0:
                    raise ValueError(
                        f"{where}: '{key}' is {image[key]}, expected the size in pixels. Repair "
                        "the entry."
                    )
            images[image_id] = image
    if classes is None:
        category_ids = {
            require(category, "id", int, f"{path}: category number {number}")
            for number, category in enumerate(require(content, "categories", list, str(path)))
        }
        classes = {category_id: number for number, category_id in enumerate(sorted(category_ids))}
    annotations: dict[int, dict[int, dict[str, Any] | None]] = {i: {} for i in images}
    for number, annotation in enumerate(require(content, "annotations", list, str(path))):
        where = f"{path}: annotation number {number}"
        image = images.get(require(annotation, "image_id", int, where))
        if image is None:
            continue
        ann_id = require(annotation, "id", int, where)
        where = f"{path}: annotation {ann_id}"
        check_new(ann_id, annotations[image["id"]], "'id'", f"{where} of image {image['id']}")
        annotations[image["id"]][ann_id] = _annotation(annotation, image, classes, where)
    return images, annotations


def _annotation(
    annotation: dict[str, Any], image: dict[str, Any], classes: Mapping[int, int], where: str
) -> dict[str, Any] | None:
    """The annotation in Detectron2's format, or None if its box is empty inside the image."""
    box = require(annotation, "bbox", list, where)
    if len(box) != 4 or not all(is_finite(value) for value in box):
        raise ValueError(
            f"{where}: 'bbox' is {shown(box)}, expected [x, y, width, height] in pixels. "
            "Repair the entry."
        )
    x1, y1 = max(box[0], 0), max(box[1], 0)
    x2 = min(box[0] + box[2], image["width"])
    y2 = min(box[1] + box[3], image["height"])
    if x2 <= x1 or y2 <= y1:
        return None
    category_id = require(annotation, "category_id", int, where)
    if category_id not in classes:
        raise ValueError(
            f"{where}: 'category_id' is {category_id}, expected an id of the data set's categories "
            f"({', '.join(map(str, sorted(classes)))}). Repair the entry."
        )
    made = {
        "id": annotation["id"],
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "bbox_mode": XYWH_ABS,
        "category_id": classes[category_id],
        "iscrowd": annotation.get("iscrowd", 0),
    }
    made |= {key: annotation[key] for key in ("segmentation", "area") if key in annotation}
    segmentation = made.get("segmentation")
    if isinstance(segmentation, list) and len(segmentation) == 1 and type(segmentation[0]) is dict:
        made["segmentation"] = segmentation[0]  # RefCLEF lists its RLE; COCO and Detectron2 do not
    return made


def _unusable(
    expression: dict[str, Any], ann_id: int, where: str, instances_file: str | Path
) -> str:
    role = "'ann_id'" if ann_id == expression["ann_id"] else "contextual object"
    return (
        f"{where}, sentence {expression['sent_id']}: {role} {ann_id} is no annotation of its image "
        f"in {instances_file}, or its box is empty inside the image; expected an annotated object. "
        "Use the instances file that belongs to the refs, or remove the ref."
    )


# --- pickles ---------------------------------------------------------------------------------


class RefusedPickle(ValueError):
    """A pickle file contains more than plain data, or is not a complete pickle."""


class _GlobalRequested(Exception):
    pass


class PlainUnpickler(pickle.Unpickler):
    """An unpickler without globals. Whatever a pickle can do, from creating an array to running a
    command, it does by calling a global; lists, tuples, dicts, sets, strings, bytes and numbers
    need none.

    Attributes:
        allowed: (module, name) of the globals that a subclass allows.
        encodings: of Python 2's byte strings, tried in this order.
    """

    allowed: frozenset[tuple[str, str]] = frozenset()
    encodings: tuple[str, ...] = ("utf-8", "latin1")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.allowed:
            return super().find_class(module, name)
        raise _GlobalRequested(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise _GlobalRequested(f"persistent object {shown(pid)}")


def load_plain_pickle(path: str | Path, unpickler: type[PlainUnpickler] = PlainUnpickler) -> Any:
    """Reads a pickle of lists, tuples, dicts, sets, strings, bytes, numbers, booleans and None.

    Byte strings written by Python 2 become text: UTF-8 if the whole file is, otherwise Latin-1.

    Args:
        path: a pickle of any protocol.
        unpickler: what else may be in it.

    Raises:
        FileNotFoundError: there is no such file.
        RefusedPickle: the file requests a class or a function, is incomplete or is not a pickle.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected a pickle. Check the path.")
    data = path.read_bytes()
    if not data:
        raise RefusedPickle(f"{path}: the file is empty, expected a pickle. Fetch it again.")
    try:
        *first, last = unpickler.encodings
        for encoding in first:
            with suppress(UnicodeDecodeError):
                return unpickler(io.BytesIO(data), encoding=encoding).load()
        return unpickler(io.BytesIO(data), encoding=last).load()
    except _GlobalRequested as request:
        raise RefusedPickle(
            f"{path}: refused, as it asks for '{request}'; expected plain data only (lists, dicts, "
            "strings, numbers). A pickle that asks for more can run programs: fetch the file from "
            "its original source, or save its content as plain data."
        ) from None
    except Exception as error:  # the unpickler raises all kinds of errors for invalid bytes
        raise RefusedPickle(
            f"{path}: not a complete pickle ({type(error).__name__}: {error}), after reading its "
            f"{len(data)} bytes. It may have been cut short: fetch the file again."
        ) from error
