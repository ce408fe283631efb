"""Recall of the referent by detector, Category and Portable, with error bars over photos."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.structures import Instances
from torchvision.ops import box_iou

from vlnms_d2.file_io import claim, refuse_foreign
from vlnms_d2.rerank import rerank

from .grammar import expressions
from .photos import Photo

TOPS = (1, 3, 5, 10)
IOU = 0.5
Query = tuple[int, str, list[float]]
Score = Callable[[Photo, list[str]], "str | np.ndarray | torch.Tensor"]


def template_queries(photos: Mapping[int, Photo], split: str, per_box: int = 3) -> list[Query]:
    """(image id, text, box) of the grammar's expressions over the photos of a split."""
    return [
        (e.image_id, e.query, photo.boxes[e.target].tolist())
        for photo in photos.values()
        if photo.split == split
        for e in expressions(photo, per_box, seed=1)
    ]


def read_queries(path: Path, photos: Mapping[int, Photo], blind: str = "") -> list[Query]:
    """(image id, text, box) of a file of JSON lines with "box" (xyxy) or "ann_id", and "blind" with
    this value."""
    queries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        photo = photos.get(record["image_id"])
        if photo is None or record.get("blind", "") != blind:
            continue
        box = record.get("box")
        if box is None:
            box = photo.boxes[int(np.flatnonzero(photo.ids == record["ann_id"])[0])].tolist()
        queries.append((photo.image_id, record["query"], box))
    return queries


def ranks(photos: Mapping[int, Photo], queries: Sequence[Query], method: str) -> np.ndarray:
    """For each query the place of the first proposal that hits its box, from 0; 10**6 for none."""
    result = np.full(len(queries), 10**6)
    for image_id in dict.fromkeys(query[0] for query in queries):
        rows = [i for i, query in enumerate(queries) if query[0] == image_id]
        kept = answer(photos[image_id], [queries[i][1] for i in rows], method)
        for i, instances in zip(rows, kept, strict=True):
            box = torch.tensor([queries[i][2]])
            hits = box_iou(instances.pred_boxes.tensor, box)[:, 0] > IOU
            if bool(hits.any()):
                result[i] = int(hits.nonzero()[0])
    return result


def recalls(found: np.ndarray) -> list[float]:
    """Recall in % at each of `TOPS`."""
    return [100 * float((found < top).mean()) for top in TOPS]


def bootstrap(found: np.ndarray, image_ids: np.ndarray, rounds: int = 1000) -> list[float]:
    """Standard errors of `recalls` over photos."""
    rng = np.random.default_rng(0)
    distinct, group = np.unique(image_ids, return_inverse=True)
    hits = np.stack([found < top for top in TOPS], axis=1)
    sums = np.zeros((len(distinct), len(TOPS)))
    np.add.at(sums, group, hits)
    counts = np.bincount(group, minlength=len(distinct))
    drawn = rng.integers(0, len(distinct), (rounds, len(distinct)))
    samples = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)[:, None]
    return (100 * samples.std(axis=0)).tolist()


def lost(found: np.ndarray, before: np.ndarray, top: int = 10) -> int:
    """How many referents `before` has among the first `top` and `found` has not."""
    return int(((before < top) & (found >= top)).sum())


METHODS: dict[str, Score] = {
    "detector alone": lambda photo, texts: np.ones((len(texts), len(photo.scores)), np.float32),
    "Category": lambda photo, texts: "Category",
    "Portable, no image": lambda photo, texts: "Portable",
    "Portable": lambda photo, texts: "Portable",
}


def answer(photo: Photo, texts: list[str], method: str) -> list[Instances]:
    """The best proposals of a photo by one of `METHODS`."""
    return rerank(
        photo.candidates,
        photo.scores,
        photo.candidate_classes,
        photo.names,
        texts,
        topk=max(TOPS),
        relatedness=METHODS[method](photo, texts),
        image_size=photo.size,
        image=photo.pixels() if method == "Portable" else None,
    )


def table(photos: Mapping[int, Photo], sets: Mapping[str, Sequence[Query]]) -> str:
    """Recall of the referent in % with standard errors, of all methods on all sets."""
    from tabulate import tabulate

    lines = []
    for name, queries in sets.items():
        image_ids = np.array([query[0] for query in queries])
        rows, alone = [], None
        for method in METHODS:
            found = ranks(photos, queries, method)
            alone = found if alone is None else alone
            errors = bootstrap(found, image_ids)
            cells = [f"{r:.1f} ± {e:.1f}" for r, e in zip(recalls(found), errors, strict=True)]
            rows.append([method, *cells, lost(found, alone)])
        headers = ["proposals of", *(f"N={top}" for top in TOPS), "lost at N=10"]
        title = f"{name}: {len(queries):,} expressions on {len(set(image_ids))} photos"
        lines += [title, tabulate(rows, headers=headers, tablefmt="pipe"), ""]
    return "\n".join(lines)


def draw(
    photos: Mapping[int, Photo], queries: Sequence[Query], out: Path, count: int
) -> tuple[int, int]:
    """Draw expressions for which Portable is better and worse than the detector alone.

    Returns:
        How many pictures of wins and of failures there are: out/win_*.jpg and out/failure_*.jpg.
    """
    import cv2

    from vlnms_d2.visualization import draw_comparison

    outputs = [out / f"{kind}_{n:02d}.jpg" for kind in ("win", "failure") for n in range(count)]
    refuse_foreign(*outputs)
    claim(*outputs)
    places = [ranks(photos, queries, method) for method in ("detector alone", "Portable")]
    gain = np.minimum(places[0], 100) - np.minimum(places[1], 100)
    order = np.argsort(-gain, kind="stable")
    wins = [i for i in order[:count] if gain[i] > 0]
    failures = [i for i in order[::-1] if gain[i] < 0 or places[1][i] > 0][:count]
    for kind, chosen in (("win", wins), ("failure", failures)):
        for number, i in enumerate(chosen):
            image_id, text, box = queries[i]
            photo = photos[image_id]
            alone, aware = (
                answer(photo, [text], method)[0][:5] for method in ("detector alone", "Portable")
            )
            alone.remove("relatedness")
            picture = draw_comparison(
                photo.pixels(), text, text.split(), None, alone, aware, photo.names, referent=box
            )
            cv2.imwrite(str(out / f"{kind}_{number:02d}.jpg"), picture)
    return len(wins), len(failures)
