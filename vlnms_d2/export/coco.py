"""COCO's results format, with the query of each proposal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .base import ListFormat, QueryProposals, shortest


class CocoResults(ListFormat):
    """A list of `image_id`, `category_id`, `bbox` [x, y, width, height] in pixels, `score` (s) and
    `sent_id` (the query's id), as any reader of COCO's results takes them.
    """

    name = "coco"
    output = "results.json"

    def entries(self, proposals: Sequence[QueryProposals]) -> Iterator[dict[str, Any]]:
        for own in proposals:
            for category_id, box, score in zip(
                own.category_ids.tolist(), own.boxes.tolist(), shortest(own.scores), strict=True
            ):
                yield {
                    "image_id": own.image_id,
                    "category_id": category_id,
                    "bbox": box,
                    "score": score,
                    "sent_id": own.query_id,
                }
