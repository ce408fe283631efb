"""Recall of the objects that captions mention, without training: the detector alone, Category, and
an oracle that knows the mentioned categories."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlnms_d2.evaluation.matching import Match, MatchTable, match_proposals
from vlnms_d2.file_io import atomic_write
from vlnms_d2.rerank import rerank

from .annotations import Mentioned

METHODS = {"detector": "detector alone", "category": "Category", "oracle": "word oracle"}
UNMENTIONED_RELATEDNESS = 0.05
"""r of the oracle for categories that are not mentioned; 1 for the others."""
IOU_THRESHOLD = 0.5
NUM_PROPOSALS = 100  # per caption; the rest is ignored
TOPS = (5, 10)  # numbers of proposals at which recall is given
MEANS = (3.0, 8.0)  # mean numbers of proposals per caption, by a score threshold


def oracle_relatedness(mentioned: Sequence[Mentioned], classes: np.ndarray) -> np.ndarray:
    """Relatedness of N boxes to Q queries, float32 [Q, N], by whether their classes, int64 [N],
    are mentioned."""
    named = np.zeros((len(mentioned), len(classes)), dtype=bool)
    for row, objects in zip(named, mentioned, strict=True):
        row[:] = np.isin(classes, objects.classes)
    return np.where(named, 1.0, UNMENTIONED_RELATEDNESS).astype(np.float32)


def match_mentions(
    boxes: np.ndarray,
    scores: np.ndarray,
    classes: np.ndarray,
    category_names: Sequence[str],
    related: np.ndarray,
    mentioned: Sequence[Mentioned],
    nms_thresh: float,
) -> dict[str, list[Match]]:
    """Match the proposals of each method with the mentioned boxes of the queries of an image.

    Args:
        boxes: float [N, 4], xyxy in pixels.
        scores: float [N].
        classes: int64 [N].
        category_names: of the classes.
        related: float32 [Q, N], r of Category.
        mentioned: by each of the Q queries, at least one object.
        nms_thresh: IoU of the class-wise NMS.

    Returns:
        Of each of `METHODS` a match per query.
    """
    relatedness = {
        "detector": np.ones_like(related),
        "category": related,
        "oracle": oracle_relatedness(mentioned, classes),
    }
    return {
        method: match_related(boxes, scores, classes, category_names, r, mentioned, nms_thresh)
        for method, r in relatedness.items()
    }


def match_related(
    boxes: np.ndarray,
    scores: np.ndarray,
    classes: np.ndarray,
    category_names: Sequence[str],
    related: np.ndarray,
    mentioned: Sequence[Mentioned],
    nms_thresh: float,
) -> list[Match]:
    """`match_mentions` for one method, whose relatedness is `related`: a match per query."""
    queries, n = [""] * len(mentioned), NUM_PROPOSALS
    detections = (boxes, scores, classes, category_names)
    per_query = rerank(*detections, queries, n, nms_thresh=nms_thresh, relatedness=related)
    return [
        match_proposals(kept, [[None, *objects.boxes.tolist()]], IOU_THRESHOLD, NUM_PROPOSALS)[0]
        for kept, objects in zip(per_query, mentioned, strict=True)
    ]


def save_matches(path: Path, matches: dict[str, list[Match]]) -> None:
    """Write the result of `match_mentions`, for one image or several; `load_matches` reads it."""
    arrays = {}
    for method, of_method in matches.items():
        for field in ("scores", "context_rank"):
            parts = [getattr(match, field) for match in of_method]
            arrays[f"{method}_{field}"] = np.concatenate(parts) if parts else np.zeros(0)
            arrays[f"{method}_{field}_sizes"] = np.array([len(part) for part in parts], np.int64)
    with atomic_write(path) as file:
        np.savez(file, **arrays)


def load_matches(paths: Iterable[Path]) -> dict[str, list[Match]]:
    """The matches of all files, concatenated in their order."""
    matches: dict[str, list[Match]] = {method: [] for method in METHODS}
    for path in paths:
        with np.load(path) as arrays:
            for method, of_method in matches.items():
                parts = []
                for field in (f"{method}_scores", f"{method}_context_rank"):
                    ends = arrays[f"{field}_sizes"].cumsum()
                    parts.append(np.split(arrays[field], ends[:-1]) if len(ends) else [])
                of_method += [Match(s, None, ranks) for s, ranks in zip(*parts, strict=True)]
    return matches


def recall_of_mentions(matches: dict[str, list[Match]]) -> dict[str, Any]:
    """Evaluate all captions that mention an object.

    Args:
        matches: of each of `METHODS`, at least one.

    Returns:
        "captions", their number; per method "top", by number of proposals, and "mean", by the
        target mean number of proposals per caption, each with "recall" (percent: the share of the
        mentioned boxes that are hit, averaged over captions) and "proposals" (the actual mean);
        "mean" also with its "threshold" on the score, chosen on these captions for each method.
        The best proposal of a caption always remains.
    """
    results: dict[str, Any] = {"captions": len(matches["detector"]), "methods": {}}
    for method, of_method in matches.items():
        table = MatchTable(of_method, IOU_THRESHOLD)
        top, mean = {}, {}
        for count in TOPS:
            top[str(count)] = _point(table, np.minimum(table.num_proposals, count))
        for target in MEANS:
            threshold = table.threshold_for(target)
            point = _point(table, table.counts(threshold))
            mean[f"{target:g}"] = point | {"threshold": threshold}
        results["methods"][method] = {"top": top, "mean": mean}
    return results


def _point(table: MatchTable, counts: np.ndarray) -> dict[str, float]:
    summary = table.summary(counts)
    return {"recall": summary["context"], "proposals": summary["proposals"]}
