"""The training loop of the reference second stages."""

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
    """The training schedule, for AdamW with a cosine decay.

    Attributes:
        epochs: passes over the images.
        images_per_batch: images per iteration.
        lr: maximum learning rate.
        weight_decay: of AdamW.
        clip: maximum norm of the gradient.
    """

    epochs: int
    images_per_batch: int
    lr: float
    weight_decay: float = 0.0
    clip: float = 2.0


def batches(count: int, size: int, generator: torch.Generator | None = None) -> Iterator[list[int]]:
    """The numbers below `count` in lists of `size` (the last may be shorter), shuffled if a
    generator is given."""
    order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
    yield from (part.tolist() for part in order.split(size))


def batches_of_groups(
    groups: Sequence[Sequence[int]], size: int, generator: torch.Generator
) -> list[list[int]]:
    """Shuffled batches of `size` within each group (the last of a group may be smaller)."""
    batches_in_order = [
        [group[k] for k in part]
        for group in groups
        for part in batches(len(group), size, generator)
    ]
    if len(groups) == 1:
        return batches_in_order  # already in random order
    order = torch.randperm(len(batches_in_order), generator=generator).tolist()
    return [batches_in_order[k] for k in order]


def optimise(
    model: nn.Module,
    loss: Callable[[list[int], float], Tensor],
    groups: Sequence[Sequence[int]],
    schedule: Schedule,
    seed: int,
) -> None:
    """Train a model in place and leave it in eval mode.

    Args:
        model: the model to train.
        loss: the loss of a batch, given the numbers of its images and the progress of the training
            from 0 to 1.
        groups: numbers of the images in groups; a batch has images of one group.
        schedule: see `Schedule`.
        seed: seed of the order of the images.
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
