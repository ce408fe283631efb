"""What a format of a second stage does: shards of it are written, in any order and by several
processes, and merged when all are there."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..file_io import atomic_write


@dataclass(frozen=True)
class QueryProposals:
    """The K proposals of a query, by falling fused score.

    Attributes:
        image_id, query_id, query: which query; `query_id` an integer or a string.
        ref_id, split: of REFER; None elsewhere.
        boxes: float32 or float64 [K, 4], [x, y, width, height] in pixels.
        corners: of the same, [x1, y1, x2, y2]: neither can be had of the other without rounding.
        category_ids: int64 [K].
        category_names: K names.
        scores: float32 [K], s.
        cls_scores: float32 or float64 [K], c.
        relatedness: float32 [K], r.
        candidate_index: int64 [K], position among the detections of the image.
        image_size: (height, width) in pixels; None where no format asked for it.
        image_suffix: of the image's file, as ".jpg".
        features: float32 [K, D] of the boxes, for `FEATURE_FORMATS`; else None.
        masks: K masks of the image's size, in COCO's compressed RLE ({"size", "counts"}); or None.
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
    image_suffix: str = ""
    features: np.ndarray | None = None
    masks: Sequence[dict[str, Any]] | None = None

    def __len__(self) -> int:
        return len(self.scores)


def union(proposals: Sequence[QueryProposals]) -> list[tuple[QueryProposals, int]]:
    """What any query of an image keeps, without repeats.

    The same candidate twice is a repeat where its box is the same; box refinement gives each query
    a box of its own.

    Returns:
        Per proposal whose it is and its place there; by falling confidence c, then by candidate.
    """
    found: dict[tuple[int, bytes], tuple[QueryProposals, int]] = {}
    for own in proposals:
        for place, candidate in enumerate(own.candidate_index.tolist()):
            found.setdefault((candidate, own.corners[place].tobytes()), (own, place))
    return sorted(
        found.values(),
        key=lambda one: (-one[0].cls_scores[one[1]], one[0].candidate_index[one[1]]),
    )


class ProposalFormat(ABC):
    """A format.

    Attributes:
        name: of the format, for the command line.
        output: name of the file or folder that it makes.
    """

    name: str
    output: str

    @abstractmethod
    def write(self, proposals: Sequence[QueryProposals], shard: BinaryIO) -> None:
        """Write one image to a shard.

        Args:
            proposals: of all queries of the image.
            shard: open for bytes; of an image all is in one shard.
        """

    @abstractmethod
    def merge(self, shards: Iterable[Path], path: Path) -> None:
        """Make the final file or folder of all shards, in their order, in bounded memory.

        Args:
            shards: as `write` filled them.
            path: where to; replaced if it is there.
        """


class ListFormat(ProposalFormat):
    """A format that is one JSON list. A shard has an entry a line.

    Attributes:
        numbered: key that numbers the entries of the whole list from 0, put first; None for none.
    """

    numbered: str | None = None

    @abstractmethod
    def entries(self, proposals: Sequence[QueryProposals]) -> Iterator[dict[str, Any]]:
        """The entries of an image, without their numbers."""

    def write(self, proposals: Sequence[QueryProposals], shard: BinaryIO) -> None:
        for entry in self.entries(proposals):
            shard.write(json_line(entry))

    def merge(self, shards: Iterable[Path], path: Path) -> None:
        with atomic_write(path) as file:
            file.write(b"[")
            for number, line in enumerate(_lines(shards)):
                file.write(b",\n" if number else b"\n")
                if self.numbered is not None:
                    line = self._number(line, number)
                file.write(line)
            file.write(b"\n]\n")

    def _number(self, line: bytes, number: int) -> bytes:
        # Every line is an object that is not empty.
        return b'{"%s": %d, %s' % (self.numbered.encode(), number, line[1:])


def json_line(entry: dict[str, Any]) -> bytes:
    """An object as one line of JSON, with its keys in their order."""
    return json.dumps(entry).encode() + b"\n"


def decimals(values: np.ndarray) -> list[Any]:
    """An array as lists of numbers for JSON: float64 as they are, float32 as the shortest decimal
    numbers that read back as the same float32."""
    if values.dtype == np.float64:
        return values.tolist()
    shortest = [float(str(value)) for value in values.astype(np.float32).ravel()]
    return np.reshape(shortest, values.shape).tolist()


def _lines(shards: Iterable[Path]) -> Iterator[bytes]:
    for shard in shards:
        with shard.open("rb") as file:
            for line in file:
                yield line.rstrip(b"\n")
