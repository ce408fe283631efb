"""Similarities of all (image, caption) pairs of a `PairStore` by any model, and their retrieval."""

from __future__ import annotations

import json
import pickle
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

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

    The boxes depend on the caption, so `sim(features, captions)` is called for one caption at a
    time: features float32 [B, K, D] of the proposals that B images keep for it, in descending order
    of s, and a list of its text (C = 1); it returns float [B, C]. Fewer than K proposals are
    repeated from the first one, as in the files of `Scan`; if there are none, features are zeros.

    The same call resumes after interruption. Output of another store, of other arguments or of a
    `sim` that answers otherwise for the first images is rejected.

    Args:
        store: folder of a `PairStore`.
        sim: see above; or "module:name". For several processes it must be possible to pickle it.
        out: the output folder.
        encode_boxes: like `sim`; encodes boxes, float32 [M, D] as [M, E], each box of an image once
            and not once per caption, before `sim` gets them.
        num_boxes: K; None for all that the store has per pair.
        images_per_call: B, also of the last call, which repeats images. Memory holds their pools.
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
    processes = processes or Processes()
    given = (sim, encode_boxes, num_boxes, images_per_call, processes.device)
    _Scoring(partial(_Scorer, Path(store), *given), Path(out), processes).finish(overwrite)
    return np.load(Path(out) / SIMILARITIES, mmap_mode="r")


def pair_retrieval(store: PairStore, similarities: np.ndarray, **options: Any) -> dict[str, Any]:
    """Evaluate retrieval with the similarities float [I, C] of a store's images and captions.

    The options are those of `RetrievalEvaluator`, whose `results` are returned.
    """
    ids = [image.image_id for image in store.images]
    images: dict[int, Any] = {i: {"image_id": i, "expressions": []} for i in ids}
    for caption in store.captions:
        images[caption.image_id]["expressions"].append({"sent_id": caption.caption_id})
    evaluator = RetrievalEvaluator("pairs", list(images.values()), distributed=False, **options)
    for image, row in zip(images.values(), similarities, strict=True):
        evaluator.process([image], [{"similarities": np.array(row)}])
    evaluator.evaluate()
    return evaluator.results


class _Scoring(Job):
    outputs = (SIMILARITIES,)

    def __init__(self, make_scorer: Callable[..., _Scorer], out: Path, processes: Processes):
        self.make_scorer, self.scorer = make_scorer, make_scorer()
        self.inputs = list(self.scorer.folder.iterdir())
        self.shape = self.scorer.store.index.shape[:2]
        super().__init__(out, range(self.shape[0]), self.scorer.call_size, processes)

    def identity(self) -> dict[str, Any]:
        scorer = self.scorer
        first = scorer.compare(self._block(0).images, range(1))[:, 0]
        return {
            "store": json.loads((scorer.folder / "manifest.json").read_bytes())["outputs"],
            "sim": _name(scorer.sim),
            "encode_boxes": _name(scorer.encode_boxes),
            "num_boxes": scorer.num_boxes,
            "images_per_call": scorer.call_size,
            # A few digits, which do not depend on the machine.
            "first_answers": [f"{value:.3g}" for value in first[:3]],
            "versions": versions(),
        }

    def fill(self) -> None:
        make: tuple[Any, ...] = (partial(self.make_scorer, shards=self.shards),)
        if self.processes.count > 1:
            # Not by the pool, which would send each tensor of a model as an open file.
            make = (_unpickle, pickle.dumps(make[0]))
        with Workers(self.processes, *make) as workers:
            self.run(workers, "score", ROWS, f"blocks of {self.block_size} images")

    def merge(self) -> dict[str, Any]:
        rows = np.lib.format.open_memmap(self.work / SIMILARITIES, "w+", np.float32, self.shape)
        for number, path in enumerate(self.shards.paths(ROWS)):
            start = number * self.block_size
            rows[start : start + self.block_size] = np.load(path)
        rows.flush()
        counts = {"images": len(rows), "captions": rows.shape[1], "pairs": rows.size}
        return {"counts": counts, "outputs": {SIMILARITIES: self.publish(SIMILARITIES)}}


@dataclass
class _Scorer:
    """The store and the functions of a process; see `score_pairs`."""

    folder: Path
    sim: Any
    encode_boxes: Any
    num_boxes: int | None
    call_size: int
    device: str
    shards: Shards | None = None

    def __post_init__(self):
        self.store = PairStore(self.folder)
        self.sim, self.encode_boxes = (
            pkgutil.resolve_name(each) if isinstance(each, str) else each
            for each in (self.sim, self.encode_boxes)
        )
        most = self.store.index.shape[2]
        self.num_boxes = self.num_boxes or most
        if self.call_size < 1 or not 1 <= self.num_boxes <= most:
            raise ValueError(
                f"num_boxes is {self.num_boxes} and images_per_call {self.call_size}, expected at "
                f"least 1, and of the boxes at most the {most} per pair of {self.folder}"
            )

    def score(self, blocks: Sequence[Block]) -> None:
        """Write the similarities of the images of each block and all captions."""
        for number, images in blocks:
            rows = self.compare(images, range(len(self.store.captions)))
            with atomic_write(self.shards.path(number, ROWS)) as file:
                np.save(file, rows)

    @torch.no_grad()
    def compare(self, images: range, captions: range) -> np.ndarray:
        """The similarities float32 [I, C] of consecutive images and captions."""
        # Opened here, as all pages that were ever read of a mapped file count as memory.
        store = PairStore(self.folder)
        pools = [store.pool(image).features for image in images]
        starts = np.cumsum([0, *map(len, pools)])  # rows of `features`; the last is of no box
        no_box = np.zeros((1, pools[0].shape[1]), pools[0].dtype)
        features = torch.from_numpy(np.concatenate([*pools, no_box])).to(self.device).float()
        if self.encode_boxes is not None:
            features = self.encode_boxes(features)
        columns = []
        for caption in captions:
            kept = store.index[images.start : images.stop, caption, : self.num_boxes]  # [I, K]
            count = (kept != PADDING).sum(axis=1, keepdims=True)
            place = np.arange(self.num_boxes) % np.maximum(count, 1)
            rows = np.take_along_axis(kept, place, axis=1) + starts[:-1, None]
            rows = np.where(count > 0, rows, starts[-1])[np.arange(self.call_size) % len(images)]
            boxes = features[torch.from_numpy(rows).to(self.device)]  # [B, K, D]
            answer = self.sim(boxes, [store.captions[caption].caption])
            if tuple(answer.shape) != (self.call_size, 1):
                raise ValueError(
                    f"sim returned the shape {list(answer.shape)} for features {list(boxes.shape)} "
                    f"and one caption, expected [{self.call_size}, 1]"
                )
            columns.append(answer[: len(images)].float())
        return torch.cat(columns, dim=1).cpu().numpy()


def _unpickle(make_scorer: bytes) -> _Scorer:
    return pickle.loads(make_scorer)()


def _name(function: Any) -> str | None:
    return (
        None if function is None else getattr(function, "__qualname__", type(function).__qualname__)
    )
