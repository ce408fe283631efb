"""Flickr30k Entities in Detectron2's standard format: phrases of captions with their boxes.

Flickr30k calls an object of an image a "chain": all mentions of it in the five captions share a
chain id, and so do its boxes; it may have none (a scene) or several (a crowd).
"""

from __future__ import annotations

import logging
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ...file_io import shown
from ..entries import check_exists, single_spaces
from .refer import XYWH_ABS

logger = logging.getLogger(__name__)

SOURCE = (
    "Flickr30k Entities (Annotations, Sentences and the lists of the splits) comes from "
    "https://github.com/BryanPlummer/flickr30k_entities."
)
SPLITS = ("train", "val", "test")
UNKNOWN_CLASS = -1
"""`category_id` of a box whose class is not known."""

_PLACES = 100  # exceeds the sentences of an image and the phrases of a sentence


def load_flickr30k_entities(
    root: str | Path, image_root: str | Path, split: str, *, captions: bool = False
) -> list[dict[str, Any]]:
    """Reads the images of a split with their boxes and expressions.

    There are two views. Phrases: one expression per mention that has a box; the box of its chain is
    the referent. If a chain has several boxes, the referent is their union ("merged boxes", the
    protocol of phrase grounding), as an annotation of its own, and the boxes themselves are the
    contextual objects; otherwise there are none. Captions: one expression per sentence, without a
    referent ("ann_id" is None); all boxes of its phrases are contextual objects. Annotations have
    the same ids in both views and "sent_id"s are distinct, so the views can be merged.

    The files count pixels from 1 and include a box's last pixel; here the box ends after it, as
    in Detectron2's Pascal VOC. Boxes are clipped to the image. Boxes that are then empty, and
    sentences and phrases without words, are dropped with a warning. Phrases without a box and
    images without any expression are dropped.

    Args:
        root: folder of `Annotations/`, `Sentences/` and the lists of the splits.
        image_root: folder of the images, `<id>.jpg`.
        split: "train", "val" or "test", or the name of any list `<split>.txt` of image ids.
        captions: gives the view of captions instead of phrases.

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
        longest = max((len(sentence.phrases) for sentence in sentences.values()), default=0)
        if max(sentences, default=0) >= _PLACES or longest >= _PLACES:
            raise ValueError(
                f"{sentences_file}: more than {_PLACES - 1} lines, or phrases in one of them; "
                "expected the captions of one image, one per line. Fetch the file again. "
                f"{SOURCE}"
            )
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
        message = "Left out %d boxes that are empty inside their image, the first in %s"
        logger.warning(message, len(empty), empty[0])
    return images


def read_split(path: Path) -> list[int]:
    """Reads the image ids of a list, one per line; sorted, without repetitions.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not an image id, or there is none.
    """
    check_exists(path, SOURCE)
    words = path.read_bytes().split()
    for number, word in enumerate(words, 1):
        if not word.isdigit():
            raise ValueError(
                f"{path}: entry {number} is {shown(word.decode(errors='replace'))}, expected a "
                f"Flickr image number. Repair the list or fetch it again. {SOURCE}"
            )
    if not words:
        raise ValueError(
            f"{path}: the list is empty, expected a Flickr image number per line. {SOURCE}"
        )
    return sorted({int(word) for word in words})


class _Objects(NamedTuple):
    """The annotations of an image, and their ids by chain."""

    annotations: list[dict[str, Any]]  # of each box, then of the union of each chain of several
    singles: dict[int, list[int]]  # chain -> annotations of its boxes
    merged: dict[int, int]  # chain of several boxes -> annotation of their union


def _number_objects(boxes: ImageBoxes) -> _Objects:
    """Ids depend on the file of the boxes alone: they are the same in both views."""
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
            merged = objects.merged.get(phrase.chain)
            yield {
                "sent_id": _sent_id(image_id, number, place),
                "ref_id": phrase.chain,
                "query": phrase.text,
                "ann_id": ids[0] if merged is None else merged,
                "context_ann_ids": [] if merged is None else list(ids),
                "phrase_type": list(phrase.types),
                "sentence": sentence.text,
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
    """An id that is distinct in both views; place 0 is the whole sentence."""
    return (image_id * _PLACES + line) * _PLACES + place


# --- the files: marked sentences (text) and boxes (XML) --------------------------------------

# [/EN#283585/people Two young guys]; a phrase may have several types: [/EN#6/vehicles/scene ...]
_PHRASE = re.compile(r"\[/EN#(?P<chain>\d+)(?P<types>(?:/[^\s/\]]+)+)(?P<words>(?:\s[^\]]*)?)\]")
_MARK = "[/EN#"


class Phrase(NamedTuple):
    """A marked phrase of a sentence."""

    chain: int  # the object it refers to; 0 for an invisible one
    types: tuple[str, ...]  # as "people", "bodyparts" or "notvisual"
    text: str  # its words, with single spaces; may be empty


class Sentence(NamedTuple):
    """A sentence as plain text with single spaces, and its marked phrases in order."""

    text: str
    phrases: tuple[Phrase, ...]


class ObjectBox(NamedTuple):
    """A box, xyxy in pixels inside the image, and the chains that it belongs to."""

    chains: tuple[int, ...]
    box: tuple[int, int, int, int]


class ImageBoxes(NamedTuple):
    """The boxes of an image; its height and width in pixels."""

    height: int
    width: int
    num_objects: int  # `<object>` elements of the file, with and without a box
    objects: dict[int, ObjectBox]  # those with a box, by their position in the file, from 1
    empty: list[int]  # positions of those whose box is empty inside the image


def read_sentences(path: Path) -> dict[int, Sentence]:
    """Reads the sentences of an image, `Sentences/<image id>.txt` in UTF-8 or otherwise Latin-1,
    by line number from 1; blank lines have no words.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, or a phrase is not marked correctly.
    """
    check_exists(path, SOURCE)
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    if not text.strip():
        raise ValueError(
            f"{path}: the file is empty, expected a sentence per line. Fetch it again. {SOURCE}"
        )
    # Not splitlines(), which also splits at rarer characters.
    lines = text.rstrip().replace("\r\n", "\n").split("\n")
    return {n: parse_sentence(line, f"{path}, line {n}") for n, line in enumerate(lines, 1)}


def parse_sentence(line: str, where: str = "sentence") -> Sentence:
    """Splits a line, as `[/EN#1/people Two young guys] with [/EN#0/notvisual who] ... .`, into
    plain text and marked phrases.

    Raises:
        ValueError: a mark is not closed or has no type; the message begins with `where`.
    """
    phrases = []
    for match in _PHRASE.finditer(line):
        types = tuple(match["types"].strip("/").split("/"))
        phrases.append(Phrase(int(match["chain"]), types, single_spaces(match["words"])))
    plain = _PHRASE.sub(lambda match: match["words"], line)
    if _MARK in plain:
        rest = plain[plain.index(_MARK) :]
        raise ValueError(
            f"{where}: {shown(rest[:40])} is not marked correctly, expected [/EN#<chain "
            f"id>/<type> <words>]. Repair the line or fetch the file again. {SOURCE}"
        )
    return Sentence(single_spaces(plain), tuple(phrases))


def read_boxes(path: Path) -> ImageBoxes:
    """Reads the boxes of an image, `Annotations/<image id>.xml`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not complete XML, declares a document type, or lacks an element.
    """
    check_exists(path, SOURCE)
    root = _parse(path)
    if root.tag != "annotation":
        raise ValueError(
            f"{path}: the root element is <{root.tag}>, expected <annotation>. Fetch the file "
            f"again. {SOURCE}"
        )
    size = root.find("size")
    height, width = (_integer(size, tag, f"{path}: <size>") for tag in ("height", "width"))
    if min(height, width) <= 0:
        raise ValueError(
            f"{path}: <size> is {width} x {height}, expected the image's size in pixels. Repair "
            f"it or fetch the file again. {SOURCE}"
        )
    elements = root.findall("object")
    objects, empty = {}, []
    for number, element in enumerate(elements, 1):
        where = f"{path}: <object> number {number}"
        chains = tuple(_as_integer(name.text, "name", where) for name in element.findall("name"))
        if not chains:
            raise ValueError(f"{where} has no <name>, {_EXPECTED_NUMBER}")
        bndbox = element.find("bndbox")
        if bndbox is None:  # <scene> or <nobndbox>
            continue
        x1, y1, x2, y2 = (_integer(bndbox, tag, where) for tag in ("xmin", "ymin", "xmax", "ymax"))
        # Pixels are counted from 1, and the box includes the last one.
        box = max(x1 - 1, 0), max(y1 - 1, 0), min(x2, width), min(y2, height)
        if box[0] < box[2] and box[1] < box[3]:
            objects[number] = ObjectBox(tuple(dict.fromkeys(chains)), box)
        else:
            empty.append(number)
    return ImageBoxes(height, width, len(elements), objects, empty)


_EXPECTED_NUMBER = f"expected a whole number. Repair the element or fetch the file again. {SOURCE}"


def _integer(parent: ET.Element | None, tag: str, where: str) -> int:
    element = None if parent is None else parent.find(tag)
    if element is None:
        raise ValueError(f"{where} has no <{tag}>, {_EXPECTED_NUMBER}")
    return _as_integer(element.text, tag, where)


def _as_integer(text: str | None, tag: str, where: str) -> int:
    try:
        return int(text or "")
    except ValueError:
        raise ValueError(f"{where}: <{tag}> is {shown(text)}, {_EXPECTED_NUMBER}") from None


class _DoctypeFound(Exception):
    pass


class _NoDoctype(ET.TreeBuilder):
    """Rejects document types. They can declare entities, with which a small file can fill the
    memory or read other files; the real files have none."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise _DoctypeFound


def _parse(path: Path) -> ET.Element:
    try:
        return ET.fromstring(path.read_bytes(), ET.XMLParser(target=_NoDoctype()))
    except _DoctypeFound:
        raise ValueError(
            f"{path}: refused, as it declares a document type (<!DOCTYPE>), which may hold "
            f"entities; expected plain elements. Fetch the file again. {SOURCE}"
        ) from None
    except (ET.ParseError, LookupError, ValueError) as error:
        raise ValueError(
            f"{path}: not valid XML ({error}). The file may have been cut short: fetch it again. "
            f"{SOURCE}"
        ) from error
