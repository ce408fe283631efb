"""Detections per expression, as the Ref-NMS forks of MAttNet and CM-A-E read them (SPEC section
10)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .base import ListFormat, QueryProposals, decimals


class PerExpression(ListFormat):
    """A list of `det_id`, `h5_id` (the same), `ref_id`, `sent_id`, `image_id`, `box`
    [x, y, width, height] in pixels, `category_id`, `category_name` and `split`. Of queries that
    are not REFER's, `ref_id` and `split` are null.
    """

    name = "per-expression"
    output = "per_expression_dets.json"
    numbered = "det_id"

    def entries(self, proposals: Sequence[QueryProposals]) -> Iterator[dict[str, Any]]:
        for own in proposals:
            for box, category_id, name in zip(
                decimals(own.boxes), own.category_ids.tolist(), own.category_names, strict=True
            ):
                yield {
                    "ref_id": own.ref_id,
                    "sent_id": own.query_id,
                    "image_id": own.image_id,
                    "box": box,
                    "category_id": category_id,
                    "category_name": name,
                    "split": own.split,
                }

    def _number(self, line: bytes, number: int) -> bytes:
        return super()._number(b'{"h5_id": %d, %s' % (number, line[1:]), number)
