"""Files of boxes with features for second stages, one for each data set and source, and the choice
of the boxes that a second stage sees for a query.

A source says where boxes come from: "gt" (the annotations), "detector", or the name of a VL-NMS.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vlnms_d2.evaluation.matching import Match, MatchTable
from vlnms_d2.file_io import atomic_write, shown

VERSION = 1
GROUND_TRUTH, DETECTOR = "gt", "detector"


@dataclass
class ImageRegions:
    """The boxes of one image from one source.

    Attributes:
        image_id: id of the image in its data set.
        size: (height, width) of the image file in pixels.
        boxes: float32 [N, 4], xyxy in pixels of the image file.
        classes: int64 [N].
        scores: float32 [N], class confidence; 1 for annotations.
        features: float16 [N, D].
        ids: int64 [N], the annotation ids of "gt"; otherwise None.
        sent_ids: int64 [Q], the ids of the queries of a VL-NMS; otherwise None.
        kept: int64 [Q, K], indices of the boxes that a VL-NMS keeps for each query, in descending
            order of the fused score, padded with -1; otherwise None.
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
    """The file in a folder with the boxes of a data set from a source."""
    return Path(folder) / dataset_name / f"{source}.pt"


def save_regions(path: Path, images: Sequence[ImageRegions]) -> None:
    """Write the file atomically; creates its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        torch.save({"version": VERSION, "images": [vars(one) for one in images]}, file)


def load_regions(path: Path) -> dict[int, ImageRegions]:
    """Read a file of `save_regions`, by image id.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not such a file, or has another version.
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
        raise ValueError(f"{path} has version {shown(version)}, expected {VERSION}; {advice}")
    names = {field.name for field in fields(ImageRegions)}
    for one in images:
        if set(one) != names:
            raise ValueError(
                f"{path}: an image has the fields {sorted(one)}, expected {sorted(names)}; {advice}"
            )
    return {one["image_id"]: ImageRegions(**one) for one in images}


def real_threshold(
    images: Mapping[int, ImageRegions], dataset_dicts: Sequence[dict], mean_proposals: float
) -> float:
    """The score threshold that keeps `mean_proposals` boxes per expression of a data set.

    Args:
        images: of the detector or of a VL-NMS.
        dataset_dicts: of the data set.
        mean_proposals: mean number of boxes over the expressions.

    Raises:
        ValueError: there are fewer stored boxes.
    """
    no_matches = np.zeros(0, dtype=np.int32)
    matches = [
        Match(scores.numpy(), None, no_matches)
        for one in dataset_dicts
        for scores in _ranked_scores(images[one["image_id"]], len(one["expressions"]))
    ]
    stored = sum(len(match.scores) for match in matches) / len(matches)
    if stored < mean_proposals:
        raise ValueError(
            f"{stored:.2f} boxes per expression are stored, fewer than the {mean_proposals:g} of "
            "the real case; extract them with a lower --floor"
        )
    return MatchTable(matches, iou_threshold=0.5).threshold_for(mean_proposals)


def visible_boxes(regions: ImageRegions, num_queries: int, threshold: float | None) -> list[Tensor]:
    """For each query the indices, int64 [n], of the boxes of an image that a second stage sees.

    Args:
        regions: of the image. Without `kept`, all queries see the same boxes.
        num_queries: of the image.
        threshold: of the real case: selects the boxes with a score above it, and always the best
            one; None selects all.
    """
    if regions.kept is not None and len(regions.kept) != num_queries:
        raise ValueError(
            f"image {regions.image_id} has {num_queries} expressions, but proposals for "
            f"{len(regions.kept)} of them; extract the proposals of this data set again"
        )
    ranked = (
        [row[row >= 0] for row in regions.kept]
        if regions.kept is not None
        else [torch.arange(len(regions))] * num_queries
    )
    if threshold is None:
        return ranked
    scores = _ranked_scores(regions, num_queries)
    return [
        index[: max(int((row > threshold).sum()), 1)]
        for index, row in zip(ranked, scores, strict=True)
    ]


def _ranked_scores(regions: ImageRegions, num_queries: int) -> list[Tensor]:
    if regions.kept is None:
        return [regions.scores] * num_queries
    return [row[index >= 0] for row, index in zip(regions.kept_scores, regions.kept, strict=True)]
