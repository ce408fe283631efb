"""Export the proposals of all (image, caption) pairs of a data set, for retrieval.

Two passes over the images: first the pool of candidates of each image, by the detector, then those
that each caption keeps. The captions are encoded once per process.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Boxes, Instances

from ..engine.predictor import VLNMSPredictor
from ..file_io import atomic_write, write_json
from ..modeling.candidates import Candidates
from ..modeling.feature_extraction import (
    LAYERS,
    box_features,
    check_model,
    extract_features,
    to_output_size,
)
from ..modeling.roi_heads import QueryConditionedMixin
from ..modeling.text import TextFeatures
from .base import npz_bytes
from .job import Block, Job, Shards
from .model import ModelSettings, model_identity, read_images
from .pair_store import (
    CAPTIONS,
    IMAGES,
    INDEX,
    PADDING,
    POOLS,
    SCORES,
    PairCaption,
    PairImage,
    Pool,
)
from .workers import Processes, Workers

DTYPES = ("float32", "float16")
POOL, PAIRS = "pool", "pairs"
_ENCODE_CHUNK = 512
_SCORE_CHUNK = {False: 8192, True: 256}  # by whether boxes are refined per query


@dataclass(frozen=True)
class PairSettings:
    """What is exported.

    Attributes:
        model: the model and the data sets, whose expressions are each a caption for every image.
        out: the output folder, which all machines can read and write.
        top_n: maximum number of proposals per pair. The config's threshold does not apply.
        layer: of the pools' features; see `box_features`.
        dtype: of the pools' features, one of `DTYPES`.
        with_scores: also write s of the proposals.

    Raises:
        ValueError: an impossible value.
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
        """The config with which `VLNMSPredictor` gives the exported proposals."""
        cfg = self.model.config(device)
        if cfg.MODEL.VLNMS.MAX_CANDIDATES >= PADDING:
            raise ValueError(
                f"MODEL.VLNMS.MAX_CANDIDATES is {cfg.MODEL.VLNMS.MAX_CANDIDATES}, expected fewer "
                f"than {PADDING:,}: pairs keep their numbers in two bytes"
            )
        cfg.TEST.DETECTIONS_PER_IMAGE = self.top_n
        cfg.MODEL.VLNMS.FINAL_SCORE_THRESH = 0.0
        return cfg


def run_pairs(
    settings: PairSettings, processes: Processes | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Write the pools of all images and what each pair keeps of them, for
    `vlnms_d2.export.PairStore`; whatever is finished already is kept.

    Arguments, return value and errors as for `vlnms_d2.export.from_model.run_export`; the manifest
    has no "threshold".
    """
    return _PairExport(settings, processes or Processes()).finish(overwrite)


class _PairExport(Job):
    def __init__(self, settings: PairSettings, processes: Processes):
        self.settings = settings
        self.cfg = settings.config(processes.device)
        super().__init__(settings.out, settings.model.images(), 1, processes)
        self.outputs = (POOLS, IMAGES, CAPTIONS, INDEX, *([SCORES] if settings.with_scores else []))
        self.inputs = settings.model.files(self.cfg)
        self.captions = [
            PairCaption(e["sent_id"], e["query"], image["image_id"], e["split"])
            for image in self.images
            for e in image["expressions"]
        ]

    def identity(self) -> dict[str, Any]:
        settings = {
            "dataset": " ".join(self.settings.model.datasets),
            "features": self.settings.layer,
            "dtype": self.settings.dtype,
            "with_scores": self.settings.with_scores,
        }
        return model_identity(self.cfg, self.images, settings)

    def fill(self) -> None:
        captions = [each.caption for each in self.captions]
        arguments = (self.cfg, self.settings, self.shards, captions)
        with Workers(self.processes, _Answerer, *arguments) as workers:
            self.run(workers, "make_pools", POOL, "pools")
            self.run(workers, "choose", PAIRS, "images, all captions")

    def merge(self) -> dict[str, Any]:
        sizes = merge_pools(self.shards, self.work / POOLS)
        images = [
            PairImage(image["image_id"], Path(image["file_name"]).name, *size)
            for image, size in zip(self.images, sizes, strict=True)
        ]
        write_json(self.work / IMAGES, [asdict(image) for image in images])
        write_json(self.work / CAPTIONS, [asdict(caption) for caption in self.captions])
        arrays = {INDEX: "index"} | ({SCORES: "scores"} if self.settings.with_scores else {})
        for name, key in arrays.items():
            merge_rows(list(self.shards.paths(PAIRS)), key, self.work / name)
        counts = {
            "images": len(images),
            "captions": len(self.captions),
            "pairs": len(images) * len(self.captions),
        }
        names = (POOLS, IMAGES, CAPTIONS, *arrays)
        return {"counts": counts, "outputs": {name: self.publish(name) for name in names}}


class _Answerer:
    """The model of a process, with the encoded captions once they are needed."""

    def __init__(
        self, cfg: CfgNode, settings: PairSettings, shards: Shards, captions: Sequence[str]
    ):
        self.cfg, self.settings, self.shards, self.captions = cfg, settings, shards, captions
        self.model = VLNMSPredictor(self.cfg).model
        check_model(self.model, str(self.settings.model.config_file))

    @cached_property
    def text(self) -> TextFeatures:
        return encode_captions(self.model.roi_heads, self.captions)

    def make_pools(self, blocks: Sequence[Block]) -> None:
        """Write the pool of each image."""
        for number, images in read_images(self.cfg, blocks):
            for _, image_input in images:
                pool = make_pool(self.model, image_input, self.settings.layer, self.settings.dtype)
                pool.save(self.shards.path(number, POOL))

    def choose(self, blocks: Sequence[Block]) -> None:
        """Write what each caption keeps of the pool of each image."""
        for number, _ in blocks:
            pool = ScoredPool.load(self.shards.path(number, POOL))
            cut = (self.settings.top_n, self.settings.with_scores)
            chosen = choose(self.model.roi_heads, self.text, pool, *cut)
            save_arrays(self.shards.path(number, PAIRS), chosen)


@dataclass(frozen=True)
class ScoredPool:
    """The N candidates of an image: what scoring pairs and the final pool need.

    Attributes:
        input_boxes: float32 [N, 4], xyxy in pixels of the network's input.
        boxes: float32 [N, 4], xyxy in pixels of the image; 0 if the box has no area there.
        scores: float32 [N], class confidence c.
        classes: int64 [N].
        has_area: bool [N], whether the box has an area in the image.
        visual: float32 [N, D], input of the relatedness module.
        features: float16 or float32 [N, E], for the final pool.
        input_size, image_size: int64 [2], height and width in pixels.
    """

    input_boxes: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    has_area: np.ndarray
    visual: np.ndarray
    features: np.ndarray
    input_size: np.ndarray
    image_size: np.ndarray

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""
        save_arrays(path, {field.name: getattr(self, field.name) for field in fields(self)})

    @staticmethod
    def load(path: Path) -> ScoredPool:
        """Read what `save` wrote."""
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            return ScoredPool(**arrays)


def make_pool(model: GeneralizedRCNN, image_input: dict, layer: str, dtype: str) -> ScoredPool:
    """The candidates of an image, by a model that passed `check_model`; layer and dtype are of the
    pool's features, as in `PairSettings`."""
    image_features = extract_features(model, image_input)
    candidates = image_features.candidates
    instances = Instances(image_features.image_size)
    instances.pred_boxes = Boxes(candidates.boxes)
    scaled, place = to_output_size(instances, image_features.output_size)
    boxes = torch.zeros_like(candidates.boxes)
    boxes[place] = scaled.pred_boxes.tensor
    has_area = torch.zeros(len(candidates), dtype=torch.bool, device=place.device)
    has_area[place] = True
    visual = features = box_features(model.roi_heads, image_features, "relatedness")
    if layer != "relatedness":
        features = box_features(model.roi_heads, image_features, layer)
    columns = {
        "input_boxes": candidates.boxes,
        "boxes": boxes,
        "scores": candidates.scores,
        "classes": candidates.classes,
        "has_area": has_area,
        "visual": visual,
        "features": features.to(getattr(torch, dtype)),
    }
    return ScoredPool(
        **{name: tensor.cpu().numpy() for name, tensor in columns.items()},
        input_size=np.array(image_features.image_size),
        image_size=np.array(image_features.output_size),
    )


@torch.no_grad()
def encode_captions(head: QueryConditionedMixin, captions: Sequence[str]) -> TextFeatures:
    """Encode captions, at least one, in chunks; what does not depend on the image is computed here,
    once."""
    encoder, relatedness = head.vlnms.text_encoder, head.vlnms.relatedness
    with head.vlnms.autocast():
        return TextFeatures.cat(
            [
                relatedness.condense(encoder(list(captions[i : i + _ENCODE_CHUNK])))
                for i in range(0, len(captions), _ENCODE_CHUNK)
            ]
        )


@torch.no_grad()
def choose(
    head: QueryConditionedMixin,
    text: TextFeatures,
    pool: ScoredPool,
    topk: int,
    with_scores: bool = False,
) -> dict[str, np.ndarray]:
    """The candidates of an image that each of C captions keeps.

    Args:
        head: of the model.
        text: of the captions; see `encode_captions`.
        pool: of the image, with fewer than 65,535 candidates.
        topk: N, maximum number per caption.
        with_scores: also return s.

    Returns:
        "index", uint16 [C, N], in descending order of s and padded with `PADDING`, and "scores",
        float16 [C, N], padded with 0.
    """
    device = text.words.device
    not_pooled = torch.zeros(len(pool.scores), dtype=torch.int64)
    arrays = (pool.input_boxes, pool.scores, pool.classes)
    boxes, confidence, classes = map(torch.from_numpy, arrays)
    candidates = Candidates(boxes, confidence, classes, not_pooled).to(device)
    size = tuple(pool.input_size.tolist())
    visual = torch.from_numpy(pool.visual).to(device)
    step = _SCORE_CHUNK[head.vlnms.relatedness.refines]
    parts = []
    for start in range(0, len(text), step):
        result = head.score_image(candidates, size, visual, text[start : start + step])
        parts.append((start + result.query_index, result.candidate_index, result.scores))
    caption, candidate, score = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    if not pool.has_area.all():
        kept = torch.from_numpy(pool.has_area)[candidate]
        caption, candidate, score = caption[kept], candidate[kept], score[kept]
    counts = torch.bincount(caption, minlength=len(text))
    starts = counts.cumsum(0) - counts
    place = torch.arange(len(caption)) - starts[caption]
    cells = (caption.numpy(), place.numpy())
    index = np.full((len(counts), topk), PADDING, dtype=np.uint16)
    index[cells] = candidate.numpy().astype(np.uint16)
    if not with_scores:
        return {"index": index}
    scores = np.zeros(index.shape, dtype=np.float16)
    scores[cells] = score.numpy().astype(np.float16)
    return {"index": index, "scores": scores}


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an `.npz` file, whole or not at all."""
    with atomic_write(path) as file:
        file.write(npz_bytes(arrays))


def merge_pools(shards: Shards, folder: Path) -> list[tuple[int, int]]:
    """Write the pools of all images to the arrays of a folder; returns (height, width) of each
    image."""

    def pools() -> Iterator[ScoredPool]:
        return map(ScoredPool.load, shards.paths(POOL))

    if folder.is_dir():
        shutil.rmtree(folder)
    folder.mkdir()
    counts, sizes, dim, dtype = [], [], 0, np.dtype(np.float32)
    for pool in pools():
        counts.append(len(pool.scores))
        sizes.append(tuple(pool.image_size.tolist()))
        dim, dtype = pool.features.shape[1], pool.features.dtype
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    np.save(folder / "starts.npy", starts)
    total = int(starts[-1])
    shapes = ((total, 4), (total,), (total,), (total, dim))
    dtypes = (np.float32, np.float32, np.int64, dtype)
    columns = [
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape)
        for name, dtype, shape in zip(Pool._fields, dtypes, shapes, strict=True)
    ]
    for number, pool in enumerate(pools()):
        for name, column in zip(Pool._fields, columns, strict=True):
            column[starts[number] : starts[number + 1]] = getattr(pool, name)
    for column in columns:
        column.flush()
    return sizes


def merge_rows(paths: Sequence[Path], key: str, path: Path) -> None:
    """Stack an array of all images: [I, C, N]."""
    with np.load(paths[0]) as first:
        shape, dtype = first[key].shape, first[key].dtype
    rows = np.lib.format.open_memmap(path, "w+", dtype, (len(paths), *shape))
    for number, image_path in enumerate(paths):
        with np.load(image_path, allow_pickle=False) as arrays:
            rows[number] = arrays[key]
    rows.flush()
