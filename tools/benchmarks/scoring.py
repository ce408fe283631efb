"""Time of each part of a forward pass with queries."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tabulate import tabulate

from vlnms_d2.modeling.postprocessing import QueryResult
from vlnms_d2.modeling.relatedness import box_locations

from .base import Benchmark, Options, show_machine, time_interleaved
from .detector import CONFIG, build_pair, made_up_queries

QUERIES = (1, 100, 1000)


class Scoring(Benchmark):
    """Time of each part of a forward pass with queries; masks off."""

    def measure(self, options: Options) -> dict[str, Any]:
        """See `Benchmark.measure`; "image" has the parts that do not depend on the queries, "rows"
        the others, in ms."""
        cfg = options.load_config(CONFIG, ["MODEL.MASK_ON", "False"])
        model = build_pair(cfg, options.candidates)
        image, rows = _parts(model.vlnms, model.image_input, options)
        return options.timed(relatedness=cfg.MODEL.VLNMS.RELATEDNESS, image=image, rows=rows)

    def show(self, results: dict[str, Any]) -> str:
        """See `Benchmark.show`."""
        style = {"tablefmt": "pipe", "floatfmt": ".2f"}
        return (
            f"{results['relatedness']}, {results['candidates']} candidates, medians of "
            f"{results['rounds']} rounds, ms:\n"
            + tabulate(results["image"].items(), headers=["once an image", "ms"], **style)
            + "\n\n"
            + tabulate(results["rows"], headers="keys", **style)
            + f"\n{show_machine(results)}"
        )


@torch.no_grad()
def _parts(
    model: torch.nn.Module, image_input: dict, options: Options
) -> tuple[dict[str, float], list[dict[str, float]]]:
    head = model.roi_heads
    images = model.preprocess_image([image_input])
    [size] = images.image_sizes
    maps = model.backbone(images.tensor)
    proposals, _ = model.proposal_generator(images, maps, None)
    predictions = head.predict(maps, proposals)
    [candidates] = head._select(predictions, [size], [0])
    head._pool(maps, predictions, [0], [candidates])
    [visual] = head.encode_candidates([candidates])
    image = {
        "backbone": lambda: model.backbone(images.tensor),
        "RPN": lambda: model.proposal_generator(images, maps, None),
        "the detector's head": lambda: head.predict(maps, proposals),
        "candidates": lambda: head._select(predictions, [size], [0]),
        "pooling them": lambda: head._pool(maps, predictions, [0], [candidates]),
        "encoding them": lambda: head.encode_candidates([candidates]),
    }
    rows = []
    for count in options.queries or QUERIES:
        queries = made_up_queries(count)
        [text] = head.vlnms.encode_queries([queries])
        locations = box_locations(candidates.boxes, size)
        related, _ = head.vlnms.score(visual, locations, text)
        post = partial(
            head.postprocessor, candidates.boxes, candidates.scores, related, candidates.classes
        )
        result = partial(_assemble, candidates, related, post(), size)
        parts = {
            "text": partial(head.vlnms.encode_queries, [queries]),
            "relatedness": partial(head.vlnms.score, visual, locations, text),
            "fusion and NMS": post,
            "Instances": result,
        }
        rows.append({"queries": count} | _milliseconds(parts, options))
    return _milliseconds(image, options), rows


def _assemble(candidates, related, selection, size) -> None:
    result = QueryResult(candidates, candidates.boxes, related, selection)
    result.per_query(result.distinct_instances(size))


def _milliseconds(parts: dict[str, Callable[[], object]], options: Options) -> dict[str, float]:
    parts = {name: torch.no_grad()(part) for name, part in parts.items()}
    seconds = time_interleaved(parts, options.rounds, options.torch_device)
    return {name: round(1000 * value, 3) for name, value in seconds.items()}
