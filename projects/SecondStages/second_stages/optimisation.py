"""The training loop that the reference second stages share."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

WARMUP_SHARE = 0.05


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train, by Adam with a cosine schedule.

    Attributes:
        epochs: over the images.
        images_per_batch: of an iteration.
        lr: the highest learning rate.
        weight_decay: of AdamW.
        clip: the gradient's norm is cut to this.
    """

    epochs: int
    images_per_batch: int
    lr: float
    weight_decay: float = 0.0
    clip: float = 2.0


def batches(count: int, size: int, generator: torch.Generator | None = None) -> Iterator[list[int]]:
    """The numbers below `count` in lists of `size` (the last may be shorter), shuffled where there
    is a generator."""
    order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
    yield from (part.tolist() for part in order.split(size))


def batches_of_groups(
    groups: Sequence[Sequence[int]], size: int, generator: torch.Generator
) -> list[list[int]]:
    """Batches of `size` within each group (its last may be smaller), everything shuffled."""
    found = [
        [group[k] for k in part]
        for group in groups
        for part in batches(len(group), size, generator)
    ]
    if len(groups) == 1:
        return found  # in random order as they are
    return [found[k] for k in torch.randperm(len(found), generator=generator).tolist()]


def optimise(
    model: nn.Module,
    loss: Callable[[list[int], float], Tensor],
    groups: Sequence[Sequence[int]],
    schedule: Schedule,
    seed: int,
) -> None:
    """Train a model, in place; leaves it in eval mode.

    Args:
        model: with the parameters to train.
        loss: of the images of a batch, given by their numbers and by the share of the training
            that is done, from 0 to 1.
        groups: of the numbers of the images; a batch has images of one group.
        schedule: see there.
        seed: of the order of the images.
    """
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=schedule.lr, weight_decay=schedule.weight_decay
    )
    per_epoch = sum(math.ceil(len(group) / schedule.images_per_batch) for group in groups)
    total = per_epoch * schedule.epochs
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _share_of_lr(step, total))
    generator = torch.Generator().manual_seed(seed)
    model.train()
    step = 0
    for epoch in range(schedule.epochs):
        started, sum_of_losses = time.perf_counter(), 0.0
        for index in batches_of_groups(groups, schedule.images_per_batch, generator):
            optimiser.zero_grad()
            value = loss(index, step / total)
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), schedule.clip)
            optimiser.step()
            scheduler.step()
            step += 1
            sum_of_losses += value.item()
        seconds = time.perf_counter() - started
        logger.info(
            "epoch %d of %d: loss %.4f, %.1f s",
            epoch + 1,
            schedule.epochs,
            sum_of_losses / per_epoch,
            seconds,
        )
    model.eval()


def _share_of_lr(step: int, total: int) -> float:
    warmup = max(1, int(WARMUP_SHARE * total))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
