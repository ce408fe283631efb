"""Proposals of all (image, caption) pairs of a data set, for retrieval.

Image by image: first its pool of candidates, by the detector, then the chosen ones for all
captions at once. The captions are encoded once a process. A run that was killed goes on with the
images that are missing, and what is written does not depend on how many processes there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils import comm

from ..data import GroundingMapper
from ..export.pairs import (
    CAPTIONS,
    IMAGES,
    INDEX,
    PADDING,
    POOLS,
    SCORES,
    PairCaption,
    PairImage,
)
from ..file_io import write_json
from ..modeling.feature_extraction import LAYERS, PairScorer, check_model, encode_captions
from .export_blocks import ImageBlocks
from .model_run import run_model
from .model_settings import ModelSettings
from .pair_blocks import (
    PAIRS,
    POOL,
    ScoredPool,
    choose,
    make_pool,
    merge_pools,
    merge_rows,
    save_arrays,
)
from .predictor import VLNMSPredictor
from .processes import Processes, own_missing
from .resumable import OutputFolder, sha256_of
from .shards import Shards, progress

DTYPES = ("float32", "float16")


@dataclass(frozen=True)
class PairSettings:
    """What an export of pairs makes of what.

    Attributes:
        model: see there; every expression of the data set is a caption for every image.
        out: folder for the output, which all machines see.
        top_n: most proposals of a pair. The threshold of the config does not apply.
        layer: of the pools' features; see `box_features`.
        dtype: of the pools' features, one of `DTYPES`.
        with_scores: write s of the proposals as well.

    Raises:
        ValueError: a value that cannot be.
    """

    model: ModelSettings
    out: Path
    top_n: int = 10
    layer: str = "detector"
    dtype: str = "float32"
    with_scores: bool = False

    def __post_init__(self):
        if self.top_n < 1:
            raise ValueError(f"top_n is {self.top_n}, expected at least 1")
        if self.layer not in LAYERS:
            raise ValueError(f"features are {self.layer!r}, expected {' or '.join(LAYERS)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}, expected {' or '.join(DTYPES)}")

    def config(self, device: str) -> CfgNode:
        """The model's config with the cut."""
        cfg = self.model.config(device)
        if cfg.MODEL.VLNMS.MAX_CANDIDATES >= PADDING:
            raise ValueError(
                f"MODEL.VLNMS.MAX_CANDIDATES is {cfg.MODEL.VLNMS.MAX_CANDIDATES}, expected fewer "
                f"than {PADDING:,}: pairs keep their numbers in two bytes"
            )
        cfg.TEST.DETECTIONS_PER_IMAGE = self.top_n
        cfg.MODEL.VLNMS.FINAL_SCORE_THRESH = 0.0
        return cfg

    @property
    def identity(self) -> dict[str, Any]:
        """Of the settings, all that the output depends on and the config does not tell."""
        return {
            "dataset": self.model.dataset,
            "features": self.layer,
            "dtype": self.dtype,
            "with_scores": self.with_scores,
        }


def run_pairs(
    settings: PairSettings, processes: Processes | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Write the pools of all images and the chosen candidates of all pairs; skip what is there.

    `vlnms_d2.export.PairStore` reads them.

    Args:
        settings: see `PairSettings`.
        processes: that share the work; None is this one, on the CPU.
        overwrite: replace the output of a run of other input or settings.

    Returns:
        The manifest, as `manifest.json` has it: "identity" (sha256 of weights and vocabulary,
        config, settings, versions), "counts" and "outputs" (sha256 of each file or folder).

    Raises:
        As `vlnms_d2.engine.export_run.run_export`.
    """
    return run_model(_work, settings, processes, overwrite)


def _work(
    settings: PairSettings, cfg: CfgNode, images: Sequence[dict[str, Any]], output: OutputFolder
) -> None:
    _Run(settings, cfg, images, output).finish()


class _Run:
    def __init__(
        self,
        settings: PairSettings,
        cfg: CfgNode,
        images: Sequence[dict[str, Any]],
        output: OutputFolder,
    ):
        self.settings = settings
        self.cfg = cfg
        self.blocks = ImageBlocks(images, 1)
        self.captions = [
            PairCaption(e["sent_id"], e["query"], image["image_id"], e["split"])
            for image in images
            for e in image["expressions"]
        ]
        self.output = output
        self.shards = Shards(output.work / "shards", len(images))
        self.shards.folder.mkdir(exist_ok=True)

    def finish(self) -> None:
        """Do what is not yet done; the last of it is rank 0's."""
        without_pool = own_missing(self.shards, POOL)
        without_pairs = own_missing(self.shards, PAIRS)
        if without_pool or without_pairs:
            model = VLNMSPredictor(self.cfg).model
            check_model(model, str(self.settings.model.config_file))
            self._make_pools(model, without_pool)
        comm.synchronize()  # an image may change hands: who missed its pool need not ask it
        if without_pairs:
            self._choose(model, without_pairs)
        comm.synchronize()
        if comm.is_main_process():
            self._put_together()

    def _make_pools(self, model, numbers: Sequence[int]) -> None:
        mapper = GroundingMapper(self.cfg, is_train=False)
        workers = self.cfg.DATALOADER.NUM_WORKERS if self.cfg.MODEL.DEVICE != "cpu" else 0
        with progress("pools", len(numbers)) as bar:
            for number, images in self.blocks.load(numbers, mapper, workers):
                for _, image_input in images:
                    pool = make_pool(model, image_input, self.settings.layer, self.settings.dtype)
                    pool.save(self.shards.path(number, POOL))
                bar.update()

    def _choose(self, model, numbers: Sequence[int]) -> None:
        text = encode_captions(model.roi_heads, [one.caption for one in self.captions])
        scorer = PairScorer(model.roi_heads, text)
        with progress("images, all captions", len(numbers)) as bar:
            for number in numbers:
                pool = ScoredPool.load(self.shards.path(number, POOL))
                found = choose(scorer, pool, self.settings.top_n, self.settings.with_scores)
                save_arrays(self.shards.path(number, PAIRS), found)
                bar.update()

    def _put_together(self) -> None:
        work = self.output.work
        sizes = merge_pools(self.shards, work / POOLS)
        images = [
            PairImage(image["image_id"], Path(image["file_name"]).name, *size)
            for image, size in zip(self.blocks.images, sizes, strict=True)
        ]
        write_json(work / IMAGES, [asdict(one) for one in images])
        write_json(work / CAPTIONS, [asdict(one) for one in self.captions])
        files = {INDEX: "index"} | ({SCORES: "scores"} if self.settings.with_scores else {})
        for name, key in files.items():
            merge_rows(list(self.shards.paths(PAIRS)), key, work / name)
        outputs = {}
        for name in (POOLS, IMAGES, CAPTIONS, *files):
            outputs[name] = sha256_of(work / name, "*")
            self.output.publish(name)
        counts = {
            "images": len(images),
            "captions": len(self.captions),
            "pairs": len(images) * len(self.captions),
        }
        self.output.finish({"counts": counts, "outputs": outputs})
