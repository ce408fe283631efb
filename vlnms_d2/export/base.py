"""What every format implements: images are written to shards, in any order and by several
processes, and the shards are merged when all are complete."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torchvision.ops import batched_nms

from ..file_io import atomic_write

NEAR_COPY_IOU = 0.9
"""Boxes of a class that overlap more are copies of one object; see `union`."""
_COLUMNS = (
    *("boxes", "corners", "category_ids", "category_names", "scores", "cls_scores"),
    *("relatedness", "candidate_index", "features"),
)


@dataclass(frozen=True)
class QueryProposals:
    """The K proposals of a query, in descending order of the fused score.

    Attributes:
        image_id, query_id, query: which query; `query_id` is an integer or a string.
        ref_id, split: from REFER; None elsewhere.
        boxes: float32 or float64 [K, 4], [x, y, width, height] in pixels.
        corners: the same boxes as [x1, y1, x2, y2]. Both are stored because converting one into
            the other rounds.
        category_ids: int64 [K].
        category_names: K names.
        scores: float32 [K], fused score s.
        cls_scores: float32 or float64 [K], class confidence c.
        relatedness: float32 [K], r.
        candidate_index: int64 [K], index into the detections of the image.
        image_size: (height, width) in pixels; None if no format needs it.
        image_name: name of the image file, without its folder.
        features: float32 [K, D], box features for `FEATURE_FORMATS`; else None.
        masks: K masks of the size of the image in COCO's compressed RLE ({"size", "counts"}), or
            None.
    """

    image_id: int
    query_id: int | str
    query: str
    ref_id: int | None
    split: str | None
    boxes: np.ndarray
    corners: np.ndarray
    category_ids: np.ndarray
    category_names: Sequence[str]
    scores: np.ndarray
    cls_scores: np.ndarray
    relatedness: np.ndarray
    candidate_index: np.ndarray
    image_size: tuple[int, int] | None = None
    image_name: str = ""
    features: np.ndarray | None = None
    masks: Sequence[dict[str, Any]] | None = None

    def __len__(self) -> int:
        return len(self.scores)


def union(proposals: Sequence[QueryProposals], near_copies: bool = True) -> QueryProposals:
    """Everything that any query of an image keeps, without duplicates.

    A candidate that several queries keep is a duplicate if its box is the same; box refinement
    gives each query its own box.

    Args:
        proposals: of all queries of the image, at least one.
        near_copies: keep boxes whose IoU with a better one of the same class is above
            `NEAR_COPY_IOU`. Readers that compare boxes of a class would find copies of one object.

    Returns:
        In descending order of the confidence c, then by candidate, then in descending order of the
        score s. Without masks; ids and query are those of the first query.
    """
    columns = {}
    for name in _COLUMNS:
        if getattr(proposals[0], name) is not None:
            columns[name] = np.concatenate([getattr(query, name) for query in proposals])
    scores, candidates = columns["scores"], columns["candidate_index"]
    order = np.lexsort((-scores, candidates, -columns["cls_scores"]))
    corners = columns["corners"][order].astype(np.float64)
    keys = np.column_stack([candidates[order], corners])
    keep = np.sort(np.unique(keys, axis=0, return_index=True)[1])
    if not near_copies:
        classes = torch.from_numpy(columns["category_ids"][order[keep]])
        ranks = -torch.arange(len(keep), dtype=torch.float64)
        boxes = torch.from_numpy(corners[keep])
        keep = keep[batched_nms(boxes, ranks, classes, NEAR_COPY_IOU).numpy()]
    kept = {name: column[order[keep]] for name, column in columns.items()}
    return replace(proposals[0], masks=None, **kept)


class ProposalFormat(ABC):
    """A format.

    Attributes:
        name: on the command line.
        output: name of the file or folder that it makes.
    """

    name: str
    output: str

    def check(self, images: Sequence[Mapping[str, Any]]) -> None:  # noqa: B027
        """Raise ValueError if the format cannot hold a data set: its images have "expressions", as
        in Detectron2's catalog. Called before the model runs."""

    @abstractmethod
    def write(self, proposals: Sequence[QueryProposals], shard: BinaryIO) -> None:
        """Append the proposals of all queries of an image to a shard, open for writing bytes.
        Everything of an image is in one shard."""

    @abstractmethod
    def merge(self, shards: Iterable[Path], path: Path) -> None:
        """Make the final file or folder from all shards, in their order, in bounded memory. It
        replaces what is at the path."""


class ListFormat(ProposalFormat):
    """A format that is a single JSON list. A shard has one entry per line.

    Attributes:
        brackets: of the list.
        numbered: keys that number the entries of the whole list from 0.
    """

    brackets = b"[]"
    numbered: tuple[str, ...] = ()

    @abstractmethod
    def entries(self, proposals: Sequence[QueryProposals]) -> Iterator[dict[str, Any]]:
        """The entries of an image, without their numbers."""

    def write(self, proposals: Sequence[QueryProposals], shard: BinaryIO) -> None:
        for entry in self.entries(proposals):
            shard.write(json_line(entry))

    def merge(self, shards: Iterable[Path], path: Path) -> None:
        with atomic_write(path) as file:
            file.write(self.brackets[:1])
            for number, line in enumerate(_lines(shards)):
                file.write(b",\n" if number else b"\n")
                numbers = "".join(f'"{key}": {number}, ' for key in self.numbered)
                # Every line is an object that is not empty.
                file.write(line[:1] + numbers.encode() + line[1:])
            file.write(b"\n" + self.brackets[1:] + b"\n")


def concatenate(shards: Iterable[Path], path: Path) -> None:
    """Make a file of the bytes of all shards."""
    with atomic_write(path) as file:
        for shard in shards:
            with shard.open("rb") as source:
                shutil.copyfileobj(source, file)


def json_line(entry: dict[str, Any]) -> bytes:
    """An object as one line of JSON that keeps the order of the keys."""
    return json.dumps(entry).encode() + b"\n"


def decimals(values: np.ndarray) -> list[Any]:
    """An array as nested lists of numbers for JSON: float64 as it is, float32 as the shortest
    decimal numbers that round to the same float32."""
    if values.dtype == np.float64:
        return values.tolist()
    shortest = [float(str(value)) for value in values.astype(np.float32).ravel()]
    return np.reshape(shortest, values.shape).tolist()


def _lines(shards: Iterable[Path]) -> Iterator[bytes]:
    for shard in shards:
        with shard.open("rb") as file:
            for line in file:
                yield line.rstrip(b"\n")


def write_record(shard: BinaryIO, header: Mapping[str, Any], body: bytes) -> None:
    """Append a record to a shard: a line of JSON, then the bytes."""
    shard.write(json.dumps({**header, "size": len(body)}).encode() + b"\n")
    shard.write(body)


def read_records(
    shards: Iterable[Path], with_body: bool = True
) -> Iterator[tuple[dict[str, Any], bytes]]:
    """The records of all shards, in their order: header and bytes (empty without `with_body`)."""
    for shard in shards:
        with shard.open("rb") as file:
            while line := file.readline():
                header = json.loads(line)
                if with_body:
                    yield header, file.read(header["size"])
                else:
                    file.seek(header["size"], io.SEEK_CUR)
                    yield header, b""


def npz_bytes(arrays: Mapping[str, np.ndarray | np.generic]) -> bytes:
    """An `.npz` file whose bytes depend on the arrays alone."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            # A ZipInfo without a date has 1980-01-01; `np.savez` stores the current time.
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)
    return buffer.getvalue()
