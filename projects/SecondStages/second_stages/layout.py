"""Where boxes are in their image and around each other, as MAttNet describes it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NUM_NEIGHBOURS = 5
PLACE_DIM, OFFSET_DIM = 5, 5


class Layout(NamedTuple):
    """The places of the boxes of B images, N each with padding.

    Attributes:
        place: float [B, N, 5], corners over the image's size, and the share of its area.
        same: float [B, N, 5, 5], offsets to the nearest boxes of the same class; 0 where there
            are fewer.
        others: int64 [B, N, 5], the nearest boxes of other classes, for the relation module.
        offsets: float [B, N, 5, 5], the offsets to them.
        is_other: bool [B, N, 5], False where there are fewer.
    """

    place: Tensor
    same: Tensor
    others: Tensor
    offsets: Tensor
    is_other: Tensor


def lay_out(boxes: Tensor, classes: Tensor, mask: Tensor, sizes: Tensor) -> Layout:
    """Describe the places of boxes (MAttNet, Sec. 3.2).

    Args:
        boxes: float [B, N, 4], xyxy in pixels.
        classes: int64 [B, N].
        mask: bool [B, N], False where there is padding.
        sizes: float [B, 2], (height, width) of the images in pixels.
    """
    height, width = sizes[:, None, 0], sizes[:, None, 1]
    x1, y1, x2, y2 = boxes.unbind(-1)
    w, h = (x2 - x1).clamp(min=1), (y2 - y1).clamp(min=1)
    share = w * h / (width * height)
    place = torch.stack([x1 / width, y1 / height, x2 / width, y2 / height, share], dim=-1)

    offsets = _offsets(boxes, torch.stack([w, h], dim=-1))
    centres = (boxes[..., :2] + boxes[..., 2:]) / 2
    distance = torch.cdist(centres, centres)
    itself = torch.eye(boxes.shape[1], dtype=torch.bool, device=boxes.device)
    eligible = mask[:, :, None] & mask[:, None, :] & ~itself
    same_class = classes[:, :, None] == classes[:, None, :]
    nearest_same, is_same = _nearest(distance, eligible & same_class)
    others, is_other = _nearest(distance, eligible & ~same_class)
    return Layout(
        place,
        _take(offsets, nearest_same) * is_same[..., None],
        others,
        _take(offsets, others) * is_other[..., None],
        is_other,
    )


def _offsets(boxes: Tensor, extents: Tensor) -> Tensor:
    """Offsets [B, N, N, 5] from each box (first) to each other one, in units of the first: of the
    corners, and the ratio of the areas."""
    differences = boxes[:, None, :, :] - boxes[:, :, None, :]
    corners = differences / extents.repeat(1, 1, 2)[:, :, None, :]
    area = extents.prod(-1)
    ratio = area[:, None, :] / area[:, :, None]
    # A tiny box would make the numbers of its neighbours huge.
    return torch.cat([corners, ratio[..., None]], dim=-1).clamp(-20, 20)


def _nearest(distance: Tensor, eligible: Tensor) -> tuple[Tensor, Tensor]:
    """The indices [B, N, 5] of the nearest eligible boxes, and whether there are so many."""
    distance = distance.masked_fill(~eligible, float("inf"))
    count = min(NUM_NEIGHBOURS, distance.shape[-1])
    found = distance.sort(dim=-1, stable=True)
    index, real = found.indices[..., :count], found.values[..., :count].isfinite()
    missing = NUM_NEIGHBOURS - count
    return (
        torch.nn.functional.pad(index, (0, missing)),
        torch.nn.functional.pad(real, (0, missing), value=False),
    )


def _take(offsets: Tensor, index: Tensor) -> Tensor:
    return offsets.gather(2, index[..., None].expand(-1, -1, -1, offsets.shape[-1]))
