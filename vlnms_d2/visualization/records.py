"""Proposals as plain numbers and names, for labels, tables and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes, Instances, pairwise_iou
from tabulate import tabulate

from .drawing import cut

MAX_QUERY, QUERY_COLUMN = 120, 30  # characters of a query in the table, and in a line of it
IOU_THRESHOLD = 0.5
"""Two boxes show the same thing, and a proposal hits the referent, above this IoU."""


def proposal_records(instances: Instances, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Per proposal `box` (xyxy in pixels), `class` and scores.

    The scores are `s` (fused), `c` (class confidence) and `r` (relatedness); a proposal of the
    detector alone has `c` only. A class beyond `class_names` is given as its number.
    """
    fields = {"c": "scores"}
    if instances.has("relatedness"):
        fields = {"s": "scores", "c": "cls_scores", "r": "relatedness"}
    columns = {key: instances.get(field).tolist() for key, field in fields.items()}
    boxes, classes = instances.pred_boxes.tensor.tolist(), instances.pred_classes.tolist()
    return [
        {"box": box, "class": class_names[c] if c < len(class_names) else str(c)}
        | {key: column[i] for key, column in columns.items()}
        for i, (box, c) in enumerate(zip(boxes, classes, strict=True))
    ]


def query_record(
    query: str,
    words: Sequence[str],
    attention: np.ndarray | None,
    detector: Instances,
    aware: Instances,
    class_names: Sequence[str],
    referent: Sequence[float] | None = None,
) -> dict[str, Any]:
    """What was found for a query; arguments as for `draw_comparison`.

    Returns:
        `query`, `words`, `attention` (per word, or None), `proposals`; and where the referent is
        known `referent`: its `box`, whether it is `hit_by_proposals`, and whether it is
        `hit_by_detector` with as many proposals.
    """
    weights, _ = word_weights(attention, len(words))
    record = {
        "query": query,
        "words": list(words),
        "attention": None if weights is None else weights.tolist(),
        "proposals": proposal_records(aware, class_names),
    }
    if referent is not None:
        record["referent"] = {
            "box": list(referent),
            "hit_by_detector": hits(detector[: len(aware)], referent),
            "hit_by_proposals": hits(aware, referent),
        }
    return record


def result_table(images: Sequence[dict[str, Any]]) -> str:
    """What was found, a row per image and query; where the referent is known, whether it is hit.

    Args:
        images: per image its `file` and, as `queries`, what `query_record` returned.
    """
    rows, verdicts = [], []
    for image in images:
        for record in image["queries"]:
            kept = record["proposals"]
            best = ", ".join(f"{p['class']} {short_number(p['s'])}" for p in kept[:3])
            query = cut(" ".join(record["query"].split()), MAX_QUERY)
            row = [Path(image["file"]).name, query, len(kept), best]
            if "referent" in record:
                found = record["referent"]
                verdicts.append((found["hit_by_detector"], found["hit_by_proposals"]))
                row += ["yes" if hit else "no" for hit in verdicts[-1]]
            rows.append(row)
    headers = ["image", "query", "kept", "best three (class, s)"]
    widths = [None, QUERY_COLUMN, *[None] * (len(rows[0]) - 2)] if rows else None
    if not verdicts:
        return tabulate(rows, headers, disable_numparse=True, maxcolwidths=widths)
    detector, aware = (sum(column) for column in zip(*verdicts, strict=True))
    headers += ["detector\nfinds it", "with query\nfinds it"]
    text = tabulate(rows, headers, disable_numparse=True, maxcolwidths=widths)
    return (
        f"{text}\n\nObjects found, by as many proposals each: {detector} of {len(verdicts)} by the "
        f"detector alone, {aware} with the query"
    )


def word_weights(attention: np.ndarray | None, num_words: int) -> tuple[np.ndarray | None, bool]:
    """Attention per word, float [num_words] or None, and whether it is a mean over the boxes."""
    if attention is None or num_words == 0 or len(attention) == 0:
        return None, False
    rows = np.atleast_2d(np.asarray(attention, dtype=np.float64))[:, :num_words]
    return rows.mean(axis=0), not np.allclose(rows, rows[:1], atol=1e-4)


def hits(instances: Instances, box: Sequence[float]) -> bool:
    """Whether a proposal hits `box` (xyxy in the same pixels)."""
    target = Boxes(torch.tensor([list(box)], device=instances.pred_boxes.device))
    return bool((pairwise_iou(instances.pred_boxes, target) > IOU_THRESHOLD).any())


def same_boxes(one: Instances, other: Instances) -> tuple[list[bool], list[bool]]:
    """For each box of either side whether the other side has it too, of whatever class."""
    iou = pairwise_iou(one.pred_boxes, other.pred_boxes) > IOU_THRESHOLD
    return iou.any(dim=1).tolist(), iou.any(dim=0).tolist()


def short_number(value: float) -> str:
    """A score in [0, 1] with two digits: ".83", "1.0"."""
    text = f"{value:.2f}"
    return text[1:] if text.startswith("0") else text[:3]
