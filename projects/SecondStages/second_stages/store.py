"""Files of boxes with the features that second stages read, one for each data set and source.

A source is where boxes come from: "gt" (the annotations), "detector", or the name of a VL-NMS.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from vlnms_d2.file_io import atomic_write

VERSION = 1
GROUND_TRUTH, DETECTOR = "gt", "detector"


@dataclass
class ImageRegions:
    """The boxes of one image from one source.

    Attributes:
        image_id: of the data set.
        size: (height, width) of the image file in pixels.
        boxes: float32 [N, 4], xyxy in pixels of the image file.
        classes: int64 [N].
        scores: float32 [N], class confidence; 1 for annotations.
        features: float16 [N, D].
        ids: int64 [N], of "gt" the annotation ids; else None.
        sent_ids: int64 [Q], of a VL-NMS the queries that were asked; else None.
        kept: int64 [Q, K], of a VL-NMS which boxes each query keeps, by falling fused score,
            padded with -1; else None.
        kept_scores: float32 [Q, K], their fused scores; 0 where there is padding.
    """

    image_id: int
    size: tuple[int, int]
    boxes: Tensor
    classes: Tensor
    scores: Tensor
    features: Tensor
    ids: Tensor | None = None
    sent_ids: Tensor | None = None
    kept: Tensor | None = None
    kept_scores: Tensor | None = None

    def __len__(self) -> int:
        return len(self.classes)


def regions_file(folder: str | Path, dataset_name: str, source: str) -> Path:
    """Where in a folder the boxes of a data set from a source are."""
    return Path(folder) / dataset_name / f"{source}.pt"


def save_regions(path: Path, images: Sequence[ImageRegions]) -> None:
    """Write the file, whole or not at all; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        torch.save({"version": VERSION, "images": [vars(one) for one in images]}, file)


def load_regions(path: Path) -> dict[int, ImageRegions]:
    """Read what `save_regions` wrote, by image id.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no such file, or of another version.
    """
    advice = "make it with tools/extract_second_stage.py"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {advice}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        version, images = content["version"], content["images"]
    except (RuntimeError, OSError, EOFError, pickle.PickleError, LookupError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as a file of boxes ({error}); {advice}") from error
    if version != VERSION:
        raise ValueError(f"{path} has version {version!r}, expected {VERSION}; {advice}")
    names = {field.name for field in fields(ImageRegions)}
    for one in images:
        if set(one) != names:
            raise ValueError(
                f"{path}: an image has the fields {sorted(one)}, expected {sorted(names)}; {advice}"
            )
    return {one["image_id"]: ImageRegions(**one) for one in images}
