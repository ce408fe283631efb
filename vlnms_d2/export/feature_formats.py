"""Formats with the features of the boxes: DDPN's files, and the arrays of SCAN and IMRAM."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .base import ProposalFormat, QueryProposals, npz_bytes, read_records, union, write_record


class DDPN(ProposalFormat):
    """Two folders: `queries`, with `<query id>.npz` for each query, and `images`, with
    `<image id><suffix of the image file>.npz` for each image: everything that any of its queries
    keeps, without duplicates, in descending order of confidence.

    A file has `x`, float32 [boxes, D], the features; `bbox`, float32 [boxes, 4], xyxy in pixels;
    `num_bbox`, `image_h` and `image_w`, int64.
    """

    name = "ddpn"
    output = "ddpn"

    def write(self, proposals: Sequence[QueryProposals], shard: BinaryIO) -> None:
        for query in proposals:
            if "/" in str(query.query_id):
                raise ValueError(
                    f"query id {query.query_id!r} of image {query.image_id} has a '/', but ddpn "
                    "uses ids as file names. Number the queries anew."
                )
            content = _ddpn_file(query, query.features, query.corners)
            write_record(shard, {"name": f"queries/{query.query_id}.npz"}, content)
        if proposals:
            query, kept = proposals[0], union(proposals)
            content = _ddpn_file(
                query,
                _rows([of.features[place] for of, place in kept], query.features),
                _rows([of.corners[place] for of, place in kept], query.corners),
            )
            name = f"images/{query.image_id}{query.image_suffix}.npz"
            write_record(shard, {"name": name}, content)

    def merge(self, shards: Iterable[Path], path: Path) -> None:
        if path.is_dir():
            shutil.rmtree(path)
        for folder in ("queries", "images"):
            (path / folder).mkdir(parents=True)
        for header, body in read_records(shards):
            (path / header["name"]).write_bytes(body)


def _ddpn_file(query: QueryProposals, features: np.ndarray, corners: np.ndarray) -> bytes:
    height, width = query.image_size
    return npz_bytes(
        {
            "x": features.astype(np.float32),
            "bbox": corners.astype(np.float32),
            "num_bbox": np.int64(len(corners)),
            "image_h": np.int64(height),
            "image_w": np.int64(width),
        }
    )


def _rows(rows: Sequence[np.ndarray], like: np.ndarray) -> np.ndarray:
    return np.array(rows, dtype=like.dtype).reshape(-1, like.shape[1])


class Scan(ProposalFormat):
    """A folder with, for each split:

    * `{split}_ims.npy`: float32 [pairs, boxes, D], the features of a pair's proposals in
      descending score order. If there are fewer than `boxes`, they are repeated from the first
      one; all zeros if there are none;
    * `{split}_caps.txt`: the captions, one pair per line;
    * `{split}_num_boxes.npy`: int64 [pairs], the number of boxes before repetition;
    * `{split}_query_ids.txt`: the ids of the captions, one pair per line.

    The proposals depend on the caption, so there are as many rows as captions. SCAN and IMRAM
    accept that: they divide by 5 only if there are fewer.

    Args:
        num_boxes: per pair; 36 and 10 are common.
    """

    name = "scan"
    output = "scan"
    files = ("ims.npy", "caps.txt", "num_boxes.npy", "query_ids.txt")

    def __init__(self, num_boxes: int = 36):
        self.num_boxes = num_boxes

    def write(self, proposals: Sequence[QueryProposals], shard: BinaryIO) -> None:
        for query in proposals:
            self.write_pair(
                shard, query.split or "all", query.query_id, query.query, query.features
            )

    def write_pair(
        self, shard: BinaryIO, split: str, query_id: int | str, caption: str, features: np.ndarray
    ) -> None:
        """Append a pair to a shard.

        Args:
            shard: open for writing bytes.
            split: first part of the file names.
            query_id, caption: of the pair.
            features: [K, D], of its proposals in descending score order; the first `num_boxes` are
                used.
        """
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
        with ExitStack() as stack:
            splits = {
                split: _SplitFiles(path, split, (count, self.num_boxes, dim), stack)
                for split, count in counts.items()
            }
            for header, body in read_records(shards):
                splits[header["split"]].add(header, body)


class _SplitFiles:
    """The files of a split, filled pair by pair."""

    def __init__(self, folder: Path, split: str, shape: tuple[int, int, int], stack: ExitStack):
        def memory_map(name: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
            path = folder / f"{split}_{name}.npy"
            return np.lib.format.open_memmap(path, "w+", dtype, shape)

        self.features = memory_map("ims", np.float32, shape)
        self.num_boxes = memory_map("num_boxes", np.int64, shape[:1])
        files = [(folder / f"{split}_{name}.txt").open("wb") for name in ("caps", "query_ids")]
        self.captions, self.query_ids = map(stack.enter_context, files)
        self.count = 0

    def add(self, header: dict, body: bytes) -> None:
        row = np.frombuffer(body, dtype=np.float32)
        self.features[self.count] = row.reshape(self.features.shape[1:])
        self.num_boxes[self.count] = header["num_boxes"]
        self.captions.write(header["caption"].encode() + b"\n")
        self.query_ids.write(f"{header['query_id']}\n".encode())
        self.count += 1
