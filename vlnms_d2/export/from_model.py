"""Export the proposals of a model for all queries of a data set.

Two passes over the blocks: the model leaves the proposals of each block, then they are cut and
written in all formats. Memory holds the annotations of the data set, but proposals of one image at
a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode

from ..file_io import atomic_write, write_json
from ..modeling.feature_extraction import LAYERS
from . import FEATURE_FORMATS, FORMATS, check_formats
from .base import ProposalFormat, QueryProposals, read_records, write_record
from .feature_formats import DDPN, BottomUp, Imram, Scan
from .job import Block, Job, Shards, sha256_of
from .model import ModelSettings, detector_classes, model_identity, read_images
from .proposals import ImageProposals, ProposalModel
from .threshold import check_cut, save_scores, threshold_for_mean
from .workers import Processes, Workers

PROPOSALS, SCORES, COUNTS = "proposals", "scores", "counts"
MASK_FORMATS = ("jsonl", "coco")


@dataclass(frozen=True)
class ExportSettings:
    """What is exported.

    Attributes:
        model: the model and the data sets.
        out: the output folder, which all machines can read and write.
        formats: names in `vlnms_d2.export.FORMATS` and `FEATURE_FORMATS`.
        top_n: proposals kept per query. At most one of this and the next two is given; without
            any, the config decides (TEST.DETECTIONS_PER_IMAGE, MODEL.VLNMS.FINAL_SCORE_THRESH).
        score_thresh: of the proposals that the config leaves, keep those with s above this, and
            the best one.
        mean_proposals: like `score_thresh`, with the threshold at which the mean number per query
            (of queries with proposals) is closest to this; of several data sets in the first, and
            the others are cut at the same threshold.
        layer: of the box features, for formats that need them; see `box_features`.
        masks: add masks, in `MASK_FORMATS`.
        categories_of: see `detector_classes`.
        block_size: images per block, which is what an interruption loses at most.
        matt_dets: model, id, data set and splitBy, of which the Ref-NMS forks make the name of the
            file of per-expression; None for our name.
        ddpn_names, ddpn_annotations: see `DDPN`.
        tsv_columns, tsv_boxes, tsv_per_query: see `BottomUp`.
        allow_test_split: in scan and imram; see `Scan`.

    Raises:
        ValueError: a value is impossible, or several exclude each other.
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
    matt_dets: tuple[str, str, str, str] | None = None
    ddpn_names: str = "auto"
    ddpn_annotations: tuple[Path, ...] = ()
    tsv_columns: str = "bottom-up"
    tsv_boxes: tuple[int, int] = (10, 100)
    tsv_per_query: bool = False
    allow_test_split: bool = False

    def __post_init__(self):
        check_cut(self.top_n, self.score_thresh, self.mean_proposals)
        check_formats(self.formats, (*FORMATS, *FEATURE_FORMATS))
        if self.layer not in LAYERS:
            raise ValueError(f"features are {self.layer!r}, expected {' or '.join(LAYERS)}")
        if self.masks and not set(self.formats) & set(MASK_FORMATS):
            raise ValueError(
                f"masks are asked for, but only {' and '.join(MASK_FORMATS)} have a place for them"
            )
        for name in ("scan", "imram"):
            if name in self.formats and self.top_n is None:
                raise ValueError(f"{name} has the same number of boxes per caption: give top_n")
        if self.matt_dets is not None and "per-expression" not in self.formats:
            raise ValueError("matt_dets names the file of per-expression: add that format")
        if any(not part or "/" in part for part in self.matt_dets or ()):
            raise ValueError(f"matt_dets is {self.matt_dets}, expected parts of a file name")
        if self.block_size < 1:
            raise ValueError(f"block_size is {self.block_size}, expected at least 1")

    @property
    def feature_layer(self) -> str | None:
        """The layer, if a format needs features."""
        return self.layer if any(name in FEATURE_FORMATS for name in self.formats) else None

    def config(self, device: str) -> CfgNode:
        """The config with which `VLNMSPredictor` gives the exported proposals."""
        cfg = self.model.config(device)
        if self.top_n is not None:
            cfg.TEST.DETECTIONS_PER_IMAGE = self.top_n
            cfg.MODEL.VLNMS.FINAL_SCORE_THRESH = 0.0
        if self.score_thresh is not None:
            cfg.MODEL.VLNMS.FINAL_SCORE_THRESH = self.score_thresh
        if "ddpn" in self.formats and cfg.TEST.DETECTIONS_PER_IMAGE > DDPN.MAX_BOXES:
            raise ValueError(
                f"up to {cfg.TEST.DETECTIONS_PER_IMAGE} proposals are kept per query, but DDPN has "
                f"room for {DDPN.MAX_BOXES} boxes (its RPN_TOPN): give a top_n of at most that"
            )
        if self.mean_proposals is not None:
            cfg.MODEL.VLNMS.FINAL_SCORE_THRESH = -1.0  # cut when all scores are known
        if self.masks and not cfg.MODEL.MASK_ON:
            raise ValueError(
                f"{self.model.config_file}: masks are asked for, but MODEL.MASK_ON is False"
            )
        return cfg

    def make_formats(self) -> list[ProposalFormat]:
        """An object for each name."""
        known: dict[str, ProposalFormat] = {
            **FORMATS,
            "ddpn": DDPN(self.ddpn_names, self.ddpn_annotations),
            "bottom-up": BottomUp(self.tsv_columns, self.tsv_boxes, self.tsv_per_query),
            "scan": Scan(self.top_n, self.allow_test_split),
            "imram": Imram(self.top_n, self.allow_test_split),
        }
        if self.matt_dets is not None:
            known["per-expression"] = copy(known["per-expression"])
            known["per-expression"].output = f"matt_dets_{'_'.join(self.matt_dets)}_0.json"
        return [known[name] for name in self.formats]


def run_export(
    settings: ExportSettings, processes: Processes | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Answer all queries and write the output; whatever is finished already is kept.

    Args:
        settings: what is exported.
        processes: that share the work; None is this one, on the CPU.
        overwrite: replace the output of other input or settings.

    Returns:
        The content of `manifest.json`: "identity" (sha256 of weights and vocabulary, config,
        settings, versions), "counts", "threshold", "published" (names of the output files and
        folders) and "outputs" (their sha256).

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a value is wrong, a file is damaged or the folder is in use.
        RuntimeError: a process was killed.
    """
    return _ModelExport(settings, processes or Processes()).finish(overwrite)


class _ModelExport(Job):
    def __init__(self, settings: ExportSettings, processes: Processes):
        self.settings = settings
        self.cfg = settings.config(processes.device)
        images = settings.model.images()
        for each in settings.make_formats():
            each.check(images)
        super().__init__(settings.out, images, settings.block_size, processes)
        self.classes = detector_classes(self.cfg, settings.model.dataset, settings.categories_of)
        self.threshold = self.cfg.MODEL.VLNMS.FINAL_SCORE_THRESH

    def identity(self) -> dict[str, Any]:
        settings = {
            "dataset": " ".join(self.settings.model.datasets),
            "formats": list(self.settings.formats),
            "mean_proposals": self.settings.mean_proposals,
            "features": self.settings.feature_layer,
            "masks": self.settings.masks,
            "categories_of": self.settings.categories_of,
            "block_size": self.settings.block_size,
            "ddpn_names": self.settings.ddpn_names,
            "tsv": [
                self.settings.tsv_columns,
                self.settings.tsv_boxes,
                self.settings.tsv_per_query,
            ],
            "ddpn_annotations": [sha256_of(path) for path in self.settings.ddpn_annotations],
        }
        if self.settings.matt_dets is not None:
            settings["matt_dets"] = list(self.settings.matt_dets)
        return model_identity(self.cfg, self.images, settings)

    def fill(self) -> None:
        mean = self.settings.mean_proposals
        with Workers(self.processes, _Answerer, self.cfg, self.settings, self.shards) as workers:
            self.run(workers, "answer", PROPOSALS, "blocks, by the model")
        cut = None
        if mean is not None:
            self.threshold = cut = threshold_for_mean(list(self.shards.paths(SCORES)), mean)
        arguments = (self.shards, self.settings.make_formats(), *self.classes, cut)
        with Workers(self.processes, _Writer, *arguments) as workers:
            self.run(workers, "write", COUNTS, "blocks, as files")

    def merge(self) -> dict[str, Any]:
        counts = self.shards.sum_counts(COUNTS)
        per_query = counts["proposals"] / counts["queries"]
        return {
            "counts": {"images": len(self.images), **counts, "proposals_per_query": per_query},
            "threshold": self.threshold,
            "outputs": self.merge_formats(self.settings.make_formats()),
        }


class _Answerer:
    """The model of a process."""

    def __init__(self, cfg: CfgNode, settings: ExportSettings, shards: Shards):
        self.cfg, self.shards = cfg, shards
        self.with_scores = settings.mean_proposals is not None
        self.model = ProposalModel(cfg, settings.feature_layer, settings.masks)

    def answer(self, blocks: Sequence[Block]) -> None:
        """Write the proposals of each block, one record per image."""
        for number, images in read_images(self.cfg, blocks):
            scores: list[np.ndarray] = []
            with atomic_write(self.shards.path(number, PROPOSALS)) as file:
                for image, image_input in images:
                    proposals = self.model(image_input, image_input["query"])
                    of_first = islice(proposals.queries(), image.get("num_of_first"))
                    scores += [proposals.scores[query] for query in of_first]
                    write_record(file, {"image_id": image["image_id"]}, proposals.to_bytes())
                if self.with_scores:  # before the file that says that the block is finished
                    save_scores(self.shards.path(number, SCORES), scores)


class _Writer:
    """Cuts the proposals of blocks, and writes them in all formats."""

    def __init__(
        self,
        shards: Shards,
        formats: Sequence[ProposalFormat],
        category_ids: Sequence[int],
        category_names: Sequence[str],
        threshold: float | None,
    ):
        self.shards, self.formats, self.threshold = shards, formats, threshold
        self.category_ids = np.array(category_ids, dtype=np.int64)
        self.category_names = category_names

    def write(self, blocks: Sequence[Block]) -> None:
        """Write the shards of all formats of each block, and last the counts."""
        for block in blocks:
            self._write_block(block)

    def _write_block(self, block: Block) -> None:
        counts = dict.fromkeys(("queries", "queries_without_proposals", "proposals"), 0)
        records = read_records([self.shards.path(block.number, PROPOSALS)])
        with ExitStack() as stack:
            files = [
                stack.enter_context(atomic_write(self.shards.path(block.number, each.name)))
                for each in self.formats
            ]
            for image, (_, content) in zip(block.images, records, strict=True):
                proposals = list(self._of_queries(image, ImageProposals.from_bytes(content)))
                for each, file in zip(self.formats, files, strict=True):
                    each.write(proposals, file)
                counts["queries"] += len(proposals)
                counts["queries_without_proposals"] += sum(not len(query) for query in proposals)
                counts["proposals"] += sum(map(len, proposals))
        write_json(self.shards.path(block.number, COUNTS), counts)

    def _of_queries(
        self, image: dict[str, Any], proposals: ImageProposals
    ) -> Iterator[QueryProposals]:
        for expression, rows in zip(image["expressions"], proposals.queries(), strict=True):
            if self.threshold is not None:
                num_above = int((proposals.scores[rows] > self.threshold).sum())
                rows = slice(rows.start, min(rows.stop, rows.start + max(1, num_above)))
            corners, classes = proposals.corners[rows], proposals.classes[rows]
            masks = features = None
            if len(proposals.mask_of):
                masks = [proposals.mask(place) for place in range(rows.start, rows.stop)]
            if proposals.features.shape[1]:
                features = proposals.features[proposals.feature_of[rows]]
            height, width = proposals.image_size.tolist()
            yield QueryProposals(
                image_id=image["image_id"],
                query_id=expression["sent_id"],
                query=expression["query"],
                ref_id=expression["ref_id"],
                split=expression["split"],
                boxes=np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1),
                corners=corners,
                category_ids=self.category_ids[classes],
                category_names=[self.category_names[c] for c in classes.tolist()],
                scores=proposals.scores[rows],
                cls_scores=proposals.cls_scores[rows],
                relatedness=proposals.relatedness[rows],
                candidate_index=proposals.candidate_index[rows],
                image_size=(height, width),
                image_name=Path(image["file_name"]).name,
                features=features,
                masks=masks,
            )
