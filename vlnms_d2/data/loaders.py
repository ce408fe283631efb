"""The training loader, which resumes exactly where it stopped."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np
import torch
from detectron2.data.common import DatasetFromList
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler


class ShuffledStream(Dataset):
    """An infinite shuffled stream over a data set, indexed by position.

    The item at a position depends only on the seed and the position: epoch `p // n` is one
    permutation of the n images, and the generators that the mapper may draw from (`random`,
    `numpy.random`) are seeded with the position. So a run that resumes at position p gets the
    items of an uninterrupted run, with any number of workers.
    """

    def __init__(self, dataset_dicts: list[dict], mapper: Callable[[dict], dict], seed: int):
        if not len(dataset_dicts):
            raise ValueError("DATASETS.TRAIN has no image with annotations or expressions")
        self.dataset = DatasetFromList(dataset_dicts, copy=False)
        self.mapper = mapper
        self.seed = seed

    def __getitem__(self, position: int) -> dict:
        epoch, place = divmod(position, len(self.dataset))
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))
        draws = np.random.default_rng([self.seed, epoch, place])
        np.random.seed(draws.integers(2**32))
        random.seed(int(draws.integers(2**32)))
        return self.mapper(self.dataset[int(order[place])])


class ResumableBatches(Sampler):
    """An infinite sampler of the positions of this process's batches, of `batch_size` images over
    all processes, from the iteration `start_iter` on (set it before iterating)."""

    def __init__(self, batch_size: int):
        world = comm.get_world_size()
        if batch_size % world:
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH is {batch_size}, not a multiple of the {world} processes"
            )
        self.batch_size = batch_size
        self.start_iter = 0

    def __iter__(self) -> Iterator[list[int]]:
        iteration = self.start_iter
        rank, world = comm.get_rank(), comm.get_world_size()
        while True:
            first = iteration * self.batch_size
            yield list(range(first + rank, first + self.batch_size, world))
            iteration += 1


def build_train_loader(
    dataset_dicts: list[dict],
    mapper: Callable[[dict], dict],
    *,
    batch_size: int,
    seed: int,
    num_workers: int,
) -> DataLoader:
    """An infinite loader that starts at the iteration `batch_sampler.start_iter`.

    Args:
        dataset_dicts, mapper, seed: see `ShuffledStream`.
        batch_size: images per iteration over all processes.
        num_workers: worker processes; 0 reads in this one.
    """
    return DataLoader(
        ShuffledStream(dataset_dicts, mapper, seed),
        batch_sampler=ResumableBatches(batch_size),
        num_workers=num_workers,
        collate_fn=list,
        worker_init_fn=_one_thread,
        # Starting to iterate draws a number; from the global generator, a resumed run would draw it
        # in an iteration where an uninterrupted run draws none.
        generator=torch.Generator(),
    )


def _one_thread(worker_id: int) -> None:
    torch.set_num_threads(1)
