"""Formats with the features of the boxes: DDPN's files, the TSV of bottom-up-attention, and the
arrays of SCAN and IMRAM."""

from __future__ import annotations

import base64
import json
import logging
import pickle
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..data.datasets.refer import load_plain_pickle
from ..data.entries import read_json, require
from ..file_io import shown
from .base import (
    ProposalFormat,
    QueryProposals,
    concatenate,
    npz_bytes,
    read_records,
    union,
    write_record,
)

logger = logging.getLogger(__name__)

DDPN_NAMES = ("auto", "coco", "plain")
TSV_COLUMNS = {
    "bottom-up": ("id", "w", "h", "num", "boxes", "features"),
    "lxmert": ("id", "h", "w", "class", "conf", "attr", "attr_conf", "num", "boxes", "features"),
}
SPLITS = {"train": "train", "restval": "train", "val": "dev", "dev": "dev", "test": "test"}
"""The names of splits that SCAN and IMRAM read, by the names of Karpathy's splits."""
CAPTIONS_PER_IMAGE, DEV_CAPTIONS = 5, 5000
"""What SCAN and IMRAM assume: `dev` has at least 5,000 captions."""


class DDPN(ProposalFormat):
    """Two folders: `queries`, with a file for each query, and `images`, with a file for each image:
    the union of its queries, the `MAX_BOXES` of the highest confidence.

    A file has `x`, float32 [D, boxes], the features; `bbox`, float32 [boxes, 4], xyxy in pixels;
    `num_bbox`, `image_h` and `image_w`, int64. Its name is what DDPN makes of an `iid`, which is
    the id of the image or of the query.

    Args:
        names: "coco" for `COCO_train2014_<iid, 12 digits>.jpg.npz`, as DDPN's configs of REFER data
            sets expect; "plain" for `<iid>.jpg.npz`; "auto": as the image files are named.
        annotations: annotation files of DDPN, pickled or JSON, {qid: {"qstr", "iid", ...}}. The
            output has a copy of each that refers to the files in `queries`.
    """

    name = "ddpn"
    output = "ddpn"
    MAX_BOXES = 100  # RPN_TOPN of DDPN

    def __init__(self, names: str = "auto", annotations: Sequence[Path] = ()):
        if names not in DDPN_NAMES:
            raise ValueError(f"ddpn names are {names!r}, expected {', '.join(DDPN_NAMES)}")
        self.names, self.annotations = names, annotations

    def check(self, images: Sequence[Mapping[str, Any]]) -> None:
        iids = {}
        for image in images:
            for expression in image["expressions"]:
                _check_number(expression["sent_id"], image["image_id"])
                key = _query_key(image["image_id"], expression["query"])
                iids[key] = expression["sent_id"]
        for path in self.annotations:
            _with_iids(path, iids)

    def write(self, proposals: Sequence[QueryProposals], shard: BinaryIO) -> None:
        for query in proposals:
            _check_number(query.query_id, query.image_id)
            if len(query) > self.MAX_BOXES:
                raise ValueError(
                    f"query {query.query_id} of image {query.image_id} has {len(query)} boxes, but "
                    f"DDPN has room for {self.MAX_BOXES} (its RPN_TOPN). Keep fewer (--top-n)."
                )
            header = {
                "name": f"queries/{self._file_name(query, int(query.query_id))}",
                "key": _query_key(query.image_id, query.query),
                "iid": query.query_id,
            }
            write_record(shard, header, _ddpn_file(query))
        if proposals:
            kept = union(proposals)
            name = f"images/{self._file_name(kept, kept.image_id)}"
            write_record(shard, {"name": name}, _ddpn_file(kept))

    def merge(self, shards: Iterable[Path], path: Path) -> None:
        if path.is_dir():
            shutil.rmtree(path)
        for folder in ("queries", "images"):
            (path / folder).mkdir(parents=True)
        iids = {}
        for header, body in read_records(shards):
            (path / header["name"]).write_bytes(body)
            if self.annotations and "key" in header:
                iids[header["key"]] = header["iid"]
        for source in self.annotations:
            (path / source.name).write_bytes(_with_iids(source, iids))

    def _file_name(self, query: QueryProposals, iid: int) -> str:
        is_coco = re.match(r"(COCO_\w+_)?\d{12}\.", query.image_name)
        if self.names == "coco" or (self.names == "auto" and is_coco):
            return f"COCO_train2014_{iid:012d}.jpg.npz"
        return f"{iid}.jpg.npz"


def _check_number(query_id: int | str, image_id: int) -> None:
    if not isinstance(query_id, int):
        raise ValueError(
            f"query id {shown(query_id)} of image {image_id} is no integer, which readers of ddpn "
            "and bottom-up expect. Number the queries anew."
        )


def _query_key(image_id: int | str, query: str) -> str:
    """Queries of an image with the same words have the same proposals."""
    return " ".join([str(image_id), *re.findall(r"[^\W_]+", query.lower())])


def _with_iids(path: Path, iids: Mapping[str, int]) -> bytes:
    """A copy of an annotation file of DDPN with the iids of our files, by `_query_key`."""
    source = "It is a file of DDPN's ANNO_PATH."
    is_json = path.suffix == ".json"
    queries = read_json(path, source) if is_json else load_plain_pickle(path)
    if not isinstance(queries, dict):
        raise ValueError(f"{path}: expected a dictionary, found {type(queries).__name__}. {source}")
    copy, unknown = {}, []
    for qid, query in queries.items():
        words = require(query, "qstr", str, f"{path}: query {shown(qid)}")
        key = _query_key(query.get("iid"), words)
        copy[qid] = {**query, "iid": iids.get(key)}
        unknown += [] if key in iids else [(qid, query.get("iid"), words)]
    if unknown:
        qid, iid, words = unknown[0]
        raise ValueError(
            f"{path}: {len(unknown)} of {len(copy)} queries are not in the data set (the first is "
            f"{shown(qid)}: image {shown(iid)}, {shown(words)}). Give the annotation file of the "
            "data set's split."
        )
    # Python 2, which DDPN runs on, reads protocol 2.
    return json.dumps(copy).encode() if is_json else pickle.dumps(copy, protocol=2)


def _ddpn_file(query: QueryProposals) -> bytes:
    height, width = query.image_size
    features, corners = (each[: DDPN.MAX_BOXES] for each in (query.features, query.corners))
    return npz_bytes(
        {
            "x": np.ascontiguousarray(features.T, dtype=np.float32),  # [D, boxes]
            "bbox": corners.astype(np.float32),
            "num_bbox": np.int64(len(corners)),
            "image_h": np.int64(height),
            "image_w": np.int64(width),
        }
    )


class BottomUp(ProposalFormat):
    """The TSV file of bottom-up-attention: `image_id`, `image_w`, `image_h`, `num_boxes`, `boxes`
    and `features`, the last two base64 of float32 [boxes, 4], xyxy in pixels, and [boxes, D].

    A line has everything that any query of an image keeps, without near-copies, in descending order
    of the confidence; images without boxes, which readers reject, have no line.

    Args:
        columns: "bottom-up", or "lxmert" for the ten columns of LXMERT, where objects_id are
            category ids and attributes are 0.
        boxes: fewest and most per line. If there are fewer, they are repeated from the first one.
        per_query: a line for each query, with its id as image_id.
    """

    name = "bottom-up"
    output = "bottom_up.tsv"

    def __init__(
        self, columns: str = "bottom-up", boxes: Sequence[int] = (10, 100), per_query: bool = False
    ):
        if not 1 <= boxes[0] <= boxes[1]:
            raise ValueError(f"boxes are {boxes}, expected the fewest and the most, from 1")
        self.columns, self.boxes, self.per_query = TSV_COLUMNS[columns], boxes, per_query

    def check(self, images: Sequence[Mapping[str, Any]]) -> None:
        for image in images if self.per_query else ():
            for expression in image["expressions"]:
                _check_number(expression["sent_id"], image["image_id"])

    def write(self, proposals: Sequence[QueryProposals], shard: BinaryIO) -> None:
        for part in [[query] for query in proposals] if self.per_query else [proposals]:
            if any(map(len, part)):
                self._write_line(union(part, near_copies=False), shard)

    def _write_line(self, kept: QueryProposals, shard: BinaryIO) -> None:
        fewest, most = self.boxes
        places = np.arange(min(max(len(kept), fewest), most)) % len(kept)
        values = {
            "id": kept.query_id if self.per_query else kept.image_id,
            "h": kept.image_size[0],
            "w": kept.image_size[1],
            "num": len(places),
            "boxes": kept.corners[places].astype(np.float32),
            "features": kept.features[places].astype(np.float32),
            "class": kept.category_ids[places],
            "conf": kept.cls_scores[places].astype(np.float32),
            "attr": np.zeros(len(places), np.int64),
            "attr_conf": np.zeros(len(places), np.float32),
        }
        line = (values[column] for column in self.columns)
        encoded = (
            base64.b64encode(v.tobytes()) if isinstance(v, np.ndarray) else b"%d" % v for v in line
        )
        shard.write(b"\t".join(encoded) + b"\n")

    def merge(self, shards: Iterable[Path], path: Path) -> None:
        concatenate(shards, path)


class Scan(ProposalFormat):
    """A folder with, for each of the splits train, dev and test:

    * `{split}_ims.npy`: float32 [captions, boxes, D], the features of the proposals of each caption
      in descending score order. If there are fewer than `boxes`, they are repeated from the first
      one; all zeros if there are none;
    * `{split}_caps.txt`: the captions, one per line, exactly five per image: the first ones;
    * `{split}_num_boxes.npy`: int64 [captions], the number of boxes before repetition;
    * `{split}_query_ids.txt`: the ids of the captions, one per line.

    There are as many rows as captions, whose proposals differ. SCAN and IMRAM accept that: they
    divide by 5 only if there are fewer. But their evaluation uses every fifth row only.

    Args:
        num_boxes: per caption; 36 and 10 are common.
        allow_test: also write test splits.
    """

    name = "scan"
    output = "scan"
    array = "ims"

    def __init__(self, num_boxes: int = 36, allow_test: bool = False):
        self.num_boxes, self.allow_test = num_boxes, allow_test

    def files(self) -> list[str]:
        """The names of a split's files, without the split."""
        return [f"{self.array}.npy", "caps.txt", "num_boxes.npy", "query_ids.txt"]

    def check(self, images: Sequence[Mapping[str, Any]]) -> None:
        for image in images:
            self._split_of(image["image_id"], [e["split"] for e in image["expressions"]])

    def _split_of(self, image_id: int, splits: Sequence[str | None]) -> str:
        """The split of an image, as SCAN names it, by the splits of its captions."""
        where = f"{self.name}: image {image_id} has"
        if len(splits) < CAPTIONS_PER_IMAGE:
            raise ValueError(
                f"{where} {len(splits)} captions, but the reader takes {CAPTIONS_PER_IMAGE} lines "
                "for each image. Leave the image out of the data set, or add captions."
            )
        names = {SPLITS.get(split) for split in splits}
        name = names.pop()
        if name is None or names:
            raise ValueError(f"{where} the splits {set(splits)}, expected one of {[*SPLITS]}")
        if name == "test" and not self.allow_test:
            raise ValueError(
                f"{where} the split 'test'. The reader would compare all captions with the boxes "
                "of each image's first caption, which is another, easier protocol. Use "
                "tools/export_pairs.py, or give --allow-test-split."
            )
        return name

    def write(self, proposals: Sequence[QueryProposals], shard: BinaryIO) -> None:
        if not proposals:
            return
        split = self._split_of(proposals[0].image_id, [query.split for query in proposals])
        for query in proposals[:CAPTIONS_PER_IMAGE]:
            self.write_pair(shard, split, query.query_id, query.query, query.features)

    def write_pair(
        self, shard: BinaryIO, split: str, query_id: int | str, caption: str, features: np.ndarray
    ) -> None:
        """Append a caption, or a pair of any image and caption, with the features [K, D]
        of its proposals in descending score order; the first `num_boxes` are used."""
        features = features[: self.num_boxes].astype(np.float32)
        rows = np.zeros((self.num_boxes, features.shape[1]), dtype=np.float32)
        if len(features):
            rows = features[np.arange(self.num_boxes) % len(features)]
        header = {
            "split": split,
            "query_id": query_id,
            "caption": " ".join(caption.split()),
            "num_boxes": len(features),
            "dim": features.shape[1],
        }
        write_record(shard, header, rows.tobytes())

    def merge(self, shards: Iterable[Path], path: Path) -> None:
        if path.is_dir():
            shutil.rmtree(path)
        path.mkdir(parents=True)
        shards = list(shards)
        counts: Counter[str] = Counter()
        dim = 0
        for header, _ in read_records(shards, with_body=False):
            counts[header["split"]] += 1
            dim = header["dim"]
        if 0 < counts["dev"] < DEV_CAPTIONS:
            logger.warning(
                "%s: %s has %d captions of dev, but SCAN and IMRAM read %d (data.py) and stop with "
                "an IndexError. Export more images, or write %d in their data.py.",
                *(self.name, path, counts["dev"], DEV_CAPTIONS, counts["dev"]),
            )
        with ExitStack() as stack:
            splits = {
                split: _SplitFiles(path / split, self.array, (count, self.num_boxes, dim), stack)
                for split, count in counts.items()
            }
            for header, body in read_records(shards):
                splits[header["split"]].add(header, body)


class Imram(Scan):
    """The files of `Scan`, but `{split}_feat.npy` in place of `{split}_ims.npy`."""

    name = "imram"
    output = "imram"
    array = "feat"


class _SplitFiles:
    """The files of a split, filled pair by pair."""

    def __init__(self, stem: Path, array: str, shape: tuple[int, int, int], stack: ExitStack):
        def memory_map(name: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
            return np.lib.format.open_memmap(f"{stem}_{name}.npy", "w+", dtype, shape)

        self.features = memory_map(array, np.float32, shape)
        self.num_boxes = memory_map("num_boxes", np.int64, shape[:1])
        paths = (Path(f"{stem}_{name}.txt") for name in ("caps", "query_ids"))
        self.captions, self.query_ids = (stack.enter_context(each.open("wb")) for each in paths)
        self.count = 0

    def add(self, header: dict, body: bytes) -> None:
        row = np.frombuffer(body, dtype=np.float32)
        self.features[self.count] = row.reshape(self.features.shape[1:])
        self.num_boxes[self.count] = header["num_boxes"]
        self.captions.write(header["caption"].encode() + b"\n")
        self.query_ids.write(f"{header['query_id']}\n".encode())
        self.count += 1
