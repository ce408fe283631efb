"""Flickr30k Entities in Detectron2's standard format: phrases of captions with their boxes.

An object of an image is a "chain" there: all mentions of it in the five captions have its chain
id, and so have its boxes, of which there may be none (a scene) or several (a crowd).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .entries import check_exists
from .flickr30k_files import ImageBoxes, Phrase, Sentence, read_boxes, read_sentences
from .refer import XYWH_ABS
from .sources import FLICKR30K_ENTITIES

logger = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
UNKNOWN_CLASS = -1
"""`category_id` of a box whose class is not known."""

_PLACES = 100  # sentences of an image and phrases of a sentence, at most this many less one


def load_flickr30k_entities(
    root: str | Path, image_root: str | Path, split: str, *, captions: bool = False
) -> list[dict[str, Any]]:
    """Reads the images of a split with their boxes and expressions.

    There are two views. The phrases: an expression for each mention that has a box, whose
    referent is the box of its chain. Where a chain has several boxes the referent is their union
    ("merged boxes", the protocol of phrase grounding), an annotation of its own, and the boxes
    themselves are the contextual objects; else there are none. The captions: an expression for
    each sentence, without a referent ("ann_id" is None); all boxes of its phrases are contextual
    objects. An annotation has the same id in both views, and no expression of one has the "sent_id"
    of another, so the views can be merged.

    The files count pixels from 1 and name a box's last pixel; here the box ends behind that, as
    in Detectron2's Pascal VOC. Boxes are clipped to the image; those that are then empty are left
    out with a warning, and so are sentences and phrases without words. Phrases without a box, and
    images without any expression, are left out.

    Args:
        root: folder of `Annotations/`, `Sentences/` and the lists of the splits.
        image_root: folder of the images, `<id>.jpg`.
        split: "train", "val" or "test", or the name of any list `<split>.txt` of image ids.
        captions: the view of the captions; else that of the phrases.

    Returns:
        Dicts sorted by image id with "file_name", "image_id" (Flickr's number), "height" and
        "width" in pixels, "annotations" ("id", "bbox" in the mode `XYWH_ABS`, "category_id"
        `UNKNOWN_CLASS`, "iscrowd" 0) and "expressions": dicts with "sent_id", "ref_id" (the
        chain, None for a caption), "query", "ann_id", "context_ann_ids", "split", "manner"
        (None), "sentence" (plain text) and, of a phrase, "phrase_type" (a list).

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or a list of a split is empty.
    """
    root, image_root = Path(root), Path(image_root)
    make = _captions if captions else _phrases
    images, empty = [], []
    for image_id in read_split(root / f"{split}.txt"):
        boxes_file = root / "Annotations" / f"{image_id}.xml"
        sentences_file = root / "Sentences" / f"{image_id}.txt"
        boxes = read_boxes(boxes_file)
        objects = _number_objects(boxes)
        empty += [f"{boxes_file} (object {number})" for number in boxes.empty]
        sentences = read_sentences(sentences_file)
        _check_countable(sentences, sentences_file)
        expressions = [
            {"split": split, "manner": None, **expression}
            for expression in make(image_id, sentences, objects, sentences_file)
        ]
        if expressions:
            images.append(
                {
                    "file_name": str(image_root / f"{image_id}.jpg"),
                    "image_id": image_id,
                    "height": boxes.height,
                    "width": boxes.width,
                    "annotations": objects.annotations,
                    "expressions": expressions,
                }
            )
    if empty:
        logger.warning(
            "Left out %d boxes that are empty inside their image, the first in %s",
            len(empty),
            empty[0],
        )
    return images


def read_split(path: Path) -> list[int]:
    """The image ids of a list, one a line, sorted and each once.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no image id, or there is none.
    """
    check_exists(path, FLICKR30K_ENTITIES)
    words = path.read_bytes().split()
    for number, word in enumerate(words, 1):
        if not word.isdigit():
            raise ValueError(
                f"{path}: entry {number} is {word.decode(errors='replace')!r}, expected a Flickr "
                f"image number. Repair the list or fetch it again. {FLICKR30K_ENTITIES}"
            )
    if not words:
        raise ValueError(
            f"{path}: the list is empty, expected a Flickr image number a line. "
            f"{FLICKR30K_ENTITIES}"
        )
    return sorted({int(word) for word in words})


class _Objects(NamedTuple):
    """The annotations of an image, and the ids of those that mean a chain.

    Attributes:
        annotations: one for each box, then one for the union of each chain of several boxes.
        singles: per chain the annotations of its boxes.
        merged: per chain of several boxes the annotation of their union.
    """

    annotations: list[dict[str, Any]]
    singles: dict[int, list[int]]
    merged: dict[int, int]


def _number_objects(boxes: ImageBoxes) -> _Objects:
    """Numbers depend on the file of the boxes alone, so that they are the same in every view."""
    annotations, singles = [], {}
    for number, (chains, box) in boxes.objects.items():
        annotations.append(_annotation(number, box))
        for chain in chains:
            singles.setdefault(chain, []).append(number)
    first = boxes.num_objects + 1
    several = sorted(chain for chain, ids in singles.items() if len(ids) > 1)
    merged = {chain: first + place for place, chain in enumerate(several)}
    for chain, number in merged.items():
        x1, y1, x2, y2 = zip(*(boxes.objects[one].box for one in singles[chain]), strict=True)
        annotations.append(_annotation(number, (min(x1), min(y1), max(x2), max(y2))))
    return _Objects(annotations, singles, merged)


def _annotation(number: int, box: tuple[int, int, int, int]) -> dict[str, Any]:
    x1, y1, x2, y2 = box
    return {
        "id": number,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "bbox_mode": XYWH_ABS,
        "category_id": UNKNOWN_CLASS,
        "iscrowd": 0,
    }


def _phrases(
    image_id: int, sentences: dict[int, Sentence], objects: _Objects, path: Path
) -> Iterator[dict[str, Any]]:
    for number, sentence in sentences.items():
        for place, phrase in enumerate(sentence.phrases, 1):
            ids = objects.singles.get(phrase.chain)
            if ids is None:
                continue
            if not phrase.text:
                logger.warning("%s: left out a phrase of line %d without words", path, number)
                continue
            yield _phrase(phrase, sentence.text, ids, objects.merged.get(phrase.chain)) | {
                "sent_id": _sent_id(image_id, number, place)
            }


def _phrase(phrase: Phrase, sentence: str, ids: list[int], merged: int | None) -> dict[str, Any]:
    return {
        "ref_id": phrase.chain,
        "query": phrase.text,
        "ann_id": ids[0] if merged is None else merged,
        "context_ann_ids": [] if merged is None else list(ids),
        "phrase_type": list(phrase.types),
        "sentence": sentence,
    }


def _captions(
    image_id: int, sentences: dict[int, Sentence], objects: _Objects, path: Path
) -> Iterator[dict[str, Any]]:
    for number, sentence in sentences.items():
        if not sentence.text:
            logger.warning("%s: left out line %d, which has no words", path, number)
            continue
        chains = (phrase.chain for phrase in sentence.phrases)
        ids = {one for chain in chains for one in objects.singles.get(chain, ())}
        yield {
            "sent_id": _sent_id(image_id, number, 0),
            "ref_id": None,
            "query": sentence.text,
            "ann_id": None,
            "context_ann_ids": sorted(ids),
            "sentence": sentence.text,
        }


def _sent_id(image_id: int, line: int, place: int) -> int:
    """A number that no other expression of either view has; place 0 is the whole sentence."""
    return (image_id * _PLACES + line) * _PLACES + place


def _check_countable(sentences: dict[int, Sentence], path: Path) -> None:
    longest = max((len(sentence.phrases) for sentence in sentences.values()), default=0)
    if max(sentences, default=0) >= _PLACES or longest >= _PLACES:
        raise ValueError(
            f"{path}: more than {_PLACES - 1} lines, or phrases in one of them; expected the "
            f"captions of one image, one a line. Fetch the file again. {FLICKR30K_ENTITIES}"
        )
