"""A run of a model over a data set, on all ranks, that leaves a folder with a manifest."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from detectron2.config import CfgNode

from .model_settings import ModelSettings, identity_of
from .processes import Processes, begun
from .resumable import MANIFEST, OutputFolder


class RunSettings(Protocol):
    """What a run makes of what.

    Attributes:
        model: see there.
        out: folder for the output, which all machines see.
        identity: of the settings, all that the output depends on and the config does not tell.
    """

    model: ModelSettings
    out: Path

    @property
    def identity(self) -> Mapping[str, Any]: ...

    def config(self, device: str) -> CfgNode:
        """The model's config with the cut."""


Work = Callable[[Any, CfgNode, Sequence[dict[str, Any]], OutputFolder], None]
"""Does what is not yet done of a run: called on each rank with its settings, config, images and
folder."""


def run_model(
    work: Work, settings: RunSettings, processes: Processes | None, overwrite: bool
) -> dict[str, Any]:
    """Do the work that is not yet done.

    Args:
        work: of a module.
        settings: of the run.
        processes: that share the work; None is this one, on the CPU.
        overwrite: replace the output of a run of other input or settings.

    Returns:
        The manifest.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a value is wrong, a file is damaged or the folder is in use.
        torch.multiprocessing.ProcessException: one of several processes failed, or was killed.
    """
    processes = processes or Processes()
    settings.config(processes.device)  # fails here rather than in another process
    processes.run(_on_rank, work, settings, processes.device, overwrite)
    return json.loads((settings.out / MANIFEST).read_bytes())


def _on_rank(work: Work, settings: RunSettings, device: str, overwrite: bool) -> None:
    cfg = settings.config(device)
    images = settings.model.images()
    with begun(
        settings.out, lambda: identity_of(cfg, images, settings.identity), overwrite
    ) as output:
        if output is not None:
            work(settings, cfg, images, output)
