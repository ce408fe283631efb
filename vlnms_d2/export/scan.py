"""Features of the boxes of (image, caption) pairs, as SCAN and IMRAM read them (SPEC section
10)."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .base import ProposalFormat, QueryProposals
from .records import read_records, write_record


class Scan(ProposalFormat):
    """A folder with, for each split:

    * `{split}_ims.npy`: float32 [pairs, boxes, D], a pair's proposals by falling score. Where it
      has fewer than `boxes`, they are repeated from the first on; all 0 where it has none;
    * `{split}_caps.txt`: the captions, a line a pair;
    * `{split}_num_boxes.npy`: int64 [pairs], how many are no repeats;
    * `{split}_query_ids.txt`: the captions' ids, a line a pair.

    The proposals depend on the caption, so each has a row of its own: as many rows as captions,
    which the readers take (they divide by 5 only where there are fewer).

    Args:
        num_boxes: of each pair; 36 and 10 are common.
    """

    name = "scan"
    output = "scan"

    def __init__(self, num_boxes: int = 36):
        self.num_boxes = num_boxes

    def write(self, proposals: Sequence[QueryProposals], shard: BinaryIO) -> None:
        for own in proposals:
            self.write_pair(shard, own.split or "all", own.query_id, own.query, own.features)

    def write_pair(
        self, shard: BinaryIO, split: str, query_id: int | str, caption: str, features: np.ndarray
    ) -> None:
        """Write one pair to a shard.

        Args:
            shard: open for bytes.
            split: first part of the names of the files.
            query_id, caption: of the pair.
            features: [K, D], of its proposals by falling score; at most `num_boxes` are taken.
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
                split: _Split(path, split, (count, self.num_boxes, dim), stack)
                for split, count in counts.items()
            }
            for header, body in read_records(shards):
                splits[header["split"]].add(header, body)


class _Split:
    """The files of a split, filled pair by pair."""

    def __init__(self, folder: Path, split: str, shape: tuple[int, int, int], stack: ExitStack):
        def memory_map(name: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
            path = folder / f"{split}_{name}.npy"
            return np.lib.format.open_memmap(path, "w+", dtype, shape)

        self.features = memory_map("ims", np.float32, shape)
        self.num_boxes = memory_map("num_boxes", np.int64, shape[:1])
        opened = [(folder / f"{split}_{name}.txt").open("wb") for name in ("caps", "query_ids")]
        self.captions, self.query_ids = map(stack.enter_context, opened)
        self.count = 0

    def add(self, header: dict, body: bytes) -> None:
        row = np.frombuffer(body, dtype=np.float32)
        self.features[self.count] = row.reshape(self.features.shape[1:])
        self.num_boxes[self.count] = header["num_boxes"]
        self.captions.write(header["caption"].encode() + b"\n")
        self.query_ids.write(f"{header['query_id']}\n".encode())
        self.count += 1
