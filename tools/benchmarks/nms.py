"""NMS of many queries at once, compared with a loop over torchvision's NMS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from torchvision.ops import batched_nms

from vlnms_d2.layers import multi_query_nms

from .base import Benchmark, Options, show_machine, time_interleaved

QUERIES = (1, 10, 100, 1000)
IOU_THRESHOLD = 0.5
TOPK = 100
# A single NMS takes only 0.1 ms, so that it is repeated when there are few queries.
QUERIES_A_RUN = 100
IMAGE_SIZE = (800.0, 1000.0)
CLASSES = 80
OBJECTS, OBJECT_CLASSES = 15, 8
REFINED_BY = 3.0  # pixels, the standard deviation of the refinement of boxes by a query


class Nms(Benchmark):
    """`multi_query_nms` over a loop of `torchvision.ops.batched_nms`, both for the best 100."""

    def measure(self, options: Options) -> dict[str, Any]:
        """See `Benchmark.measure`; "rows" have the interleaved times of both sides in ms.

        Raises:
            RuntimeError: the two sides keep different boxes.
        """
        rows = [
            {"boxes": name, "own": own} | _measure_one(make, own, count, options)
            for name, make in (("scattered", scattered_boxes), ("clustered", clustered_boxes))
            for own in (False, True)
            for count in options.queries or QUERIES
        ]
        return options.timed(rows=rows)

    def show(self, results: dict[str, Any]) -> str:
        """See `Benchmark.show`."""
        keys = ("boxes", "own", "queries", "loop_ms", "at_once_ms", "times_faster")
        headers = ["boxes", "own", "queries", "loop (ms)", "at once (ms)", "times faster"]
        return (
            f"{results['candidates']} boxes, medians of {results['rounds']} rounds:\n"
            + tabulate(
                [[row[key] for key in keys] for row in results["rows"]],
                headers=headers,
                tablefmt="pipe",
                floatfmt=("", "", "", ".3f", ".3f", ".2f"),
            )
            + f"\n{show_machine(results)}"
        )


def _measure_one(
    make: Callable[[int, torch.Generator], tuple[Tensor, Tensor]],
    own: bool,
    num_queries: int,
    options: Options,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    boxes, classes = make(options.candidates, generator)
    if own:
        noise = torch.randn(num_queries, *boxes.shape, generator=generator)
        boxes = (boxes + REFINED_BY * noise).clamp(min=0)
    scores = torch.rand(num_queries, len(classes), generator=generator)
    boxes, scores, classes = (t.to(options.torch_device) for t in (boxes, scores, classes))

    def loop() -> list[Tensor]:
        return [
            batched_nms(boxes[query] if own else boxes, row, classes, IOU_THRESHOLD)[:TOPK]
            for query, row in enumerate(scores)
        ]

    def at_once() -> tuple[Tensor, Tensor]:
        return multi_query_nms(boxes, scores, classes, IOU_THRESHOLD, TOPK)

    for expected, row, count in zip(loop(), *at_once(), strict=True):
        if row[:count].tolist() != expected.tolist():
            raise RuntimeError("multi_query_nms and batched_nms keep different boxes")
    times = max(1, QUERIES_A_RUN // num_queries)
    sides = {"loop": _repeated(loop, times), "at_once": _repeated(at_once, times)}
    seconds = time_interleaved(sides, options.rounds, options.torch_device)
    return {
        "queries": num_queries,
        "loop_ms": round(1000 * seconds["loop"] / times, 4),
        "at_once_ms": round(1000 * seconds["at_once"] / times, 4),
        "times_faster": round(seconds["loop"] / seconds["at_once"], 3),
    }


def _repeated(run: Callable[[], object], times: int) -> Callable[[], None]:
    def run_repeatedly() -> None:
        for _ in range(times):
            run()

    return run_repeatedly


def scattered_boxes(num_boxes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Randomly placed boxes of `CLASSES` classes.

    Returns:
        float32 [N, 4], xyxy in pixels, and int64 [N], the classes.
    """
    center = _random_centers(num_boxes, generator)
    size = 20 + 150 * torch.rand(num_boxes, 2, generator=generator)
    return _xyxy(center, size), torch.randint(CLASSES, (num_boxes,), generator=generator)


def clustered_boxes(num_boxes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Boxes as a detector predicts them before NMS: many for each of `OBJECTS` objects of
    `OBJECT_CLASSES` classes. Returns the same as `scattered_boxes`."""
    which = torch.arange(num_boxes) * OBJECTS // max(1, num_boxes)
    center = _random_centers(OBJECTS, generator)[which]
    size = 50 + 150 * torch.rand(OBJECTS, 2, generator=generator)[which]
    classes = torch.randint(OBJECT_CLASSES, (OBJECTS,), generator=generator)[which]
    center = center + 0.1 * size * torch.randn(num_boxes, 2, generator=generator)
    size = size * torch.exp(0.15 * torch.randn(num_boxes, 2, generator=generator))
    return _xyxy(center, size), classes


def _random_centers(count: int, generator: torch.Generator) -> Tensor:
    height, width = IMAGE_SIZE
    return torch.rand(count, 2, generator=generator) * torch.tensor([width, height])


def _xyxy(center: Tensor, size: Tensor) -> Tensor:
    return torch.cat([center - size / 2, center + size / 2], dim=1).clamp(min=0)
