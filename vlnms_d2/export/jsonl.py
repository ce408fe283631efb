"""All that is known of the proposals, a line of JSON a query."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

from ..file_io import atomic_write
from .base import ProposalFormat, QueryProposals, decimals, json_line


class JsonLines(ProposalFormat):
    """A line has `image_id`, `query_id`, `query` and `proposals`, by falling score: `box` (xyxy in
    pixels), `class` (a name), `category_id`, `s`, `c`, `r` and, where there are masks, `mask` in
    compressed RLE. Queries without proposals have an empty list.
    """

    name = "jsonl"
    output = "proposals.jsonl"

    def write(self, proposals: Sequence[QueryProposals], shard: BinaryIO) -> None:
        for own in proposals:
            columns = zip(
                decimals(own.corners),
                own.category_names,
                own.category_ids.tolist(),
                decimals(own.scores),
                decimals(own.cls_scores),
                decimals(own.relatedness),
                strict=True,
            )
            keys = ("box", "class", "category_id", "s", "c", "r")
            found = [dict(zip(keys, values, strict=True)) for values in columns]
            if own.masks is not None:
                for entry, mask in zip(found, own.masks, strict=True):
                    entry["mask"] = mask
            line = {"image_id": own.image_id, "query_id": own.query_id, "query": own.query}
            shard.write(json_line(line | {"proposals": found}))

    def merge(self, shards: Iterable[Path], path: Path) -> None:
        with atomic_write(path) as file:
            for shard in shards:
                with shard.open("rb") as source:
                    shutil.copyfileobj(source, file)
