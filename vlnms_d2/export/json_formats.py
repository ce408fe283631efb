"""Formats of JSON: every detail (jsonl), COCO results, the lists of MAttNet, CM-A-E and NMTree and
of their Ref-NMS forks, and the detections of ALBEF."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .base import (
    ListFormat,
    ProposalFormat,
    QueryProposals,
    concatenate,
    decimals,
    json_line,
    union,
)


class JsonLines(ProposalFormat):
    """A line per query with `image_id`, `query_id`, `query` and `proposals` in descending score
    order: `box` (xyxy in pixels), `class` (a name), `category_id`, `s`, `c`, `r` and, with masks,
    `mask` in compressed RLE. A query without proposals has an empty list.
    """

    name = "jsonl"
    output = "proposals.jsonl"

    def write(self, proposals: Sequence[QueryProposals], shard: BinaryIO) -> None:
        keys = ("box", "class", "category_id", "s", "c", "r")
        for query in proposals:
            columns = zip(
                decimals(query.corners),
                query.category_names,
                query.category_ids.tolist(),
                decimals(query.scores),
                decimals(query.cls_scores),
                decimals(query.relatedness),
                strict=True,
            )
            entries = [dict(zip(keys, values, strict=True)) for values in columns]
            if query.masks is not None:
                for entry, mask in zip(entries, query.masks, strict=True):
                    entry["mask"] = mask
            line = {"image_id": query.image_id, "query_id": query.query_id, "query": query.query}
            shard.write(json_line(line | {"proposals": entries}))

    def merge(self, shards: Iterable[Path], path: Path) -> None:
        concatenate(shards, path)


class CocoResults(ListFormat):
    """COCO results: `image_id`, `category_id`, `bbox` [x, y, width, height] in pixels, `score` (s)
    and, ignored by readers of COCO results, `sent_id` (the id of the query); with masks also
    `segmentation`, in compressed RLE.
    """

    name = "coco"
    output = "results.json"

    def entries(self, proposals: Sequence[QueryProposals]) -> Iterator[dict[str, Any]]:
        for query in proposals:
            scores = decimals(query.scores)
            for place, box in enumerate(decimals(query.boxes)):
                entry = {
                    "image_id": query.image_id,
                    "category_id": int(query.category_ids[place]),
                    "bbox": box,
                    "score": scores[place],
                    "sent_id": query.query_id,
                }
                if query.masks is not None:
                    entry["segmentation"] = query.masks[place]
                yield entry


class PerExpression(ListFormat):
    """Detections per expression, for the Ref-NMS forks of MAttNet and CM-A-E: `det_id`, `h5_id`
    (the same), `ref_id`, `sent_id`, `image_id`, `box` [x, y, width, height] in pixels,
    `category_id`, `category_name` and `split`. `ref_id` and `split` are null unless the queries
    are REFER's.
    """

    name = "per-expression"
    output = "per_expression_dets.json"
    numbered = ("det_id", "h5_id")

    def entries(self, proposals: Sequence[QueryProposals]) -> Iterator[dict[str, Any]]:
        for query in proposals:
            for place, box in enumerate(decimals(query.boxes)):
                yield {
                    "ref_id": query.ref_id,
                    "sent_id": query.query_id,
                    "image_id": query.image_id,
                    "box": box,
                    "category_id": int(query.category_ids[place]),
                    "category_name": query.category_names[place],
                    "split": query.split,
                }


class MAttNet(ListFormat):
    """Detections per image, for MAttNet and CM-A-E: `det_id`, `h5_id` (the same), `box` [x, y,
    width, height] in pixels, `image_id`, `category_id`, `category_name` and `score` of everything
    that any query of the image keeps, without near-copies: these readers compare a box with the
    nearest ones of its class.

    The score is the detector's confidence c, which does not depend on the query; the entries of an
    image are in descending order of it.
    """

    name = "mattnet"
    output = "mattnet_dets.json"
    numbered = ("det_id", "h5_id")

    def entries(self, proposals: Sequence[QueryProposals]) -> Iterator[dict[str, Any]]:
        if not proposals:
            return
        kept = union(proposals, near_copies=False)
        for place, box in enumerate(decimals(kept.boxes)):
            yield {
                "box": box,
                "image_id": kept.image_id,
                "category_id": int(kept.category_ids[place]),
                "category_name": kept.category_names[place],
                "score": decimals(kept.cls_scores[place]),
            }


class NMTree(MAttNet):
    """The list of `MAttNet`, under the file name that NMTree's scripts use."""

    name = "nmtree"
    output = "nmtree_dets.json"


class Albef(ListFormat):
    """`{image_id: [[x, y, width, height], ...]}`, in pixels, for the grounding evaluation of ALBEF:
    everything that any query of the image keeps, without near-copies.

    ALBEF scores the pixels from int(x) to int(x + width). Boxes without such a pixel are left out;
    if none remains, the whole image is the only box.
    """

    name = "albef"
    output = "dets.json"
    brackets = b"{}"

    def write(self, proposals: Sequence[QueryProposals], shard: BinaryIO) -> None:
        for entry in self.entries(proposals):
            shard.write(json_line(entry)[1:-2] + b"\n")

    def entries(self, proposals: Sequence[QueryProposals]) -> Iterator[dict[str, Any]]:
        if not proposals:
            return
        kept = union(proposals, near_copies=False)
        starts, ends = (np.trunc(kept.boxes[:, :2] + part) for part in (0, kept.boxes[:, 2:]))
        boxes = decimals(kept.boxes[(ends > starts).all(axis=1)])
        if not boxes and kept.image_size is not None:
            boxes = [[0, 0, kept.image_size[1], kept.image_size[0]]]
        if boxes:
            yield {str(kept.image_id): boxes}
