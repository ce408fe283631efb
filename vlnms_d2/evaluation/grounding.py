"""Accuracy of what a second stage chose: referring expressions (REC), their masks (RES) and
phrases (PG).

Source: VL-NMS, Sec. 4.2 and 4.3. The proposal of highest score of each query is its answer, so the
same evaluators serve a second stage and query-aware proposals as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.structures import Boxes, BoxMode, Instances, pairwise_iou

from ..modeling.postprocessing import split_by_query
from .base import RecordEvaluator, image_name, report_groups, sort_expressions

IOU_THRESHOLD = 0.5
MASK_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)


class _AnswerEvaluator(RecordEvaluator):
    """Base class of the evaluators of this file: one answer for each expression.

    `process` takes model inputs with "image_id" and outputs with "instances" that have
    `query_index`; the queries are the data set's expressions of that image, in its order, or those
    that the input's "expressions" name by "sent_id" and "manner". Inputs with neither "query" nor
    "expressions" are skipped. An expression is counted once however often it is processed.

    Args:
        dataset_dicts: of the data set, as `DatasetCatalog.get` gives them: images with annotations
            and expressions.
        dataset_name, output_dir, distributed: see `RecordEvaluator`.

    The results are in percent.
    """

    def __init__(
        self,
        dataset_name: str,
        dataset_dicts: Iterable[dict[str, Any]],
        *,
        output_dir: str | None = None,
        distributed: bool = True,
    ):
        super().__init__(dataset_name, output_dir, distributed)
        self._images = {image["image_id"]: image for image in dataset_dicts}

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Add a batch; see the class.

        Raises:
            ValueError: an image or expression is not of the data set, or an expression has no
                referent; or the model gives no `query_index`.
        """
        for image_input, output in zip(inputs, outputs, strict=True):
            if "query" not in image_input and "expressions" not in image_input:
                continue
            image = self._known(self._images, image_input["image_id"], "image id", image_input)
            expressions = self._expressions(image_input, image)
            # Only the masks of the answers are moved to the CPU: masks are large.
            per_query = split_by_query(output["instances"], len(expressions))
            annotations = {a["id"]: a for a in image["annotations"]}
            for expression, proposals in zip(expressions, per_query, strict=True):
                if expression["ann_id"] not in annotations:
                    raise ValueError(
                        f"expression {expression['sent_id']} of {image_name(image)} has no "
                        f"annotated referent ('ann_id' is {expression['ann_id']}): expected a data "
                        "set of referring expressions or phrases"
                    )
                key = expression["manner"], expression["sent_id"]
                referent = annotations[expression["ann_id"]]
                self._records[key] = self._record(expression, referent, _best(proposals), image)

    def _summarize(self, records: dict[Any, Any]) -> dict[str, Any]:
        styled = sort_expressions(records)
        groups: dict[str, list[Any]] = {}
        for style, record in styled:
            for group in self._groups(style, record):
                groups.setdefault(group, []).append(record)
        return {
            "task": self.task,
            "overall": self._summarize_group([record for _, record in styled]),
            "groups": {name: self._summarize_group(groups[name]) for name in sorted(groups)},
        }

    def _report(self, results: dict[str, Any]) -> tuple[str, dict[str, float]]:
        return report_groups({"all": results["overall"], **results["groups"]})

    # --- implemented by subclasses ---------------------------------------------------------------

    def _record(
        self, expression: dict, referent: dict, answer: Instances | None, image: dict
    ) -> Any:
        """What is kept of an expression; `answer` is None where the query has no proposal."""
        raise NotImplementedError

    def _groups(self, style: str | None, record: Any) -> Iterable[str]:
        """The groups that the expression belongs to."""
        return () if style is None else (style,)

    def _summarize_group(self, records: Sequence[Any]) -> dict[str, float | int]:
        """The numbers of a group; "expressions" counts them."""
        raise NotImplementedError

    # --- steps -----------------------------------------------------------------------------------

    def _known(self, items: Mapping[Any, dict], key: Any, what: str, image_input: dict) -> dict:
        if key not in items:
            raise ValueError(
                f"{image_name(image_input)}: {what} {key} is not of {self.dataset_name}; give the "
                "evaluator the dicts of the data set that is evaluated"
            )
        return items[key]

    def _expressions(self, image_input: dict, image: dict) -> list[dict]:
        named = image_input.get("expressions")
        if named is None:
            return image["expressions"]
        annotated = {(e["manner"], e["sent_id"]): e for e in image["expressions"]}
        keys = ((e["manner"], e["sent_id"]) for e in named)
        return [self._known(annotated, key, "expression", image_input) for key in keys]


class RECEvaluator(_AnswerEvaluator):
    """Accuracy of referring expression comprehension: answers whose IoU with the referent is above
    0.5, in percent of the expressions; by style of expressions where the data set has several."""

    task, title = "rec", "REC"

    def _record(self, expression, referent, answer, image) -> float:
        return _box_iou(referent, answer)

    def _summarize_group(self, records: Sequence[float]) -> dict[str, float | int]:
        ious = np.array(records)
        return {
            "expressions": len(ious),
            "accuracy": 100.0 * float((ious > IOU_THRESHOLD).mean()),
            "mean_iou": 100.0 * float(ious.mean()),
        }


class _PhraseRecord(NamedTuple):
    iou: float
    types: tuple[str, ...]


class PhraseGroundingEvaluator(_AnswerEvaluator):
    """Accuracy of phrase grounding, for all phrases and for each type of phrase.

    A phrase's referent is its box, or the union of its boxes (Flickr30k Entities, "merged boxes"),
    as the data set's reader gives it. The types are those of "phrase_type"; a phrase of several
    types counts in each. Groups have "type:" before their name.
    """

    task, title = "phrase_grounding", "Phrase grounding"

    def _record(self, expression, referent, answer, image) -> _PhraseRecord:
        return _PhraseRecord(_box_iou(referent, answer), tuple(expression.get("phrase_type", ())))

    def _groups(self, style: str | None, record: _PhraseRecord) -> Iterable[str]:
        return (f"type:{kind}" for kind in dict.fromkeys(record.types))

    def _summarize_group(self, records: Sequence[_PhraseRecord]) -> dict[str, float | int]:
        hits = np.array([record.iou > IOU_THRESHOLD for record in records])
        return {"expressions": len(hits), "accuracy": 100.0 * float(hits.mean())}


class _MaskRecord(NamedTuple):
    intersection: int
    union: int


class RESEvaluator(_AnswerEvaluator):
    """Overall IoU and Pr@X of referring expression segmentation.

    The overall IoU is the sum of the intersections over the sum of the unions; Pr@X the percentage
    of expressions whose mask has an IoU above X with the referent's. An expression without an
    answer has an empty mask. Answers need `pred_masks`, bool [n, height, width] in pixels of the
    image file, and annotations their "segmentation": COCO's polygons or RLE.
    """

    task, title = "res", "RES"

    def _record(self, expression, referent, answer, image) -> _MaskRecord:
        if referent.get("segmentation") is None:
            raise ValueError(
                f"annotation {referent['id']} of {image_name(image)} has no 'segmentation', "
                "expected polygons or RLE to compare masks with"
            )
        truth = decode_mask(referent["segmentation"], image["height"], image["width"])
        if answer is None:
            return _MaskRecord(0, int(truth.sum()))
        if not answer.has("pred_masks"):
            raise ValueError(
                f"the output for {image_name(image)} has no pred_masks, which RES evaluates: set "
                "MODEL.MASK_ON to True"
            )
        mask = answer.pred_masks[0].cpu().numpy().astype(bool)
        return _MaskRecord(int((mask & truth).sum()), int((mask | truth).sum()))

    def _summarize_group(self, records: Sequence[_MaskRecord]) -> dict[str, float | int]:
        intersections, unions = np.array(records, dtype=np.int64).T
        # Two empty masks are equal.
        ious = np.where(unions > 0, intersections / np.maximum(unions, 1), 1.0)
        total = int(unions.sum())
        overall_iou = 100.0 * int(intersections.sum()) / total if total else 100.0
        numbers = {"expressions": len(records), "overall_iou": overall_iou}
        return numbers | {f"pr@{t}": 100.0 * float((ious > t).mean()) for t in MASK_THRESHOLDS}


def decode_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """COCO's segmentation, polygons, RLE or a list of RLE, as bool [height, width]."""
    if isinstance(segmentation, dict):
        segmentation = [segmentation]
    if segmentation and isinstance(segmentation[0], dict):
        parts = [
            mask_util.frPyObjects(rle, height, width) if isinstance(rle["counts"], list) else rle
            for rle in segmentation
        ]
    else:
        # COCO has polygons of two points, which have no area and which pycocotools refuses.
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
        parts = mask_util.frPyObjects(polygons, height, width) if polygons else []
    if not parts:
        return np.zeros((height, width), dtype=bool)
    return mask_util.decode(mask_util.merge(parts)).astype(bool)


def _best(instances: Instances) -> Instances | None:
    """The proposal of highest score, the first of equal ones; None where there is none."""
    if not len(instances):
        return None
    # argmax of equal scores gives any of them; a stable order gives the first.
    best = int(instances.scores.argsort(descending=True, stable=True)[0])
    return instances[best : best + 1]


def _box_iou(referent: dict, answer: Instances | None) -> float:
    if answer is None:
        return 0.0
    box = BoxMode.convert(referent["bbox"], referent["bbox_mode"], BoxMode.XYXY_ABS)
    truth = Boxes(torch.tensor([box], dtype=torch.float32))
    return float(pairwise_iou(truth, Boxes(answer.pred_boxes.tensor.float().cpu())))
