"""Read the proposals of all (image, caption) pairs that `tools/export_pairs.py` writes: the
candidates of each image once, and for each pair the indices of those that it keeps."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

PADDING = np.iinfo(np.uint16).max
"""In the index, after the last proposal of a pair."""

INDEX, SCORES, POOLS = "index.npy", "scores.npy", "pools"
IMAGES, CAPTIONS = "images.json", "captions.json"


class Pool(NamedTuple):
    """The N candidates of an image, or those that a pair keeps.

    Attributes:
        boxes: float32 [N, 4], xyxy in pixels of the image, before box refinement.
        scores: float32 [N], class confidence c.
        classes: int64 [N].
        features: float16 or float32 [N, D].
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    features: np.ndarray

    def take(self, index: np.ndarray | slice) -> Pool:
        """The candidates at `index`."""
        return Pool(*(column[index] for column in self))


@dataclass(frozen=True)
class PairImage:
    """An image of the store.

    Attributes:
        image_id, file_name: as in the data set; the name without its folder.
        height, width: in pixels.
    """

    image_id: int
    file_name: str
    height: int
    width: int


@dataclass(frozen=True)
class PairCaption:
    """A caption of the store.

    Attributes:
        caption_id: an integer or a string.
        caption: the text.
        image_id: of the image that it was written for.
        split: of the data set, or None.
    """

    caption_id: int | str
    caption: str
    image_id: int
    split: str | None


class PairStore:
    """The output of `tools/export_pairs.py`, memory-mapped::

        store = PairStore("pairs")
        store.index[0, 7]                       # uint16 [N], padded with PairStore.PADDING
        store.proposals(image=0, caption=7)     # their boxes, confidences, classes, features

    Args:
        folder: of the finished export.

    Attributes:
        images, captions: I images and C captions, in the order of the arrays.
        index: uint16 [I, C, N], for each pair the indices of its proposals in the image's pool, in
            descending order of the fused score s, padded with `PADDING`.
        scores: float16 [I, C, N], s of the proposals; None if they were not exported.

    Raises:
        FileNotFoundError: there is no finished export in the folder.
    """

    PADDING = PADDING

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        if not (folder / "manifest.json").is_file() or not (folder / INDEX).is_file():
            raise FileNotFoundError(
                f"{folder}: no finished export of pairs (manifest.json and {INDEX}). Make it with "
                "tools/export_pairs.py, which resumes after interruption."
            )
        self.images = [PairImage(**each) for each in json.loads((folder / IMAGES).read_bytes())]
        self.captions = [
            PairCaption(**each) for each in json.loads((folder / CAPTIONS).read_bytes())
        ]
        self.index = np.load(folder / INDEX, mmap_mode="r")
        self.scores = None
        if (folder / SCORES).is_file():
            self.scores = np.load(folder / SCORES, mmap_mode="r")
        self._starts = np.load(folder / POOLS / "starts.npy")
        self._columns = Pool(
            *(np.load(folder / POOLS / f"{name}.npy", mmap_mode="r") for name in Pool._fields)
        )
        self._image_number = {image.image_id: i for i, image in enumerate(self.images)}
        self._caption_number = {caption.caption_id: i for i, caption in enumerate(self.captions)}

    def image_number(self, image_id: int) -> int:
        """The index of an image in the store; raises KeyError if it is not there."""
        return self._image_number[image_id]

    def caption_number(self, caption_id: int | str) -> int:
        """The index of a caption in the store; raises KeyError if it is not there."""
        return self._caption_number[caption_id]

    def pool(self, image: int) -> Pool:
        """The candidates of an image, by its index."""
        return self._columns.take(slice(*self._starts[image : image + 2]))

    def proposals(self, image: int, caption: int) -> Pool:
        """The proposals of a pair, by its indices, in descending order of s."""
        chosen = self.index[image, caption]
        return self.pool(image).take(chosen[chosen != PADDING].astype(np.int64))
