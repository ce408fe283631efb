"""Query-aware proposals from the detections of any detector, without running a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import torch
from detectron2.structures import Instances
from torch import Tensor

from .file_io import shown
from .language.matching import CategoryMatcher, category_matcher
from .modeling.candidates import Candidates
from .modeling.postprocessing import QueryResult, VLNMSPostprocessor, split_by_query
from .modeling.queries import as_query_list
from .modeling.relatedness import PortablePhrases, category_relatedness, portable_relatedness

NMS_THRESH = 0.5

Array: TypeAlias = Tensor | np.ndarray
Relatedness: TypeAlias = str | Callable[[list[str], Tensor, Tensor], Array] | Array


def rerank(
    boxes: Tensor | np.ndarray,
    scores: Tensor | np.ndarray,
    classes: Tensor | np.ndarray,
    category_names: Sequence[str],
    queries: Sequence[str],
    topk: int = 100,
    score_thresh: float | None = None,
    nms_thresh: float | None = None,
    relatedness: Relatedness = "Category",
    *,
    image_size: tuple[int, int] | None = None,
    image: np.ndarray | None = None,
) -> list[Instances]:
    """Select the proposals of each query from an image's detections.

    The score of a detection is the product of its confidence and its relatedness to the query; NMS
    and the final cut work on this score (paper, Sec. 3.2).

    Args:
        boxes: float [N, 4], xyxy in pixels.
        scores: float [N], class confidence c, from 0 to 1.
        classes: int [N], indices into `category_names`.
        category_names: the names of the detector's classes.
        queries: Q strings.
        topk: maximum number of proposals per query; negative for all.
        score_thresh: keep detections with a fused score above this, and always the best one; None
            to keep all.
        nms_thresh: IoU threshold of the class-wise NMS; None for 0.5. If the detections have
            already been through NMS with this threshold, no more of them are suppressed.
        relatedness: "Category", nouns of the query against the category names; "Portable", also
            place, order, size, colour and surroundings; or r, float [Q, N] from 0 to 1, as an array
            or as a callable of (queries, boxes [N, 4], classes [N]).
        image_size: (height, width) in pixels; None for that of `image`, or without one the smallest
            size that contains all boxes.
        image: BGR uint8 [H, W, 3], for the colours of "Portable"; None leaves them out.

    Returns:
        One Instances per query, in descending order of the fused score, with `pred_boxes`, `scores`
        (s), `cls_scores` (c), `relatedness` (r), `pred_classes`, `query_index` and
        `candidate_index` (int64, index into the input). A query that names no category
        ("Portable": that says nothing) leaves the detector's order unchanged (r = 1).

    Raises:
        TypeError: a query is not a string, or `queries` is one; the names are no list.
        ValueError: shapes do not match, a class is out of range, a box is not finite, most boxes
            are no xyxy in the image, a score or r is not from 0 to 1, or the
            image is not BGR uint8 of `image_size`.
    """
    if isinstance(queries, str):
        raise TypeError(f"queries must be a sequence of strings, got the string {shown(queries)}")
    queries = as_query_list(list(queries), "queries")
    if isinstance(category_names, (str, Mapping)):
        kind = type(category_names).__name__
        raise TypeError(f"category_names must be a list of names in class order, got a {kind}")
    boxes, scores, classes = _checked_detections(boxes, scores, classes, len(category_names))
    if image is not None:
        image_size = _checked_image(image, image_size)
    height, width = image_size or (math.inf, math.inf)
    wrong = (boxes[:, 2:] < boxes[:, :2]) | (boxes[:, 2:] > boxes.new_tensor([width, height]) + 1)
    wrong = wrong.any(dim=1)
    if 2 * int(wrong.sum()) > len(boxes):
        raise ValueError(
            f"{int(wrong.sum())} of {len(boxes)} boxes, as {boxes[wrong][0].tolist()}, end before "
            "they begin or outside the image: expected [x1, y1, x2, y2], not [x, y, width, height]"
        )
    if image_size is None:
        width, height = boxes[:, 2:].amax(dim=0).tolist() if len(boxes) else (0, 0)
        image_size = (max(0, math.ceil(height)), max(0, math.ceil(width)))
    candidates = Candidates(boxes, scores, classes, proposal_index=classes)
    if isinstance(relatedness, str) and relatedness == "Portable":
        text = _phrases(tuple(category_names))(queries)
        related = portable_relatedness(text, candidates, image_size, image)
    elif isinstance(relatedness, str):
        if relatedness != "Category":
            raise ValueError(
                f'relatedness is {relatedness!r}, expected "Category", "Portable", a callable or '
                "an array"
            )
        cosines = _matcher(tuple(category_names)).best_cosines(queries)  # [Q, categories]
        related = category_relatedness(cosines)[:, classes]  # [Q, N]
    else:
        given = relatedness(queries, boxes, classes) if callable(relatedness) else relatedness
        related = _checked_relatedness(given, len(queries), len(boxes))
    postprocessor = VLNMSPostprocessor(
        nms_thresh=NMS_THRESH if nms_thresh is None else nms_thresh,
        topk=topk,
        score_thresh=-1.0 if score_thresh is None else score_thresh,
    )
    selection = postprocessor(boxes, scores, related, classes)
    result = QueryResult(candidates, boxes, related, selection)
    instances = result.per_query(result.distinct_instances(image_size))
    instances.candidate_index = result.candidate_index
    return split_by_query(instances, len(queries))


@lru_cache(maxsize=8)
def _matcher(category_names: tuple[str, ...]) -> CategoryMatcher:
    return category_matcher(category_names)


@lru_cache(maxsize=8)
def _phrases(category_names: tuple[str, ...]) -> PortablePhrases:
    return PortablePhrases(category_names=category_names)


def _checked_image(image: np.ndarray, image_size: tuple[int, int] | None) -> tuple[int, int]:
    """The size of the image, (height, width)."""
    is_image = isinstance(image, np.ndarray) and image.dtype == np.uint8
    if not is_image or image.ndim != 3 or image.shape[2] != 3:
        kind = getattr(image, "dtype", type(image).__name__)
        raise ValueError(f"image must be BGR uint8 [H, W, 3], got {kind} {list(np.shape(image))}")
    if image_size is not None and tuple(image_size) != image.shape[:2]:
        raise ValueError(f"image_size is {image_size}, but the image is {image.shape[:2]}")
    return image.shape[:2]


def _checked_detections(
    boxes: Tensor | np.ndarray,
    scores: Tensor | np.ndarray,
    classes: Tensor | np.ndarray,
    num_classes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    boxes = torch.as_tensor(boxes, dtype=torch.float32)
    scores = torch.as_tensor(scores, dtype=torch.float32)
    classes = torch.as_tensor(classes)
    if not classes.numel():  # empty lists have neither an integer type nor a second dimension
        boxes, classes = boxes.reshape(-1, 4), classes.long()
    if classes.is_floating_point():
        raise ValueError(f"classes must be integers, got {classes.dtype}")
    num = len(boxes)
    if boxes.shape != (num, 4) or scores.shape != (num,) or classes.shape != (num,):
        raise ValueError(
            "expected boxes [N, 4], scores [N] and classes [N], got "
            f"{list(boxes.shape)}, {list(scores.shape)} and {list(classes.shape)}"
        )
    if not bool(boxes.isfinite().all()):
        raise ValueError(f"box {int((~boxes.isfinite()).any(dim=1).nonzero()[0])} is not finite")
    _check_range("score", scores)
    if num and not 0 <= int(classes.min()) <= int(classes.max()) < num_classes:
        raise ValueError(
            f"classes go from {int(classes.min())} to {int(classes.max())}, expected indices into "
            f"the {num_classes} category names"
        )
    return boxes, scores, classes.long()


def _checked_relatedness(given: Tensor | np.ndarray, num_queries: int, num_boxes: int) -> Tensor:
    related = torch.as_tensor(given, dtype=torch.float32)
    if related.shape != (num_queries, num_boxes):
        raise ValueError(
            f"relatedness must be [Q, N] = [{num_queries}, {num_boxes}], got {list(related.shape)}"
        )
    _check_range("relatedness", related)
    return related


def _check_range(name: str, values: Tensor) -> None:
    wrong = ~((values >= 0) & (values <= 1))  # also for NaN
    if bool(wrong.any()):
        where = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{name} {where if len(where) > 1 else where[0]} is {float(values[tuple(where)])}, "
            "expected a number from 0 to 1"
        )
