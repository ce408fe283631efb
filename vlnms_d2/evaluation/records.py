"""What evaluators share: gathering what several processes have seen, and writing the results."""

from __future__ import annotations

import itertools
import logging
import os
from typing import Any, TypeVar

from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from ..file_io import write_json

logger = logging.getLogger(__name__)

Key = TypeVar("Key")
Record = TypeVar("Record")


def gather_records(own: dict[Key, Record], distributed: bool) -> dict[Key, Record]:
    """The records of all processes, once each; on other processes than the main one nothing.

    Args:
        own: this process's; a key stands for one record wherever it was seen.
        distributed: there are several processes.
    """
    parts = [own]
    if distributed:
        comm.synchronize()
        parts = comm.gather(own, dst=0)
    return dict(itertools.chain.from_iterable(part.items() for part in parts))


def write_results(output_dir: str | None, name: str, results: dict[str, Any]) -> None:
    """Write results as `{name}.json`; makes the folder.

    Args:
        output_dir: the folder; None to write nothing.
        name: of the file, without its ending.
        results: as JSON has them.
    """
    if output_dir is None:
        return
    PathManager.mkdirs(output_dir)
    path = os.path.join(output_dir, f"{name}.json")
    write_json(path, results)
    logger.info("Wrote %s", path)
