"""Detections per image, as MAttNet, CM-A-E and NMTree read them (SPEC section 10)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .base import ListFormat, QueryProposals, decimals, union


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
        for own, place in union(proposals):
            yield {
                "box": decimals(own.boxes[place]),
                "image_id": own.image_id,
                "category_id": int(own.category_ids[place]),
                "category_name": own.category_names[place],
                "score": decimals(own.cls_scores[place]),
            }


class NMTree(MAttNet):
    """The same list under the name that NMTree's own scripts make it by."""

    name = "nmtree"
    output = "nmtree_dets.json"
