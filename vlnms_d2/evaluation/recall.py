"""Recall of referents and contextual objects, for the detector alone and for VL-NMS.

As in Sec. 4.1 and Table 1 of the paper, there are two operating points: the first N proposals, and
"real", the few proposals above a score threshold. The threshold is chosen on one data set (val) and
used unchanged on the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Instances
from tabulate import tabulate

from ..modeling.cached_rcnn import CachedRCNN
from ..modeling.feature_extraction import check_model, extract_features
from ..modeling.postprocessing import split_by_query
from ..modeling.queries import as_query_list
from .base import RecordEvaluator, image_name, sort_expressions
from .matching import Match, MatchTable, match_proposals

METHODS = ("detector", "vlnms")
RESULTS_VERSION = 1
_LABELS = {"detector": "detector", "detector_matched": "detector (matched)", "vlnms": "VL-NMS"}


@torch.no_grad()
def predict_with_detector(model: GeneralizedRCNN, batched_inputs: list[dict]) -> list[dict]:
    """Run the model with its queries and, in the same pass, as the stock detector.

    The stock detector is the baseline. An empty query would not do: its proposals too are limited
    by `MODEL.VLNMS.MAX_CANDIDATES`, are at least one, and depend on the settings of fusion, NMS and
    final cut.

    Args:
        model: a model with a VL-NMS head, in eval mode.
        batched_inputs: model inputs with "query".

    Returns:
        Per image a dictionary of "instances", the model's output, and "detector", its output for
        the image without a query; both without masks.

    Raises:
        TypeError: an image has no query, or one that is not a string.
        ValueError: the model has no VL-NMS head, or takes its proposals from files.
    """
    check_model(model, "the config")
    outputs = []
    for image_input in batched_inputs:
        if isinstance(model, CachedRCNN):
            image = model.cached_features(image_input)
        else:
            image = extract_features(model, image_input)
        size = image.image_size
        where = f'the "query" of {image_input.get("file_name", "an image")}'
        queries = as_query_list(image_input.get("query"), where)
        [result] = model.roi_heads.score_queries([image.candidates], [size], [queries])
        results = [result.per_query(result.distinct_instances(size)), image.detections]
        processed = GeneralizedRCNN._postprocess(results, [image_input] * 2, [size] * 2)
        with_queries, alone = (output["instances"] for output in processed)
        outputs.append({"instances": with_queries, "detector": alone})
    return outputs


class ProposalRecallEvaluator(RecordEvaluator):
    """Evaluates proposals of the detector alone and of VL-NMS on the same expressions.

    `process` expects inputs with "query" and "expressions", as `vlnms_d2.data.GroundingMapper`
    gives them, and outputs of `predict_with_detector`::

        with inference_context(model):
            inference_on_dataset(partial(predict_with_detector, model), loader, evaluator)

    Boxes are xyxy in pixels of the image file. An expression is identified by its "manner" (its
    style, such as that of RefCOCOg) and "sent_id", and counted once however often it is processed.
    An expression without a referent (a caption) counts for contextual objects only.

    At the "real" operating point the detector may have more or fewer proposals than VL-NMS. For
    comparison, it is also evaluated with a threshold that gives it as many on the same expressions:
    "detector (matched)".

    Args:
        num_proposals: N of the first operating point; proposals beyond it are ignored.
        mean_proposals: proposals per expression at the "real" operating point; used to choose the
            thresholds.
        thresholds: for "detector" and "vlnms", the threshold of the "real" operating point:
            proposals with a score above it remain, and always the best one. None to choose them on
            this data set.
        iou_threshold: a proposal hits an annotated box if their IoU is above this.
        dataset_name, output_dir, distributed: see `RecordEvaluator`.

    Attributes:
        thresholds: those used by the last `evaluate`, on the main process. Pass them to the
            evaluators of other data sets.

    Raises:
        ValueError: `thresholds` lacks a method.
    """

    task = "recall"
    title = "Recall"
    version = RESULTS_VERSION

    def __init__(
        self,
        dataset_name: str,
        *,
        output_dir: str | None = None,
        num_proposals: int = 100,
        mean_proposals: float = 8.0,
        thresholds: Mapping[str, float] | None = None,
        iou_threshold: float = 0.5,
        distributed: bool = True,
    ):
        super().__init__(dataset_name, output_dir, distributed)
        if thresholds is not None and set(thresholds) != set(METHODS):
            raise ValueError(
                f"expected a threshold for each of {', '.join(METHODS)}, got {dict(thresholds)}"
            )
        self.num_proposals = num_proposals
        self.mean_proposals = mean_proposals
        self.iou_threshold = iou_threshold
        self.thresholds = None if thresholds is None else dict(thresholds)
        self._given_thresholds = self.thresholds

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Add a batch; see the class.

        Raises:
            ValueError: an input has no queries or not as many expressions, or an output lacks
                "detector" or `query_index`.
        """
        for image_input, output in zip(inputs, outputs, strict=True):
            expressions = _expressions(image_input)
            if "detector" not in output:
                raise ValueError(
                    f'{image_name(image_input)}: the output has no "detector", the proposals of '
                    "the detector alone; run the model through predict_with_detector"
                )
            targets = [[e["referent_box"], *(e["context_boxes"] or [])] for e in expressions]
            limits = (self.iou_threshold, self.num_proposals)
            alone = match_proposals(_boxes_only(output["detector"]), targets, *limits)
            per_query = split_by_query(_boxes_only(output["instances"]), len(expressions))
            for expression, boxes, proposals, baseline in zip(
                expressions, targets, per_query, alone, strict=True
            ):
                [vlnms] = match_proposals(proposals, [boxes], *limits)
                key = expression["manner"], expression["sent_id"]
                self._records[key] = {"detector": baseline, "vlnms": vlnms}

    def _summarize(self, records: dict[Any, dict[str, Match]]) -> dict[str, Any]:
        styled = sort_expressions(records)
        tables = self._tables([record for _, record in styled])
        self.thresholds = self._given_thresholds or {
            method: tables[method].threshold_for(self.mean_proposals) for method in METHODS
        }
        by_style: dict[str, list[dict[str, Match]]] = {}
        for style, record in styled:
            if style is not None:
                by_style.setdefault(style, []).append(record)
        return {
            "num_proposals": self.num_proposals,
            "mean_proposals": self.mean_proposals,
            "iou_threshold": self.iou_threshold,
            "thresholds": self.thresholds,
            "thresholds_chosen_here": self._given_thresholds is None,
            "overall": evaluate_group(tables, self.thresholds),
            "by_manner": {
                style: evaluate_group(self._tables(group), self.thresholds)
                for style, group in by_style.items()
            },
        }

    def _report(self, results: dict[str, Any]) -> tuple[str, dict[str, float]]:
        return format_table(results), flat_results(results)

    def _tables(self, records: Sequence[dict[str, Match]]) -> dict[str, MatchTable]:
        return {
            method: MatchTable([record[method] for record in records], self.iou_threshold)
            for method in METHODS
        }


def evaluate_group(
    tables: Mapping[str, MatchTable], thresholds: Mapping[str, float]
) -> dict[str, Any]:
    """Evaluate a group of expressions at both operating points.

    Args:
        tables: the same expressions for each of `METHODS`.
        thresholds: of the "real" operating point, for each of `METHODS`.

    Returns:
        * "top" and "real", one dictionary per operating point: "detector" and "vlnms" as
          `MatchTable.summary` returns them, and "misses_cut", see `misses_cut`. "real" also has
          "detector_matched", with its "threshold", and "misses_cut_matched" relative to it;
        * "expressions", "expressions_with_referent" and "expressions_with_context": their numbers.
    """
    top = {method: table.summary(table.num_proposals) for method, table in tables.items()}
    real = {name: table.summary(table.counts(thresholds[name])) for name, table in tables.items()}
    matched = tables["detector"].threshold_for(real["vlnms"]["proposals"])
    real["detector_matched"] = tables["detector"].summary(tables["detector"].counts(matched))
    real["detector_matched"]["threshold"] = matched
    top["misses_cut"] = misses_cut(top["detector"], top["vlnms"])
    real["misses_cut"] = misses_cut(real["detector"], real["vlnms"])
    real["misses_cut_matched"] = misses_cut(real["detector_matched"], real["vlnms"])
    return {
        "expressions": len(tables["vlnms"].num_proposals),
        "expressions_with_referent": tables["vlnms"].num_with_referent,
        "expressions_with_context": tables["vlnms"].num_with_context,
        "top": top,
        "real": real,
    }


def misses_cut(
    detector: Mapping[str, float | None], vlnms: Mapping[str, float | None]
) -> dict[str, float | None]:
    """The share of the detector's misses that VL-NMS avoids, in percent, of "referent" and
    "context"; None if the detector has no misses or there is nothing to miss."""
    reduction = {}
    for key in ("referent", "context"):
        before, after = detector[key], vlnms[key]
        defined = before is not None and after is not None and before < 100.0
        reduction[key] = 100.0 * (after - before) / (100.0 - before) if defined else None
    return reduction


def flat_results(results: Mapping[str, Any]) -> dict[str, float]:
    """The results as a flat dictionary, as Detectron2 expects it; NaN where there is no number.

    Numbers for one style of expressions have a hyphen and the style at the end of their names.
    """
    flat = {f"threshold_{method}": results["thresholds"][method] for method in METHODS}
    groups = {"": results["overall"]}
    groups |= {f"-{style}": group for style, group in results["by_manner"].items()}
    for suffix, group in groups.items():
        for point, label in (("top", f"top{results['num_proposals']}"), ("real", "real")):
            for row, numbers in group[point].items():
                for key, value in numbers.items():
                    name = f"{label}_{row}_{key}{suffix}"
                    flat[name] = float("nan") if value is None else value
    return flat


def format_table(results: Mapping[str, Any]) -> str:
    """The results as a table to print."""
    rows = []
    groups = {"all": results["overall"]}
    if len(results["by_manner"]) > 1:
        groups |= results["by_manner"]
    for name, group in groups.items():
        for point, label in (("top", f"N={results['num_proposals']}"), ("real", "real")):
            for row in ("detector", "detector_matched", "vlnms"):
                if row in group[point]:
                    numbers = group[point][row]
                    shown = [numbers[k] for k in ("proposals", "referent", "context", "best_iou")]
                    rows.append([name, group["expressions"], label, _LABELS[row], *shown])
            reduction = group[point]["misses_cut"]
            shown = ["misses cut (%)", None, reduction["referent"], reduction["context"], None]
            rows.append([name, group["expressions"], label, *shown])
    headers = ["style", "expressions", "operating point", "proposals of"]
    headers += ["proposals", "referent", "context", "IoU"]
    where = "on this data set" if results["thresholds_chosen_here"] else "elsewhere"
    thresholds = ", ".join(f"{_LABELS[m]} {t:.4g}" for m, t in results["thresholds"].items())
    return (
        tabulate(rows, headers=headers, tablefmt="pipe", floatfmt=".2f", missingval="-")
        + f"\nRecall in percent at IoU > {results['iou_threshold']}. Thresholds of the real "
        f"operating point, chosen {where}: {thresholds}.\nDetector (matched): as many proposals as "
        "VL-NMS on the same expressions; for comparison only."
    )


def _boxes_only(instances: Instances) -> Instances:
    """The fields that are evaluated, on the CPU; moving others, such as masks, would be slow."""
    fields = ("pred_boxes", "scores", "query_index")
    kept = {name: instances.get(name) for name in fields if instances.has(name)}
    return Instances(instances.image_size, **kept).to("cpu")


def _expressions(image_input: dict) -> list[dict]:
    """The expressions of an input, checked against its queries."""
    query, expressions = image_input.get("query"), image_input.get("expressions")
    num_queries = 1 if isinstance(query, str) else len(query or ())
    mapped = "map the data set with GroundingMapper"
    if "query" not in image_input:
        problem = f'no "query", so there are no expressions to evaluate; {mapped}'
    elif expressions is None:
        problem = f'a "query" but no "expressions" with the annotated boxes; {mapped}'
    elif len(expressions) != num_queries:
        problem = f"{num_queries} queries but {len(expressions)} expressions, expected one each"
    else:
        return expressions
    raise ValueError(f"{image_name(image_input)}: the input has {problem}")
