"""The answer to a query: the proposals that it keeps beside those of the detector alone."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from demo import query_record
from vlnms_d2.modeling.postprocessing import VLNMSPostprocessor
from vlnms_d2.visualization import draw_comparison, word_weights

from .scenes import Scene

MAX_QUERIES, MAX_LENGTH = 20, 300  # lines of the text field, and characters of each


class Settings(NamedTuple):
    """The controls of the page, in their order."""

    relatedness: str
    by_threshold: bool  # keep what is above `score_thresh`, otherwise the best `top_n`
    top_n: int
    score_thresh: float
    nms_thresh: float
    class_agnostic: bool
    fusion: str
    fusion_weight: float

    def postprocessor(self) -> VLNMSPostprocessor:
        """Fusion, NMS and final cut with these values."""
        return VLNMSPostprocessor(
            nms_thresh=self.nms_thresh,
            topk=100 if self.by_threshold else int(self.top_n),
            score_thresh=self.score_thresh if self.by_threshold else -1.0,
            fusion=self.fusion,
            fusion_weight=self.fusion_weight,
            class_agnostic=self.class_agnostic,
        )


class Scorer(Protocol):
    """`Models` or `DetectionFiles`."""

    def score(self, scene: Scene, queries: Sequence[str], relatedness: str): ...

    def words(self, query: str, relatedness: str) -> list[str]: ...


class Answer(NamedTuple):
    """The answer to one query.

    Attributes:
        query: as typed.
        words: that the relatedness module reads.
        weights: attention per word, float [L], or None.
        detector: as many of the detector's own proposals, `Instances`.
        aware: the proposals that the query keeps.
    """

    query: str
    words: list[str]
    weights: np.ndarray | None
    detector: Instances
    aware: Instances


def read_queries(text: str) -> list[str]:
    """The queries of the text field, one per line.

    Raises:
        ValueError: there are too many, or one is too long.
    """
    queries = [line.strip() for line in text.splitlines() if line.strip()]
    if len(queries) > MAX_QUERIES:
        raise ValueError(f"{len(queries)} queries, expected at most {MAX_QUERIES}: one per line.")
    for query in queries:
        if len(query) > MAX_LENGTH:
            raise ValueError(
                f"The query that begins with “{query[:40]}” has {len(query)} characters, expected "
                f"at most {MAX_LENGTH}."
            )
    return queries


def answer(
    scorer: Scorer, scene: Scene, queries: Sequence[str], settings: Settings
) -> tuple[list[Answer], float]:
    """Answer the queries about an image; also returns the seconds that it took."""
    start = time.perf_counter()
    if not queries:
        return [], 0.0
    related, boxes, attention = scorer.score(scene, queries, settings.relatedness)
    postprocessor = settings.postprocessor()
    selection = postprocessor(boxes, scene.scores, related, scene.classes)
    ones = torch.ones_like(related[:1])
    postprocessor.topk, postprocessor.score_thresh = 100, -1.0
    alone = postprocessor(scene.boxes, scene.scores, ones, scene.classes)
    seconds = time.perf_counter() - start
    answers = []
    for i, query in enumerate(queries):
        kept = selection.index[i, : selection.num_kept[i]]
        own_boxes = boxes if boxes.dim() == 2 else boxes[i]
        aware = _instances(scene, own_boxes[kept], kept)
        aware.scores, aware.relatedness = selection.scores[i, kept], related[i, kept]
        aware.cls_scores = scene.scores[kept]
        best = alone.index[0, : min(len(kept), int(alone.num_kept[0]))]
        detector = _instances(scene, scene.boxes[best], best)
        detector.scores = scene.scores[best]
        words = scorer.words(query, settings.relatedness)
        weights = None
        if attention is not None:
            rows = attention[i][kept] if attention.dim() == 3 else attention[i]
            weights, _ = word_weights(rows.numpy(), len(words))
        answers.append(Answer(query, words, weights, detector, aware))
    return answers, seconds


def _instances(scene: Scene, boxes: Tensor, index: Tensor) -> Instances:
    instances = Instances(scene.image.shape[:2])
    instances.pred_boxes = Boxes(boxes)
    instances.pred_classes = scene.classes[index]
    return instances


def to_records(scene: Scene, answers: Sequence[Answer]) -> dict[str, Any]:
    """The answers for JSON, as tools/demo.py writes them."""
    height, width = scene.image.shape[:2]
    queries = [query_record(*each, scene.class_names) for each in answers]
    return {"height": height, "width": width, "queries": queries}


def to_files(scene: Scene, answers: Sequence[Answer]) -> dict[str, bytes]:
    """The answers as JSON, as COCO results with the number of the query as "sent_id", and as a
    picture, by file name."""
    coco = [
        {
            "image_id": scene.image_id,
            "category_id": scene.category_ids[int(answer.aware.pred_classes[place])],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": float(answer.aware.scores[place]),
            "sent_id": number,
        }
        for number, answer in enumerate(answers)
        for place, (x1, y1, x2, y2) in enumerate(answer.aware.pred_boxes.tensor.tolist())
    ]
    pictures = [draw_comparison(scene.image, *each, scene.class_names) for each in answers]
    return {
        "proposals.json": json.dumps(to_records(scene, answers), indent=1).encode(),
        "coco_results.json": json.dumps(coco).encode(),
        "proposals.png": cv2.imencode(".png", np.vstack(pictures))[1].tobytes(),
    }
