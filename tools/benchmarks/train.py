"""Expressions per second in training, with one forward pass per image or per expression."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Boxes, Instances

from .base import Benchmark, Options, show_machine, time_interleaved
from .detector import CONFIG, IMAGE_SIZE, Pair, build_pair, made_up_queries

EXPRESSIONS = 7  # per image, about the mean of RefCOCO


class Train(Benchmark):
    """Forward, backward and one step of Adam for the expressions of an image; frozen detector."""

    def measure(self, options: Options) -> dict[str, Any]:
        """See `Benchmark.measure`; both sides end with one step of the optimizer."""
        cfg = options.load_config(CONFIG, ["MODEL.MASK_ON", "False"])
        pair = build_pair(cfg, options.candidates)
        rows = []
        for count in options.queries or (EXPRESSIONS,):
            sides = _sides(pair, count)
            seconds = time_interleaved(sides, options.rounds, options.torch_device)
            shared, single = (count / seconds[name] for name in ("shared", "single"))
            rows.append(
                {
                    "expressions": count,
                    "shared_per_second": round(shared, 3),
                    "single_per_second": round(single, 3),
                    "ratio": round(shared / single, 3),
                }
            )
        return options.timed(rows=rows)

    def show(self, results: dict[str, Any]) -> str:
        """See `Benchmark.show`."""
        lines = [
            f"{row['expressions']} expressions of an image: {row['shared_per_second']:.2f} a "
            f"second with one forward, {row['single_per_second']:.2f} with one each, ratio "
            f"{row['ratio']:.2f}"
            for row in results["rows"]
        ]
        return "\n".join([*lines, show_machine(results)])


def _sides(pair: Pair, count: int) -> dict[str, Callable[[], None]]:
    model = pair.vlnms.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    queries = made_up_queries(count)
    together = [{"query": queries, "query_targets": [_target(i) for i in range(count)]}]
    single = [{"query": [q], "query_targets": [_target(i)]} for i, q in enumerate(queries)]
    parts = {"shared": together, "single": single}
    return {
        name: partial(_step, model, optimizer, [pair.image_input | one for one in inputs])
        for name, inputs in parts.items()
    }


def _step(model: GeneralizedRCNN, optimizer: torch.optim.Optimizer, inputs: list[dict]) -> None:
    """A forward and backward pass for each input, then one step."""
    optimizer.zero_grad()
    for one in inputs:
        sum(model([one]).values()).backward()
    optimizer.step()


def _target(number: int) -> Instances:
    """Two foreground boxes that depend on the query."""
    target = Instances(IMAGE_SIZE)
    corners = torch.tensor([[20.0, 20, 250, 250], [300, 200, 560, 430]])
    target.gt_boxes = Boxes(corners + 3 * number)
    return target
