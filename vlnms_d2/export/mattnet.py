"""Detections per image, as MAttNet, CM-A-E and NMTree read them (SPEC section 10)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .base import ListFormat, QueryProposals


class MAttNet(ListFormat):
    """A list of `det_id`, `box` [x, y, width, height] in pixels, `image_id`, `category_id`,
    `category_name` and `score`: what any query of the image keeps, without repeats.

    The score is the detector's confidence c, which does not depend on a query; an image's entries
    fall with it.
    """

    name = "mattnet"
    output = "mattnet_dets.json"
    numbered = "det_id"

    def entries(self, proposals: Sequence[QueryProposals]) -> Iterator[dict[str, Any]]:
        union: dict[int, dict[str, Any]] = {}
        for own in proposals:
            for place, candidate in enumerate(own.candidate_index.tolist()):
                if candidate not in union:
                    union[candidate] = {
                        "box": own.boxes[place].tolist(),
                        "image_id": own.image_id,
                        "category_id": int(own.category_ids[place]),
                        "category_name": own.category_names[place],
                        "score": float(own.cls_scores[place]),
                    }
        yield from (union[i] for i in sorted(union, key=lambda i: (-union[i]["score"], i)))
