"""Masks of many queries: each distinct box has one, pasted into the image when it is asked for.

Stock Detectron2 pastes a mask of the image's size per instance. The queries of one image share
their boxes: of 1,000 queries with 100 proposals each, pasted masks would be 30 GB at 640x480.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import numpy as np
import torch
from detectron2.structures import Boxes, ROIMasks
from torch import Tensor


class SharedRoiMasks(ROIMasks):
    """Masks within their boxes; `detector_postprocess` makes `SharedMasks` of them.

    Args:
        tensor: float [D, M, M], of the distinct boxes.
        index: int64 [n], which of them each instance has.
    """

    def __init__(self, tensor: Tensor, index: Tensor):
        super().__init__(tensor)
        self.index = index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item) -> SharedRoiMasks:
        return SharedRoiMasks(self.tensor, self.index[item])

    def to(self, device: torch.device) -> SharedRoiMasks:
        """The masks on `device`."""
        return SharedRoiMasks(self.tensor.to(device), self.index.to(device))

    def to_bitmasks(
        self, boxes: Boxes, height: int, width: int, threshold: float = 0.5
    ) -> SimpleNamespace:
        """See `ROIMasks.to_bitmasks`; the result's `tensor` is a `SharedMasks`."""
        masks = SharedMasks(self.tensor, self.index, boxes, (height, width), threshold)
        return SimpleNamespace(tensor=masks)


class SharedMasks:
    """The masks of n instances, [n, height, width] bool, pasted on demand.

    It is used like the tensor that stock Detectron2 gives: an integer gives a mask, anything else
    that indexes a tensor gives a `SharedMasks`; iterating pastes one mask after the other.
    `tensor`, `numpy()` and `np.asarray` paste all of them, and take n * height * width bytes.

    Args:
        roi_masks: float [D, M, M], within the distinct boxes.
        index: int64 [n], which of them each instance has.
        boxes: n of them, of the instances, in pixels.
        image_size: (height, width) in pixels.
        threshold: a pixel above it belongs to the mask.
    """

    dtype = torch.bool

    def __init__(
        self,
        roi_masks: Tensor,
        index: Tensor,
        boxes: Boxes,
        image_size: tuple[int, int],
        threshold: float = 0.5,
    ):
        self.roi_masks = roi_masks
        self.index = index
        self.boxes = boxes
        self.image_size = image_size
        self.threshold = threshold

    @property
    def shape(self) -> torch.Size:
        """(n, height, width)."""
        return torch.Size((len(self), *self.image_size))

    @property
    def device(self) -> torch.device:
        """Where the masks are."""
        return self.roi_masks.device

    @property
    def tensor(self) -> Tensor:
        """All masks, pasted: bool [n, height, width]."""
        own = ROIMasks(self.roi_masks[self.index])
        return own.to_bitmasks(self.boxes, *self.image_size, self.threshold).tensor.bool()

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item) -> Tensor | SharedMasks:
        if isinstance(item, int):
            return self[[item]].tensor[0]
        return self._with(self.roi_masks, self.index[item], self.boxes[item])

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.numpy(), dtype=dtype)

    def __repr__(self) -> str:
        return f"SharedMasks({tuple(self.shape)}, {len(self.roi_masks)} distinct)"

    def numpy(self) -> np.ndarray:
        """All masks, pasted."""
        return self.tensor.numpy()

    def to(self, device: torch.device | str) -> SharedMasks:
        """The masks on `device`."""
        return self._with(*(x.to(device) for x in (self.roi_masks, self.index, self.boxes)))

    def cpu(self) -> SharedMasks:
        """The masks on the CPU."""
        return self.to("cpu")

    @staticmethod
    def cat(parts: Sequence[SharedMasks]) -> SharedMasks:
        """Masks of one image size behind each other, for `Instances.cat`."""
        starts = np.cumsum([0] + [len(part.roi_masks) for part in parts])
        index = [part.index + int(start) for part, start in zip(parts, starts, strict=False)]
        return parts[0]._with(
            torch.cat([part.roi_masks for part in parts]),
            torch.cat(index),
            Boxes.cat([part.boxes for part in parts]),
        )

    def _with(self, roi_masks: Tensor, index: Tensor, boxes: Boxes) -> SharedMasks:
        return SharedMasks(roi_masks, index, boxes, self.image_size, self.threshold)
