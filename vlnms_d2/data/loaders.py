"""Data loaders: a training stream that continues exactly where it stopped, and a test loader
that shows each image twice, without and with its queries."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np
import torch
from detectron2.data import build_detection_test_loader
from detectron2.data.common import DatasetFromList
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler


class ShuffledStream(Dataset):
    """An endless shuffled stream over a data set, addressed by position.

    What stands at a position depends on the seed and the position alone: epoch `p // n` is one
    permutation, and the generators that the mapper draws from are seeded with the position. So a
    run that resumes at position p sees what an unbroken run sees, with any number of workers.

    Args:
        dataset_dicts: the n images.
        mapper: from a dataset dict to a model input; may draw from `random` and `numpy.random`.
        seed: of the permutations and of the mapper's draws.
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
    """The positions of this process's batches, from `start_iter` on, without end.

    Args:
        batch_size: images an iteration over all processes.

    Attributes:
        start_iter: the iteration to begin with; set before iterating.
    """

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
    """An endless loader whose `batch_sampler.start_iter` says where to begin.

    Args:
        dataset_dicts, mapper, seed: see `ShuffledStream`.
        batch_size: images an iteration over all processes.
        num_workers: worker processes; 0 reads in this one.
    """
    return DataLoader(
        ShuffledStream(dataset_dicts, mapper, seed),
        batch_sampler=ResumableBatches(batch_size),
        num_workers=num_workers,
        collate_fn=list,
        worker_init_fn=_one_thread,
        # Its own, since starting to iterate draws a number, and that in a resumed run's first
        # iteration only where the unbroken run draws none.
        generator=torch.Generator(),
    )


def _one_thread(worker_id: int) -> None:
    torch.set_num_threads(1)


def build_grounding_test_loader(
    dataset_dicts: list[dict], mapper: Callable[[dict], dict], *, num_workers: int
) -> DataLoader:
    """A loader of batches of two: one image without its queries, then the same with them.

    The evaluators so see the detector alone and the query-aware proposals of one run.

    Args:
        dataset_dicts: the images.
        mapper: from a dataset dict to a model input.
        num_workers: worker processes; 0 reads in this one.
    """
    return build_detection_test_loader(
        dataset=dataset_dicts,
        mapper=mapper,
        num_workers=num_workers,
        collate_fn=_without_and_with_queries,
    )


def _without_and_with_queries(batch: list[dict]) -> list[dict]:
    pairs = []
    for image_input in batch:
        alone = {k: v for k, v in image_input.items() if k not in ("query", "expressions")}
        pairs += [alone, image_input]
    return pairs
