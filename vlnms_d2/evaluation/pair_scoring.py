"""Similarities of all (image, caption) pairs of a `PairStore` by any model, and their retrieval."""

from __future__ import annotations

import json
import pickle
import pkgutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..export.job import Block, Job, Shards, versions
from ..export.pair_store import PADDING, PairStore
from ..export.workers import Processes, Workers
from ..file_io import atomic_write
from .retrieval import RetrievalEvaluator

SIMILARITIES, ROWS = "similarities.npy", "rows"


def score_pairs(
    store: str | Path,
    sim: Callable[[Tensor, list[str]], Tensor] | str,
    out: str | Path,
    *,
    encode_boxes: Callable[[Tensor], Tensor] | str | None = None,
    num_boxes: int | None = None,
    images_per_call: int = 32,
    processes: Processes | None = None,
    overwrite: bool = False,
) -> np.ndarray:
    """Compare every image of a store with every caption, each pair by the boxes that it keeps.

    The boxes depend on the caption, so each call `sim(features, captions)` is for one caption:
    features, float32 [B, K, D], are those of the proposals that B images keep for it, in descending
    order of s; captions is a list of its text, so C = 1; it returns float [B, C]. Fewer than K
    proposals are repeated from the first one, as in the files of `Scan`; if there are none,
    features are zeros. B is always `images_per_call`: the last images are repeated.

    The same call resumes after interruption. The manifest in `out` has the arguments, the sha256 of
    the store's files and the answers of `sim` to the first images: if they differ, `out` is
    rejected with the difference.

    Args:
        store: folder of a `PairStore`.
        sim: see above. With several processes it is pickled (a function of a module, a model), or
            "module:name", which each process imports.
        out: the output folder.
        encode_boxes: like `sim`; encodes features of boxes, float32 [M, D], as float [M, E], which
            `sim` gets in place of D. For models that encode boxes one by one, as SCAN: each box of
            an image is encoded once, not once per caption.
        num_boxes: K; None for all that the store has per pair.
        images_per_call: B. Memory holds the pools of this many images per process.
        processes: that share the work, with features on their device; None is this one, on the CPU.
        overwrite: replace the output of other input or arguments.

    Returns:
        float32 [I, C] of all images and captions, memory-mapped from `{out}/similarities.npy`.

    Raises:
        FileNotFoundError: there is no finished store in the folder.
        ValueError: an argument is impossible, `sim` returns another shape, or the output folder has
            other output or is in use.
        RuntimeError: a process was killed.
    """
    most = PairStore(store).index.shape[2]
    if images_per_call < 1 or not 1 <= (num_boxes or most) <= most:
        raise ValueError(
            f"num_boxes is {num_boxes} and images_per_call {images_per_call}, expected at least 1, "
            f"and of the boxes at most the {most} per pair of {store}"
        )
    settings = _Settings(Path(store), sim, encode_boxes, num_boxes or most, images_per_call)
    job = _Scoring(settings, Path(out), processes or Processes())
    job.finish(overwrite)
    return np.load(job.output.out / SIMILARITIES, mmap_mode="r")


def pair_retrieval(store: PairStore, similarities: np.ndarray, **options: Any) -> dict[str, Any]:
    """Evaluate retrieval with the similarities float [I, C] of a store's images and captions.

    The options are those of `RetrievalEvaluator`, whose `results` are returned.
    """
    images = {
        each.image_id: {"image_id": each.image_id, "expressions": []} for each in store.images
    }
    for caption in store.captions:
        images[caption.image_id]["expressions"].append({"sent_id": caption.caption_id})
    evaluator = RetrievalEvaluator("pairs", list(images.values()), distributed=False, **options)
    for image, row in zip(images.values(), similarities, strict=True):
        evaluator.process([image], [{"similarities": np.array(row)}])
    evaluator.evaluate()
    return evaluator.results


class _Settings(NamedTuple):
    folder: Path
    sim: Any
    encode_boxes: Any
    num_boxes: int
    images_per_call: int


class _Scoring(Job):
    outputs = (SIMILARITIES,)

    def __init__(self, settings: _Settings, out: Path, processes: Processes):
        self.settings, self.inputs = settings, [settings.folder]
        self.shape = PairStore(settings.folder).index.shape[:2]
        super().__init__(out, range(self.shape[0]), settings.images_per_call, processes)

    def identity(self) -> dict[str, Any]:
        scorer = _Scorer(self.settings, self.shards, self.processes.device)
        first = scorer.compare(self._block(0).images, range(1))[:, 0]
        folder, sim, encode_boxes, num_boxes, images_per_call = self.settings
        return {
            "store": json.loads((folder / "manifest.json").read_bytes())["outputs"],
            "sim": _name(sim),
            "encode_boxes": _name(encode_boxes),
            "num_boxes": num_boxes,
            "images_per_call": images_per_call,
            "first_answers": [f"{value:.4g}" for value in first],
            "versions": versions(),
        }

    def fill(self) -> None:
        settings = self.settings
        if self.processes.count > 1:
            # Not by the pool, which would send each tensor of a model as an open file.
            settings = pickle.dumps(settings)
        arguments = (settings, self.shards, self.processes.device)
        with Workers(self.processes, _Scorer, *arguments) as workers:
            self.run(workers, "score", ROWS, f"blocks of {self.block_size} images")

    def merge(self) -> dict[str, Any]:
        rows = np.lib.format.open_memmap(self.work / SIMILARITIES, "w+", np.float32, self.shape)
        for number, path in enumerate(self.shards.paths(ROWS)):
            images = self._block(number).images
            rows[images.start : images.stop] = np.load(path)
        rows.flush()
        counts = {"images": len(rows), "captions": rows.shape[1], "pairs": rows.size}
        return {"counts": counts, "outputs": {SIMILARITIES: self.publish(SIMILARITIES)}}


class _Scorer:
    """The store and the functions of a process."""

    def __init__(self, settings: _Settings | bytes, shards: Shards, device: str):
        self.settings = pickle.loads(settings) if isinstance(settings, bytes) else settings
        self.store, self.shards, self.device = PairStore(self.settings.folder), shards, device
        self.sim, self.encode_boxes = map(_resolve, (self.settings.sim, self.settings.encode_boxes))

    def score(self, blocks: Sequence[Block]) -> None:
        """Write the similarities of the images of each block and all captions."""
        for number, images in blocks:
            rows = self.compare(images, range(len(self.store.captions)))
            with atomic_write(self.shards.path(number, ROWS)) as file:
                np.save(file, rows)

    @torch.no_grad()
    def compare(self, images: range, captions: range) -> np.ndarray:
        """The similarities float32 [I, C] of consecutive images and captions."""
        num_boxes, call_size = self.settings.num_boxes, self.settings.images_per_call
        pools = [self.store.pool(image).features for image in images]
        starts = np.cumsum([0, *map(len, pools)])  # rows of `features`
        no_box = np.zeros((1, pools[0].shape[1]), pools[0].dtype)  # its row is starts[-1]
        features = torch.from_numpy(np.concatenate([*pools, no_box])).to(self.device).float()
        if self.encode_boxes is not None:
            features = self.encode_boxes(features)
        columns = []
        for caption in captions:
            kept = self.store.index[images.start : images.stop, caption, :num_boxes]  # [I, K]
            count = (kept != PADDING).sum(axis=1, keepdims=True)
            place = np.arange(num_boxes) % np.maximum(count, 1)
            rows = np.take_along_axis(kept, place, axis=1) + starts[:-1, None]
            rows = np.where(count > 0, rows, starts[-1])[np.arange(call_size) % len(images)]
            boxes = features[torch.from_numpy(rows).to(self.device)]  # [B, K, D]
            answer = self.sim(boxes, [self.store.captions[caption].caption])
            if tuple(answer.shape) != (call_size, 1):
                raise ValueError(
                    f"sim returned the shape {list(answer.shape)} for features {list(boxes.shape)} "
                    f"and one caption, expected [{call_size}, 1]"
                )
            columns.append(answer[: len(images)].float())
        return torch.cat(columns, dim=1).cpu().numpy()


def _resolve(function: Any) -> Any:
    return pkgutil.resolve_name(function) if isinstance(function, str) else function


def _name(function: Any) -> str | None:
    if function is None or isinstance(function, str):
        return function
    return getattr(function, "__qualname__", type(function).__qualname__)
