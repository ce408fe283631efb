"""COCO's results format, with the query of each proposal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .base import ListFormat, QueryProposals, decimals


class CocoResults(ListFormat):
    """A list of `image_id`, `category_id`, `bbox` [x, y, width, height] in pixels, `score` (s) and
    `sent_id` (the query's id), as any reader of COCO's results takes them; with masks also
    `segmentation`, in compressed RLE.
    """

    name = "coco"
    output = "results.json"

    def entries(self, proposals: Sequence[QueryProposals]) -> Iterator[dict[str, Any]]:
        for own in proposals:
            columns = zip(
                own.category_ids.tolist(), decimals(own.boxes), decimals(own.scores), strict=True
            )
            for place, (category_id, box, score) in enumerate(columns):
                entry = {
                    "image_id": own.image_id,
                    "category_id": category_id,
                    "bbox": box,
                    "score": score,
                    "sent_id": own.query_id,
                }
                if own.masks is not None:
                    entry["segmentation"] = own.masks[place]
                yield entry
