"""Base class of the evaluators: records gathered from all processes, and a results file."""

from __future__ import annotations

import itertools
import logging
import os
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from tabulate import tabulate

from ..file_io import write_json

logger = logging.getLogger(__name__)


class RecordEvaluator(DatasetEvaluator):
    """Base class: keeps one record per expression or image and evaluates them all at the end.

    A subclass adds to `_records` in `process`, under a key that is the same on every process, so
    that an item that several processes evaluate is counted once. It implements `_summarize` and
    `_report`.

    Args:
        dataset_name: names the results.
        output_dir: where `{task}_{dataset_name}.json` is written; None writes nothing.
        distributed: gather the records of all processes.

    Attributes:
        results: all results of the last `evaluate`, on the main process, as written to the file.
    """

    task: str  # names the results and their file
    title: str  # names the results in the log
    items = "expressions"  # what the records stand for, in the plural
    version = 1  # of the format of the results file

    def __init__(self, dataset_name: str, output_dir: str | None, distributed: bool):
        self.dataset_name = dataset_name
        self.output_dir = output_dir
        self.distributed = distributed
        self.results: dict[str, Any] | None = None
        self._records: dict[Any, Any] = {}

    def reset(self) -> None:
        """Drop all records."""
        self._records = {}

    def evaluate(self) -> OrderedDict[str, dict[str, float]]:
        """Evaluate all records; logs a table and writes the file.

        Returns:
            `{task: {name: number}}` on the main process. Empty on the other processes, and where
            nothing was processed.
        """
        records = self._gather()
        if not comm.is_main_process():
            return OrderedDict()
        if not records:
            logger.warning("[%s] Did not receive any %s.", type(self).__name__, self.items)
            return OrderedDict()
        self.results = {"version": self.version, "dataset": self.dataset_name}
        self.results |= self._summarize(records)
        if self.output_dir is not None:
            PathManager.mkdirs(self.output_dir)
            path = os.path.join(self.output_dir, f"{self.task}_{self.dataset_name}.json")
            write_json(path, self.results)
            logger.info("Wrote %s", path)
        table, numbers = self._report(self.results)
        logger.info("%s on %s:\n%s", self.title, self.dataset_name, table)
        return OrderedDict({self.task: numbers})

    def _summarize(self, records: dict[Any, Any]) -> dict[str, Any]:
        """The results of at least one record, as JSON has them."""
        raise NotImplementedError

    def _report(self, results: dict[str, Any]) -> tuple[str, dict[str, float]]:
        """The results as a table to print, and as a flat dictionary as Detectron2 expects it."""
        raise NotImplementedError

    def _gather(self) -> dict[Any, Any]:
        """The records of all processes on the main process; empty on the others."""
        parts = [self._records]
        if self.distributed:
            comm.synchronize()
            parts = comm.gather(self._records, dst=0)
        return dict(itertools.chain.from_iterable(part.items() for part in parts))


def sort_expressions(records: dict[tuple[str | None, Any], Any]) -> list[tuple[str | None, Any]]:
    """The records of expressions, keyed by (style, sentence id), in an order that does not depend
    on the processes: a list of (style, record)."""
    keys = sorted(records, key=lambda key: (str(key[0]), key[1]))
    return [(key[0], records[key]) for key in keys]


def report_groups(groups: Mapping[str, Mapping[str, Any]]) -> tuple[str, dict[str, float]]:
    """What `RecordEvaluator._report` returns for the numbers of all, the first group, and of other
    groups, whose names end in a hyphen and the group in the flat dictionary."""
    rows = [{"": name, **numbers} for name, numbers in groups.items()]
    (_, overall), *others = groups.items()
    flat = dict(overall)
    for name, numbers in others:
        flat |= {f"{key}-{name}": value for key, value in numbers.items()}
    return tabulate(rows, headers="keys", tablefmt="pipe", floatfmt=".2f"), flat


def image_name(image: dict) -> str:
    """How a message names an image: its file, or its id where that is not known."""
    return image.get("file_name") or f"image {image['image_id']}"
