"""The two kinds of files of Flickr30k Entities: marked sentences (text) and boxes (XML)."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple

from .entries import check_exists
from .sources import FLICKR30K_ENTITIES

# [/EN#283585/people Two young guys]; a phrase may have several types: [/EN#6/vehicles/scene ...]
_PHRASE = re.compile(r"\[/EN#(?P<chain>\d+)(?P<types>(?:/[^\s/\]]+)+)(?P<words>(?:\s[^\]]*)?)\]")
_MARK = "[/EN#"


class Phrase(NamedTuple):
    """A marked phrase of a sentence.

    Attributes:
        chain: the object it means; 0 for one that cannot be seen.
        types: as "people", "bodyparts" or "notvisual".
        text: its words, with single spaces; may be empty.
    """

    chain: int
    types: tuple[str, ...]
    text: str


class Sentence(NamedTuple):
    """A sentence as plain text with single spaces, and its marked phrases in order."""

    text: str
    phrases: tuple[Phrase, ...]


class ObjectBox(NamedTuple):
    """A box, xyxy in pixels inside the image, and the chains that it belongs to."""

    chains: tuple[int, ...]
    box: tuple[int, int, int, int]


class ImageBoxes(NamedTuple):
    """The boxes of an image.

    Attributes:
        height, width: of the image, in pixels.
        num_objects: `<object>` elements of the file, with and without a box.
        objects: those with a box by their place in the file, from 1.
        empty: places of those whose box is empty inside the image.
    """

    height: int
    width: int
    num_objects: int
    objects: dict[int, ObjectBox]
    empty: list[int]


def read_sentences(path: Path) -> dict[int, Sentence]:
    """The sentences of an image by their line, from 1; blank lines are sentences without words.

    Args:
        path: `Sentences/<image id>.txt`, in UTF-8 or else Latin-1.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, or a phrase is not marked as it should be.
    """
    check_exists(path, FLICKR30K_ENTITIES)
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    if not text.strip():
        raise ValueError(
            f"{path}: the file is empty, expected a sentence a line. Fetch it again. "
            f"{FLICKR30K_ENTITIES}"
        )
    # Not splitlines(), which would also part a line at rarer characters.
    lines = text.rstrip().replace("\r\n", "\n").split("\n")
    return {n: parse_sentence(line, f"{path}, line {n}") for n, line in enumerate(lines, 1)}


def parse_sentence(line: str, where: str = "sentence") -> Sentence:
    """Parts a line into plain text and marked phrases.

    Args:
        line: as `[/EN#1/people Two young guys] with [/EN#0/notvisual who] ... .`
        where: file and line, for the message.

    Raises:
        ValueError: a mark is not closed or has no type.
    """
    phrases = tuple(
        Phrase(
            int(found["chain"]),
            tuple(found["types"].strip("/").split("/")),
            _single_spaces(found["words"]),
        )
        for found in _PHRASE.finditer(line)
    )
    plain = _PHRASE.sub(lambda found: found["words"], line)
    if _MARK in plain:
        rest = plain[plain.index(_MARK) :]
        raise ValueError(
            f"{where}: {rest[:40]!r} is not marked as a phrase should be, expected [/EN#<chain "
            f"id>/<type> <words>]. Repair the line or fetch the file again. {FLICKR30K_ENTITIES}"
        )
    return Sentence(_single_spaces(plain), phrases)


def _single_spaces(text: str) -> str:
    return " ".join(text.split())


def read_boxes(path: Path) -> ImageBoxes:
    """The boxes of an image.

    Args:
        path: `Annotations/<image id>.xml`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no complete XML, declares a document type, or lacks an element.
    """
    check_exists(path, FLICKR30K_ENTITIES)
    root = _parse(path)
    if root.tag != "annotation":
        raise ValueError(
            f"{path}: the root element is <{root.tag}>, expected <annotation>. Fetch the file "
            f"again. {FLICKR30K_ENTITIES}"
        )
    size = root.find("size")
    height, width = (_integer(size, tag, f"{path}: <size>") for tag in ("height", "width"))
    if min(height, width) <= 0:
        raise ValueError(
            f"{path}: <size> is {width} x {height}, expected the image's size in pixels. Repair "
            f"it or fetch the file again. {FLICKR30K_ENTITIES}"
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
        # Pixels are counted from 1, and the last one belongs to the box.
        box = max(x1 - 1, 0), max(y1 - 1, 0), min(x2, width), min(y2, height)
        if box[0] < box[2] and box[1] < box[3]:
            objects[number] = ObjectBox(tuple(dict.fromkeys(chains)), box)
        else:
            empty.append(number)
    return ImageBoxes(height, width, len(elements), objects, empty)


_EXPECTED_NUMBER = (
    f"expected a whole number. Repair the element or fetch the file again. {FLICKR30K_ENTITIES}"
)


def _integer(parent: ET.Element | None, tag: str, where: str) -> int:
    element = None if parent is None else parent.find(tag)
    if element is None:
        raise ValueError(f"{where} has no <{tag}>, {_EXPECTED_NUMBER}")
    return _as_integer(element.text, tag, where)


def _as_integer(text: str | None, tag: str, where: str) -> int:
    try:
        return int(text or "")
    except ValueError:
        raise ValueError(f"{where}: <{tag}> is {text!r}, {_EXPECTED_NUMBER}") from None


class _NoDoctype(ET.TreeBuilder):
    """Entities, with which a small file can fill the memory or read other files, are declared in
    a document type; the real files have none."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise _DoctypeFound


class _DoctypeFound(Exception):
    pass


def _parse(path: Path) -> ET.Element:
    try:
        return ET.fromstring(path.read_bytes(), ET.XMLParser(target=_NoDoctype()))
    except _DoctypeFound:
        raise ValueError(
            f"{path}: refused, as it declares a document type (<!DOCTYPE>), which may hold "
            f"entities; expected plain elements. Fetch the file again. {FLICKR30K_ENTITIES}"
        ) from None
    except (ET.ParseError, LookupError, ValueError) as error:
        raise ValueError(
            f"{path}: not valid XML ({error}). The file may have been cut short: fetch it again. "
            f"{FLICKR30K_ENTITIES}"
        ) from error
