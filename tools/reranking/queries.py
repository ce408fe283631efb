"""Queries of images, from files of four formats."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vlnms_d2.data.datasets.flickr30k import SOURCE as FLICKR30K_SOURCE
from vlnms_d2.data.datasets.flickr30k import read_sentences
from vlnms_d2.data.datasets.refer import read_refs
from vlnms_d2.data.entries import (
    check_exists,
    check_new,
    is_integer,
    read_json,
    require,
    single_spaces,
)
from vlnms_d2.file_io import shown

FORMATS = (
    "Queries are COCO captions (.json), refs of REFER (.p, .pkl, .pickle), JSON lines of "
    "{image_id, query_id, query} (.jsonl) or a folder of Flickr30k Entities with "
    "Sentences/<image id>.txt."
)


class Query(NamedTuple):
    """A query of an image.

    Its id is that of a caption, the sent_id of REFER, or for Flickr30k "<image id>#<line, from 0>".
    """

    image_id: int
    query_id: int | str  # distinct
    text: str  # with single spaces; may be empty
    ref_id: int | None = None  # of REFER
    split: str | None = None  # of REFER


def read_queries(path: str | Path, split: str | None = None) -> list[Query]:
    """Reads queries; the suffix of the file tells its format.

    Args:
        path: see `FORMATS`.
        split: the split of REFER to read; None for all.

    Returns:
        The queries in the order of the file; for a folder, in the order of the image ids.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has another format, is damaged or empty, repeats a query id or does not have
            the split; `RefusedPickle` is a subclass.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    readers = dict.fromkeys((".p", ".pkl", ".pickle"), _refer)
    readers |= {".jsonl": _json_lines, ".json": _coco_captions}
    read = _flickr30k if path.is_dir() else readers.get(suffix)
    if read is None:
        check_exists(path, FORMATS)
        raise ValueError(f"{path}: the suffix {suffix!r} is unknown. {FORMATS}")
    queries, ids = [], set()
    for where, query in read(path):
        check_new(query.query_id, ids, "the id", where)
        ids.add(query.query_id)
        queries.append(query)
    if not queries:
        raise ValueError(f"{path}: there are no queries. {FORMATS}")
    if split is None:
        return queries
    chosen = [query for query in queries if query.split == split]
    if not chosen:
        available = ", ".join(sorted({q.split for q in queries if q.split is not None}))
        raise ValueError(
            f"{path}: no query is of the split {split!r}, available splits: {available or 'none'}. "
            "Choose one of them."
        )
    return chosen


def _coco_captions(path: Path) -> Iterator[tuple[str, Query]]:
    source = "COCO's captions (captions_val2017.json) come from https://cocodataset.org."
    content = read_json(path, source)
    for number, entry in enumerate(require(content, "annotations", list, str(path))):
        where = f"{path}: annotation number {number}"
        text = require(entry, "caption", str, where)
        image_id, query_id = (require(entry, key, int, where) for key in ("image_id", "id"))
        yield where, Query(image_id, query_id, single_spaces(text))


def _json_lines(path: Path) -> Iterator[tuple[str, Query]]:
    check_exists(path, FORMATS)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except (RecursionError, ValueError) as error:
                raise ValueError(
                    f"{where}: not valid JSON ({error}). The file may have been cut short: make it "
                    f"again. {FORMATS}"
                ) from error
            image_id = require(entry, "image_id", int, where)
            text = require(entry, "query", str, where)
            query_id = entry.get("query_id")
            if not (is_integer(query_id) or isinstance(query_id, str)):
                raise ValueError(
                    f"{where}: 'query_id' is {shown(query_id)}, expected an integer or a string. "
                    f"{FORMATS}"
                )
            yield where, Query(image_id, query_id, single_spaces(text))


def _refer(path: Path) -> Iterator[tuple[str, Query]]:
    # No boxes are needed, so a ref need not have its annotation.
    keys = {"image_id": int, "ref_id": int, "split": str, "sentences": list}
    for number, ref in enumerate(read_refs(path, keys)):
        for place, sentence in enumerate(ref["sentences"]):
            where_in_ref = f"{path}: ref number {number}, sentence number {place}"
            sent_id = require(sentence, "sent_id", int, where_in_ref)
            # "sent" is cleaned, "raw" is as typed; a few sentences have only one of them.
            texts = [sentence.get(key) for key in ("sent", "raw")]
            words = [single_spaces(text) for text in texts if isinstance(text, str)]
            text = next(filter(None, words), "")
            yield where_in_ref, Query(ref["image_id"], sent_id, text, ref["ref_id"], ref["split"])


def _flickr30k(path: Path) -> Iterator[tuple[str, Query]]:
    folder = path / "Sentences" if (path / "Sentences").is_dir() else path
    files = {}
    for file in folder.glob("*.txt"):
        if not (file.stem.isascii() and file.stem.isdigit()):
            raise ValueError(
                f"{file}: expected <image id>.txt, the image id in digits. Move other files out of "
                f"the folder. {FLICKR30K_SOURCE}"
            )
        files[int(file.stem)] = file
    if not files:
        raise ValueError(
            f"{folder}: no <image id>.txt in this folder. Check the path. {FLICKR30K_SOURCE}"
        )
    for image_id in sorted(files):
        file = files[image_id]
        for number, sentence in read_sentences(file).items():
            query = Query(image_id, f"{image_id}#{number - 1}", sentence.text)
            yield f"{file}, line {number}", query
