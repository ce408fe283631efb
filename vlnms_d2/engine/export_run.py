"""Query-aware proposals of a model for all queries of a data set, as second stages read them.

Block by block of images, in two passes: the model's, of which each block leaves what was found,
and one that cuts and writes it in all formats. Memory holds the data set's annotations, but
proposals of one image at a time, and a run that was killed goes on with the blocks that are
missing. What is written does not depend on how many processes there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils import comm

from ..data import GroundingMapper
from ..export import FEATURE_FORMATS, FORMATS, ProposalFormat, Scan, check_formats
from ..modeling.feature_extraction import LAYERS
from .cut import check_cut
from .detector_classes import detector_classes
from .export_blocks import COUNTS, FOUND, SCORES, BlockWriter, ImageBlocks
from .model_run import run_model
from .model_settings import ModelSettings
from .processes import Processes, from_main, own_missing
from .proposal_model import ProposalModel
from .resumable import OutputFolder
from .score_threshold import threshold_for_mean
from .shards import Shards, merge_format, progress, sum_counts

MASK_FORMATS = ("jsonl", "coco")


@dataclass(frozen=True)
class ExportSettings:
    """What an export makes of what.

    Attributes:
        model: see there.
        out: folder for the output, which all machines see.
        formats: names in `vlnms_d2.export.FORMATS` and `FEATURE_FORMATS`.
        top_n: proposals kept per query. Of this and the next two at most one is given; without
            any the config decides, by TEST.DETECTIONS_PER_IMAGE and
            MODEL.VLNMS.FINAL_SCORE_THRESH.
        score_thresh: of the config's number of proposals those with s above it are kept, and the
            best one.
        mean_proposals: like `score_thresh`, with the threshold at which the mean number per query
            (of those with proposals) comes closest to this.
        layer: of the features, for formats that need them; see `box_features`.
        masks: give masks as well, in `MASK_FORMATS`.
        categories_of: see `detector_classes`.
        block_size: images of a block, which is what a killed run loses at most.

    Raises:
        ValueError: a value that cannot be, or several that exclude each other.
    """

    model: ModelSettings
    out: Path
    formats: tuple[str, ...] = ("jsonl",)
    top_n: int | None = None
    score_thresh: float | None = None
    mean_proposals: float | None = None
    layer: str = "detector"
    masks: bool = False
    categories_of: str | None = None
    block_size: int = 8

    def __post_init__(self):
        check_cut(self.top_n, self.score_thresh, self.mean_proposals)
        check_formats(self.formats, (*FORMATS, *FEATURE_FORMATS))
        if self.layer not in LAYERS:
            raise ValueError(f"features are {self.layer!r}, expected {' or '.join(LAYERS)}")
        if self.masks and not set(self.formats) & set(MASK_FORMATS):
            raise ValueError(
                f"masks are asked for, but only {' and '.join(MASK_FORMATS)} have a place for them"
            )
        if "scan" in self.formats and self.top_n is None:
            raise ValueError("scan has the same number of boxes for each caption: give top_n")
        if self.block_size < 1:
            raise ValueError(f"block_size is {self.block_size}, expected at least 1")

    @property
    def needs_features(self) -> bool:
        """Whether a format has the boxes' features."""
        return any(name in FEATURE_FORMATS for name in self.formats)

    def config(self, device: str) -> CfgNode:
        """The model's config with the cut: what `VLNMSPredictor` gives with it is exported."""
        cfg = self.model.config(device)
        if self.top_n is not None:
            cfg.TEST.DETECTIONS_PER_IMAGE = self.top_n
            cfg.MODEL.VLNMS.FINAL_SCORE_THRESH = 0.0
        if self.score_thresh is not None:
            cfg.MODEL.VLNMS.FINAL_SCORE_THRESH = self.score_thresh
        if self.mean_proposals is not None:
            cfg.MODEL.VLNMS.FINAL_SCORE_THRESH = -1.0  # cut later
        if self.masks and not cfg.MODEL.MASK_ON:
            raise ValueError(
                f"{self.model.config_file}: masks are asked for, but MODEL.MASK_ON is False"
            )
        return cfg

    @property
    def identity(self) -> dict[str, Any]:
        """Of the settings, all that the output depends on and the config does not tell."""
        return {
            "dataset": self.model.dataset,
            "formats": list(self.formats),
            "mean_proposals": self.mean_proposals,
            "features": self.layer if self.needs_features else None,
            "masks": self.masks,
            "categories_of": self.categories_of,
            "block_size": self.block_size,
        }

    def make_formats(self) -> list[ProposalFormat]:
        """One of each name."""
        made = {**FORMATS, **{name: make() for name, make in FEATURE_FORMATS.items()}}
        if self.top_n is not None:
            made["scan"] = Scan(self.top_n)
        return [made[name] for name in self.formats]


def run_export(
    settings: ExportSettings, processes: Processes | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Answer all queries and write the output; skip what is there.

    Args:
        settings: see `ExportSettings`.
        processes: that share the work; None is this one, on the CPU.
        overwrite: replace the output of a run of other input or settings.

    Returns:
        The manifest, as `manifest.json` has it: "identity" (sha256 of weights and vocabulary,
        config, settings, versions), "counts", "threshold" and "outputs" (sha256 of each file or
        folder).

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a value is wrong, a file is damaged or the folder is in use.
        torch.multiprocessing.ProcessException: one of several processes failed, or was killed.
    """
    return run_model(_work, settings, processes, overwrite)


def _work(
    settings: ExportSettings, cfg: CfgNode, images: Sequence[dict[str, Any]], output: OutputFolder
) -> None:
    _Run(settings, cfg, images, output).finish()


class _Run:
    def __init__(
        self,
        settings: ExportSettings,
        cfg: CfgNode,
        images: Sequence[dict[str, Any]],
        output: OutputFolder,
    ):
        self.settings = settings
        self.cfg = cfg
        self.blocks = ImageBlocks(images, settings.block_size)
        self.output = output
        self.shards = Shards(output.work / "shards", len(self.blocks))
        self.shards.folder.mkdir(exist_ok=True)
        ids, names = detector_classes(cfg, settings.model.dataset, settings.categories_of)
        self.writer = BlockWriter(self.shards, ids, names)
        self.formats = settings.make_formats()

    def finish(self) -> None:
        """Do what is not yet done; the last of it is rank 0's."""
        self._find()
        threshold = from_main(self._threshold() if comm.is_main_process() else None)
        self._write(threshold)
        comm.synchronize()
        if comm.is_main_process():
            self._put_together(threshold)

    def _find(self) -> None:
        own = own_missing(self.shards, FOUND)
        if own:
            layer = self.settings.layer if self.settings.needs_features else None
            model = ProposalModel(self.cfg, layer, self.settings.masks)
            mapper = GroundingMapper(self.cfg, is_train=False)
            workers = self.cfg.DATALOADER.NUM_WORKERS if self.cfg.MODEL.DEVICE != "cpu" else 0
            with progress("blocks, by the model", len(own)) as bar:
                for number, images in self.blocks.load(own, mapper, workers):
                    self.writer.find(
                        number, images, model, self.settings.mean_proposals is not None
                    )
                    bar.update()
        comm.synchronize()

    def _threshold(self) -> float | None:
        """The threshold that is still to be applied, or None."""
        if self.settings.mean_proposals is None:
            return None
        return threshold_for_mean(list(self.shards.paths(SCORES)), self.settings.mean_proposals)

    def _write(self, threshold: float | None) -> None:
        own = own_missing(self.shards, COUNTS)
        with progress("blocks, as files", len(own)) as bar:
            for number in own:
                self.writer.write(number, self.blocks[number], self.formats, threshold)
                bar.update()

    def _put_together(self, threshold: float | None) -> None:
        if threshold is None:
            threshold = self.cfg.MODEL.VLNMS.FINAL_SCORE_THRESH
        counts = sum_counts(self.shards.paths(COUNTS))
        per_query = counts["proposals"] / counts["queries"]
        outputs = {one.output: merge_format(one, self.shards, self.output) for one in self.formats}
        self.output.finish(
            {
                "counts": {
                    "images": len(self.blocks.images),
                    **counts,
                    "proposals_per_query": per_query,
                },
                "threshold": threshold,
                "outputs": outputs,
            }
        )
