"""All that is known of the proposals, a line of JSON a query."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

from ..file_io import atomic_write
from .base import ProposalFormat, QueryProposals, json_line, shortest


class JsonLines(ProposalFormat):
    """A line has `image_id`, `query_id`, `query` and `proposals`, by falling score: `box` (xyxy in
    pixels), `class` (a name), `category_id`, `s`, `c`, `r`. Queries without proposals have an
    empty list.
    """

    name = "jsonl"
    output = "proposals.jsonl"

    def write(self, proposals: Sequence[QueryProposals], shard: BinaryIO) -> None:
        for own in proposals:
            columns = zip(
                own.boxes.tolist(),
                own.category_names,
                own.category_ids.tolist(),
                shortest(own.scores),
                own.cls_scores.tolist(),
                shortest(own.relatedness),
                strict=True,
            )
            found = [
                {
                    "box": [x, y, x + width, y + height],
                    "class": name,
                    "category_id": category_id,
                    "s": s,
                    "c": c,
                    "r": r,
                }
                for (x, y, width, height), name, category_id, s, c, r in columns
            ]
            line = {"image_id": own.image_id, "query_id": own.query_id, "query": own.query}
            shard.write(json_line(line | {"proposals": found}))

    def merge(self, shards: Iterable[Path], path: Path) -> None:
        with atomic_write(path) as file:
            for shard in shards:
                with shard.open("rb") as source:
                    shutil.copyfileobj(source, file)
