"""The work of an export of pairs on one image, as each process does it, and putting it together."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Boxes, Instances

from ..export.pairs import PADDING, Pool
from ..export.records import npz_bytes
from ..file_io import atomic_write
from ..modeling.candidates import Candidates
from ..modeling.feature_extraction import PairScorer, box_features, in_image, look_at
from .shards import Shards

POOL, PAIRS = "pool", "pairs"


@dataclass(frozen=True)
class ScoredPool:
    """What is kept of an image for scoring pairs and for the final pool.

    Attributes:
        input_boxes: float32 [N, 4], xyxy in pixels of the network's input.
        boxes: float32 [N, 4], xyxy in pixels of the image; 0 where nothing is left of them.
        scores: float32 [N], class confidence c.
        classes: int64 [N].
        has_area: bool [N], whether anything is left of the box in the image.
        visual: float32 [N, D], for the relatedness module.
        features: float16 or float32 [N, E], of the layer that the pools have.
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
        save_arrays(path, {one.name: getattr(self, one.name) for one in fields(self)})

    @staticmethod
    def load(path: Path) -> ScoredPool:
        """What `save` wrote."""
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            return ScoredPool(**arrays)


def make_pool(model: GeneralizedRCNN, image_input: dict, layer: str, dtype: str) -> ScoredPool:
    """The candidates of an image.

    Args:
        model: see `vlnms_d2.modeling.feature_extraction.check_model`.
        image_input: with `image`, `height` and `width`.
        layer: of the pool's features; see `box_features`.
        dtype: of the pool's features, "float16" or "float32".
    """
    seen = look_at(model, image_input)
    found = seen.candidates
    instances = Instances(seen.image_size)
    instances.pred_boxes = Boxes(found.boxes)
    scaled, place = in_image(instances, seen.output_size)
    boxes = torch.zeros_like(found.boxes)
    boxes[place] = scaled.pred_boxes.tensor
    has_area = torch.zeros(len(found), dtype=torch.bool, device=place.device)
    has_area[place] = True
    visual = box_features(model.roi_heads, seen, "relatedness")
    features = visual
    if layer != "relatedness":
        features = box_features(model.roi_heads, seen, layer)
    columns = {
        "input_boxes": found.boxes,
        "boxes": boxes,
        "scores": found.scores,
        "classes": found.classes,
        "has_area": has_area,
        "visual": visual,
        "features": features.to(getattr(torch, dtype)),
    }
    return ScoredPool(
        **{name: tensor.cpu().numpy() for name, tensor in columns.items()},
        input_size=np.array(seen.image_size),
        image_size=np.array(seen.output_size),
    )


def choose(
    scorer: PairScorer, pool: ScoredPool, topk: int, with_scores: bool = False
) -> dict[str, np.ndarray]:
    """The chosen candidates of an image for all C captions.

    Args:
        scorer: of the captions.
        pool: of the image, of fewer than 65,535 candidates.
        topk: N, most proposals of a caption.
        with_scores: give s as well.

    Returns:
        "index", uint16 [C, N], by falling s and filled up with `PADDING`, and "scores", float16
        [C, N].
    """
    device = scorer.text.words.device
    nothing = torch.zeros(len(pool.scores), dtype=torch.int64)
    tensors = (pool.input_boxes, pool.scores, pool.classes)
    candidates = Candidates(*map(torch.from_numpy, tensors), nothing).to(device)
    size = tuple(pool.input_size.tolist())
    visual = torch.from_numpy(pool.visual).to(device)
    caption, candidate, score = (x.cpu() for x in scorer(candidates, size, visual))
    if not pool.has_area.all():
        kept = torch.from_numpy(pool.has_area)[candidate]
        caption, candidate, score = caption[kept], candidate[kept], score[kept]
    counts = torch.bincount(caption, minlength=len(scorer.text))
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
    """Make the files of all pools; returns (height, width) of each image."""
    if folder.is_dir():
        shutil.rmtree(folder)
    folder.mkdir()
    counts, sizes, dim, dtype = [], [], 0, np.dtype(np.float32)
    for pool in _pools(shards):
        counts.append(len(pool.scores))
        sizes.append(tuple(pool.image_size.tolist()))
        dim, dtype = pool.features.shape[1], pool.features.dtype
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    np.save(folder / "starts.npy", starts)
    total = int(starts[-1])
    shapes = Pool((total, 4), (total,), (total,), (total, dim))
    dtypes = Pool(np.float32, np.float32, np.int64, dtype)
    columns = [
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape)
        for name, dtype, shape in zip(Pool._fields, dtypes, shapes, strict=True)
    ]
    for number, pool in enumerate(_pools(shards)):
        for name, column in zip(Pool._fields, columns, strict=True):
            column[starts[number] : starts[number + 1]] = getattr(pool, name)
    for column in columns:
        column.flush()
    return sizes


def merge_rows(paths: Sequence[Path], key: str, path: Path) -> None:
    """Make one array of those of all images, [I, C, N]."""
    with np.load(paths[0]) as first:
        shape, dtype = first[key].shape, first[key].dtype
    rows = np.lib.format.open_memmap(path, "w+", dtype, (len(paths), *shape))
    for number, own in enumerate(paths):
        with np.load(own, allow_pickle=False) as arrays:
            rows[number] = arrays[key]
    rows.flush()


def _pools(shards: Shards) -> Iterator[ScoredPool]:
    return map(ScoredPool.load, shards.paths(POOL))
