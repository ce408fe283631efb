"""Masks of many queries: one per distinct box, pasted into the image on demand.

Stock Detectron2 pastes a mask of the image's size per instance. The queries of one image share
their boxes: for 1,000 queries with 100 proposals each, pasted masks would take 30 GB at 640x480.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace

import numpy as np
import torch
from detectron2.structures import Boxes, Instances, ROIMasks
from torch import Tensor
from torch.utils._pytree import tree_map_only

_CHUNK = 100


def forward_in_chunks(
    forward: Callable[[list[Instances]], list[Instances]], instances: list[Instances]
) -> list[Instances]:
    """Run the mask and keypoint heads on at most 100 boxes of an image at a time.

    They pool 200 kB per box, and many queries keep many distinct boxes.

    Args:
        forward: adds masks and keypoints to the instances of each image.
        instances: per image.
    """
    most = max([1, *map(len, instances)])
    chunks = [
        forward([image[start : start + _CHUNK] for image in instances])
        for start in range(0, most, _CHUNK)
    ]
    return [Instances.cat(list(image)) for image in zip(*chunks, strict=True)]


class SharedRoiMasks(ROIMasks):
    """Masks within their boxes; `detector_postprocess` makes `SharedMasks` of them.

    Args:
        tensor: float [D, M, M], of the distinct boxes.
        index: int64 [n], the mask of each instance.
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

    It is used like the tensor of stock Detectron2: an integer index returns one mask, an index of
    several instances returns a `SharedMasks`; iterating pastes one mask at a time. Whatever else
    reads a tensor, such as its methods, operators, functions of torch and `np.asarray`, pastes all
    of them into a tensor, `tensor`, which takes n * height * width bytes.

    Args:
        roi_masks: float [D, M, M], within the distinct boxes.
        index: int64 [n], the mask of each instance.
        boxes: the n instances' boxes, in pixels.
        image_size: (height, width) in pixels.
        threshold: pixels above it belong to the mask.
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
        """The device of the masks."""
        return self.roi_masks.device

    @property
    def tensor(self) -> Tensor:
        """All masks, pasted: bool [n, height, width]."""
        masks = ROIMasks(self.roi_masks[self.index])
        return masks.to_bitmasks(self.boxes, *self.image_size, self.threshold).tensor.bool()

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item) -> Tensor | SharedMasks:
        index = None if isinstance(item, tuple) else self.index[item]
        if index is None or index.dim() > 1:
            return self.tensor[item]
        if index.dim() == 0:
            return self[[int(item)]].tensor[0]
        return self._with(self.roi_masks, index, self.boxes[item])

    def __getattr__(self, name: str):
        # torch.as_tensor uses DLPack. Methods that write, with "_" at the end, would write a copy.
        reads = name.startswith("__dlpack") or not (name.startswith("_") or name.endswith("_"))
        if not reads or not hasattr(Tensor, name):
            raise AttributeError(f"SharedMasks has no attribute {name!r}")
        measures = name in ("size", "dim", "ndim", "numel")
        return getattr(torch.empty(self.shape, device="meta") if measures else self.tensor, name)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, lambda masks: masks.tensor, (args, kwargs or {}))
        return function(*args, **kwargs)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.tensor.numpy(), dtype=dtype)

    def __repr__(self) -> str:
        return f"SharedMasks({tuple(self.shape)}, {len(self.roi_masks)} distinct)"

    def to(self, *args, **kwargs) -> Tensor | SharedMasks:
        """See `Tensor.to`: a `SharedMasks` on another device, a tensor of another dtype."""
        like = torch.empty(0, dtype=torch.bool, device=self.device).to(*args, **kwargs)
        if like.dtype != torch.bool:
            return self.tensor.to(*args, **kwargs)
        return self._with(*(x.to(like.device) for x in (self.roi_masks, self.index, self.boxes)))

    def cpu(self) -> SharedMasks:
        """The masks on the CPU."""
        return self.to("cpu")

    @staticmethod
    def cat(parts: Sequence[SharedMasks]) -> SharedMasks:
        """Concatenate masks of one image size, for `Instances.cat`."""
        starts = np.cumsum([0] + [len(part.roi_masks) for part in parts])
        index = [part.index + int(start) for part, start in zip(parts, starts, strict=False)]
        return parts[0]._with(
            torch.cat([part.roi_masks for part in parts]),
            torch.cat(index),
            Boxes.cat([part.boxes for part in parts]),
        )

    def _with(self, roi_masks: Tensor, index: Tensor, boxes: Boxes) -> SharedMasks:
        return SharedMasks(roi_masks, index, boxes, self.image_size, self.threshold)


def _operator(name: str) -> Callable:
    return lambda masks, *others: getattr(masks.tensor, name)(*others)


_OPERATORS = "and or xor invert eq ne lt le gt ge add radd sub rsub mul rmul truediv"
for _name in _OPERATORS.split():
    setattr(SharedMasks, f"__{_name}__", _operator(f"__{_name}__"))
