"""Which of the stored boxes a second stage sees for each query, at the real operating point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from vlnms_d2.evaluation.matching import Match, MatchTable

from .store import ImageRegions


def real_threshold(
    images: Mapping[int, ImageRegions], dataset_dicts: Sequence[dict], mean_proposals: float
) -> float:
    """The threshold that leaves so many boxes per expression, on the data set where it is chosen.

    Args:
        images: of the detector or of a VL-NMS.
        dataset_dicts: of the data set.
        mean_proposals: wanted, on the mean of the expressions.

    Raises:
        ValueError: the stored boxes are too few to choose among.
    """
    nothing = np.zeros(0, dtype=np.int32)
    matches = [
        Match(scores.numpy(), None, nothing)
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


def seen_boxes(regions: ImageRegions, num_queries: int, threshold: float | None) -> list[Tensor]:
    """Per query the indices, int64 [n], of the boxes of an image that a second stage sees.

    Args:
        regions: of the image. Of the detector, every query sees the same boxes.
        num_queries: of the image.
        threshold: of the real case: boxes with a score above it, and always the best one; None for
            all.
    """
    if regions.kept is not None and len(regions.kept) != num_queries:
        raise ValueError(
            f"image {regions.image_id} has {num_queries} expressions, but proposals for "
            f"{len(regions.kept)} of them; extract the proposals of this data set anew"
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
        index[: max(int((own > threshold).sum()), 1)]
        for index, own in zip(ranked, scores, strict=True)
    ]


def _ranked_scores(regions: ImageRegions, num_queries: int) -> list[Tensor]:
    if regions.kept is None:
        return [regions.scores] * num_queries
    return [own[index >= 0] for own, index in zip(regions.kept_scores, regions.kept, strict=True)]
