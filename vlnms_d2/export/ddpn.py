"""Boxes with features per query and per image, as DDPN reads them (SPEC section 10)."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .base import ProposalFormat, QueryProposals, union
from .records import npz_bytes, read_records, write_record


class DDPN(ProposalFormat):
    """Folders `queries`, with `<query id>.npz` for each query, and `images`, with
    `<image id><suffix of the image file>.npz` for each image: what any of its queries keeps,
    without repeats, by falling confidence.

    A file has `x`, float32 [boxes, D], the features; `bbox`, float32 [boxes, 4], xyxy in pixels;
    `num_bbox`, `image_h` and `image_w`, int64.
    """

    name = "ddpn"
    output = "ddpn"

    def write(self, proposals: Sequence[QueryProposals], shard: BinaryIO) -> None:
        for own in proposals:
            if "/" in str(own.query_id):
                raise ValueError(
                    f"query id {own.query_id!r} of image {own.image_id} has a '/', but ddpn names "
                    "files by it. Number the queries anew."
                )
            content = _content(own, own.features, own.corners)
            write_record(shard, {"name": f"queries/{own.query_id}.npz"}, content)
        if proposals:
            own, chosen = proposals[0], union(proposals)
            content = _content(
                own,
                _rows([of.features[place] for of, place in chosen], own.features),
                _rows([of.corners[place] for of, place in chosen], own.corners),
            )
            name = f"images/{own.image_id}{own.image_suffix}.npz"
            write_record(shard, {"name": name}, content)

    def merge(self, shards: Iterable[Path], path: Path) -> None:
        if path.is_dir():
            shutil.rmtree(path)
        for folder in ("queries", "images"):
            (path / folder).mkdir(parents=True)
        for header, body in read_records(shards):
            (path / header["name"]).write_bytes(body)


def _content(own: QueryProposals, features: np.ndarray, corners: np.ndarray) -> bytes:
    height, width = own.image_size
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
