"""Recall of referents and contextual objects, for the detector alone and for VL-NMS.

Source: VL-NMS, Sec. 4.1 and Table 1. Two operating points: the first N proposals, and "real", a
score threshold that leaves few of them. The threshold is chosen on one data set (val) and used
unchanged on the others.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Instances
from detectron2.utils import comm
from tabulate import tabulate

from ..modeling.postprocessing import split_by_query
from .matching import Match, MatchTable, match_proposals
from .records import gather_records, write_results

logger = logging.getLogger(__name__)

METHODS = ("detector", "vlnms")
RESULTS_VERSION = 1
_LABELS = {
    "detector": "detector",
    "detector_matched": "detector (matched)",
    "vlnms": "VL-NMS",
}


@dataclass(frozen=True)
class ExpressionRecord:
    """What is kept of an expression.

    Attributes:
        manner: the kind of expressions it belongs to, or None.
        detector: the proposals of the detector alone.
        vlnms: the query-aware proposals.
    """

    manner: str | None
    detector: Match
    vlnms: Match


class ProposalRecallEvaluator(DatasetEvaluator):
    """Evaluates proposals of the detector alone and of VL-NMS on the same expressions.

    `process` takes each image twice in one batch, in either order: without "query", for the
    detector alone, and with "query" and "expressions" as `vlnms_d2.data.GroundingMapper` gives
    them. Boxes are xyxy in pixels of the image file. An expression is counted once, however
    often it is seen: it is known by its "manner" and "sent_id". One without a referent (a
    caption) takes part in all but the numbers of referents.

    A threshold for the detector alone that gives it as many proposals as VL-NMS has on the same
    expressions is evaluated as well, "detector (matched)". It looks at the data that it is
    evaluated on and is for comparison only.

    Args:
        dataset_name: names the results.
        output_dir: where `recall_{dataset_name}.json` is written; None writes nothing.
        num_proposals: N of the first operating point; proposals beyond it are not looked at.
        mean_proposals: proposals per expression at the real operating point; used to choose the
            thresholds.
        thresholds: of "detector" and "vlnms" at the real operating point: proposals with a score
            above it remain, and always the best one. None chooses them on this data set.
        iou_threshold: a proposal hits an annotated box above this IoU.
        distributed: gather the expressions of all processes.

    Attributes:
        thresholds: those used by the last `evaluate`, on the main process; to be given to the
            evaluators of other data sets.
        results: all results of the last `evaluate`, on the main process, as written to the file.

    Raises:
        ValueError: `thresholds` lacks a method.
    """

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
        if thresholds is not None and set(thresholds) != set(METHODS):
            raise ValueError(
                f"expected a threshold for each of {', '.join(METHODS)}, got {dict(thresholds)}"
            )
        self.dataset_name = dataset_name
        self.output_dir = output_dir
        self.num_proposals = num_proposals
        self.mean_proposals = mean_proposals
        self.iou_threshold = iou_threshold
        self.distributed = distributed
        self.thresholds = None if thresholds is None else dict(thresholds)
        self.results: dict[str, Any] | None = None
        self._given_thresholds = self.thresholds
        self._records: dict[tuple[str | None, Any], ExpressionRecord] = {}

    def reset(self) -> None:
        """Forget all expressions."""
        self._records = {}

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Take in a batch; see the class.

        Raises:
            ValueError: an image comes without its expressions, or without its partner; the
                message names the file. Or the model gives no `query_index`.
        """
        alone, asked = {}, {}
        for image_input, output in zip(inputs, outputs, strict=True):
            group = asked if "query" in image_input else alone
            group[image_input["image_id"]] = image_input, _light(output["instances"])
        for image_id, (image_input, _) in alone.items():
            if image_id not in asked:
                raise ValueError(
                    f"{_name(image_input)}: the batch has this image without a query only, so "
                    "there are no expressions to evaluate; use build_grounding_test_loader"
                )
        for image_id, (image_input, instances) in asked.items():
            if image_id not in alone:
                raise ValueError(
                    f"{_name(image_input)}: the batch has this image with its queries only; the "
                    "same image without them is needed, for the detector alone. Use "
                    "build_grounding_test_loader"
                )
            self._take_in(image_input, instances, alone[image_id][1])

    def _take_in(self, image_input: dict, instances: Instances, alone: Instances) -> None:
        expressions = _expressions(image_input)
        targets = [[e["referent_box"], *(e["context_boxes"] or [])] for e in expressions]
        detector = match_proposals(alone, targets, self.iou_threshold, self.num_proposals)
        per_query = split_by_query(instances, len(expressions))
        for expression, boxes, proposals, stock in zip(
            expressions, targets, per_query, detector, strict=True
        ):
            [vlnms] = match_proposals(proposals, [boxes], self.iou_threshold, self.num_proposals)
            key = expression["manner"], expression["sent_id"]
            self._records[key] = ExpressionRecord(expression["manner"], stock, vlnms)

    def evaluate(self) -> OrderedDict[str, dict[str, float]]:
        """Evaluate all expressions seen; prints a table and writes the file.

        Returns:
            `{"recall": {name: number}}` on the main process, recalls in percent; names of the
            numbers for one manner have a hyphen. Empty on the other processes and where no
            expression was seen.
        """
        records = self._gather()
        if not comm.is_main_process():
            return OrderedDict()
        if not records:
            logger.warning("[ProposalRecallEvaluator] Did not receive any expressions.")
            return OrderedDict()
        self.results = self._evaluate_records(records)
        self.thresholds = self.results["thresholds"]
        write_results(self.output_dir, f"recall_{self.dataset_name}", self.results)
        logger.info("Recall on %s:\n%s", self.dataset_name, format_table(self.results))
        return OrderedDict(recall=flat_results(self.results))

    def _gather(self) -> list[ExpressionRecord]:
        """All processes' expressions, once each, in an order that the processes do not change."""
        merged = gather_records(self._records, self.distributed)
        return [merged[key] for key in sorted(merged, key=lambda key: (str(key[0]), key[1]))]

    def _evaluate_records(self, records: list[ExpressionRecord]) -> dict[str, Any]:
        tables = self._tables(records)
        thresholds = self._given_thresholds or {
            method: tables[method].threshold_for(self.mean_proposals) for method in METHODS
        }
        by_manner: dict[str, list[ExpressionRecord]] = {}
        for record in records:
            if record.manner is not None:
                by_manner.setdefault(record.manner, []).append(record)
        return {
            "version": RESULTS_VERSION,
            "dataset": self.dataset_name,
            "num_proposals": self.num_proposals,
            "mean_proposals": self.mean_proposals,
            "iou_threshold": self.iou_threshold,
            "thresholds": thresholds,
            "thresholds_chosen_here": self._given_thresholds is None,
            "overall": evaluate_group(tables, thresholds),
            "by_manner": {
                manner: evaluate_group(self._tables(group), thresholds)
                for manner, group in by_manner.items()
            },
        }

    def _tables(self, records: Sequence[ExpressionRecord]) -> dict[str, MatchTable]:
        return {
            method: MatchTable([getattr(r, method) for r in records], self.iou_threshold)
            for method in METHODS
        }


def evaluate_group(
    tables: Mapping[str, MatchTable], thresholds: Mapping[str, float]
) -> dict[str, Any]:
    """Evaluate a group of expressions at both operating points.

    Args:
        tables: the same expressions for each of `METHODS`.
        thresholds: of the real operating point, for each of `METHODS`.

    Returns:
        "top" and "real" hold for "detector" and "vlnms" what `MatchTable.summary` gives, and
        under "misses_cut" by how many percent of the detector's VL-NMS has fewer misses of
        "referent" and "context" (None where the detector misses nothing). "real" also has
        "detector_matched", with its "threshold", and "misses_cut_matched" against that.
        "expressions", "expressions_with_referent" and "expressions_with_context" count them.
    """
    top = {method: table.summary(table.num_proposals) for method, table in tables.items()}
    real = {
        method: table.summary(table.counts(thresholds[method])) for method, table in tables.items()
    }
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
    """By how many percent VL-NMS has fewer misses than the detector; None where it has none."""
    cut = {}
    for key in ("referent", "context"):
        before, after = detector[key], vlnms[key]
        defined = before is not None and after is not None and before < 100.0
        cut[key] = 100.0 * (after - before) / (100.0 - before) if defined else None
    return cut


def flat_results(results: Mapping[str, Any]) -> dict[str, float]:
    """The results as one level of numbers, in Detectron2's manner; NaN where there is none."""
    flat = {f"threshold_{method}": results["thresholds"][method] for method in METHODS}
    groups = {"": results["overall"]}
    groups |= {f"-{manner}": group for manner, group in results["by_manner"].items()}
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
            cut = group[point]["misses_cut"]
            shown = ["misses cut (%)", None, cut["referent"], cut["context"], None]
            rows.append([name, group["expressions"], label, *shown])
    where = "on this data set" if results["thresholds_chosen_here"] else "elsewhere"
    thresholds = ", ".join(f"{_LABELS[m]} {t:.4g}" for m, t in results["thresholds"].items())
    return (
        tabulate(
            rows,
            headers=["manner", "#", "cut", "proposals of", "number", "referent", "context", "IoU"],
            tablefmt="pipe",
            floatfmt=".2f",
            missingval="-",
        )
        + f"\nRecall in percent at IoU > {results['iou_threshold']}. Thresholds of the real cut, "
        f"chosen {where}: {thresholds}.\nDetector (matched): as many proposals as VL-NMS on these "
        "very expressions; for comparison only."
    )


def _light(instances: Instances) -> Instances:
    """The fields that are evaluated, on the CPU; masks and others would be slow to move."""
    fields = ("pred_boxes", "scores", "query_index")
    kept = {name: instances.get(name) for name in fields if instances.has(name)}
    return Instances(instances.image_size, **kept).to("cpu")


def _expressions(image_input: dict) -> list[dict]:
    """The expressions of an input with queries, checked."""
    query = image_input["query"]
    num_queries = 1 if isinstance(query, str) else len(query)
    expressions = image_input.get("expressions")
    if expressions is None:
        raise ValueError(
            f'{_name(image_input)}: the input has a "query" but no "expressions" with the '
            "annotated boxes; map the data set with GroundingMapper"
        )
    if len(expressions) != num_queries:
        raise ValueError(
            f"{_name(image_input)}: the input has {num_queries} queries but "
            f"{len(expressions)} expressions, expected one each"
        )
    return expressions


def _name(image_input: dict) -> str:
    return image_input.get("file_name") or f"image {image_input['image_id']}"
