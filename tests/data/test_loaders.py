"""The training stream resumes exactly where it stopped."""

import random
from itertools import islice

import numpy as np
import pytest
from detectron2.utils import comm

from vlnms_d2.data import build_train_loader
from vlnms_d2.data.loaders import ResumableBatches, ShuffledStream

IMAGES = [{"image_id": i} for i in range(7)]


def drawing_mapper(dataset_dict: dict) -> dict:
    """Adds what a mapper draws from the global generators."""
    return {**dataset_dict, "draws": (random.random(), float(np.random.rand()))}


def make_stream(seed: int = 0) -> ShuffledStream:
    return ShuffledStream(IMAGES, drawing_mapper, seed)


def make_loader(start_iter: int = 0, num_workers: int = 0, batch_size: int = 4):
    loader = build_train_loader(
        IMAGES, drawing_mapper, batch_size=batch_size, seed=3, num_workers=num_workers
    )
    loader.batch_sampler.start_iter = start_iter
    return loader


def batches(count: int, **options) -> list[list[dict]]:
    return list(islice(make_loader(**options), count))


# --- the stream --------------------------------------------------------------------------------


def test_a_position_gives_the_same_item_whatever_came_before():
    stream = make_stream()
    in_turn = [stream[p] for p in range(20)]
    np.random.seed(99)
    random.seed(99)
    assert [stream[p] for p in reversed(range(20))] == in_turn[::-1]
    assert make_stream()[13] == in_turn[13]


def test_every_epoch_is_a_permutation_and_they_differ():
    stream = make_stream()
    epochs = [
        tuple(stream[p]["image_id"] for p in range(first, first + 7)) for first in range(0, 70, 7)
    ]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) == 10


def test_draws_differ_by_position_and_by_seed():
    stream = make_stream()
    draws = [stream[p]["draws"] for p in range(21)]
    assert len({a for a, _ in draws}) == len({b for _, b in draws}) == 21
    other = make_stream(seed=1)
    assert not set(draws) & {other[p]["draws"] for p in range(21)}
    assert [other[p]["image_id"] for p in range(21)] != [stream[p]["image_id"] for p in range(21)]


def test_a_mapper_that_changes_its_input_does_not_change_the_data_set():
    def mapper(dataset_dict):
        dataset_dict["image_id"] += 100
        return dataset_dict

    stream = ShuffledStream(IMAGES, mapper, seed=0)
    assert sorted(stream[p]["image_id"] for p in range(7)) == list(range(100, 107))
    assert sorted(stream[p]["image_id"] for p in range(7)) == list(range(100, 107))


def test_an_empty_data_set_is_an_error_that_names_the_key():
    with pytest.raises(ValueError, match=r"DATASETS\.TRAIN"):
        ShuffledStream([], drawing_mapper, seed=0)


# --- batches -----------------------------------------------------------------------------------


def test_batches_are_the_stream_in_turn():
    stream = make_stream(seed=3)
    flat = [item for batch in batches(5) for item in batch]
    assert flat == [stream[p] for p in range(20)]


@pytest.mark.parametrize("start_iter", [1, 6])
def test_a_resumed_loader_continues_exactly(start_iter):
    assert batches(4, start_iter=start_iter) == batches(start_iter + 4)[start_iter:]


def test_workers_change_nothing():
    assert batches(4, start_iter=2, num_workers=1) == batches(4, start_iter=2)


def test_a_loader_can_be_iterated_anew_from_another_iteration():
    loader = make_loader()
    first = list(islice(loader, 5))
    loader.batch_sampler.start_iter = 3
    assert list(islice(loader, 2)) == first[3:]


@pytest.fixture
def ranks(monkeypatch):
    def of(world: int, rank: int) -> None:
        monkeypatch.setattr(comm, "get_world_size", lambda: world)
        monkeypatch.setattr(comm, "get_rank", lambda: rank)

    return of


def positions(batch_size: int, start_iter: int, count: int) -> list[list[int]]:
    sampler = ResumableBatches(batch_size)
    sampler.start_iter = start_iter
    return list(islice(sampler, count))


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_processes_share_each_batch_evenly(ranks, world):
    per_rank = []
    for rank in range(world):
        ranks(world, rank)
        per_rank.append(positions(6, start_iter=5, count=3))
    for i in range(3):
        parts = [batches_of_rank[i] for batches_of_rank in per_rank]
        assert [len(part) for part in parts] == [6 // world] * world
        together = sorted(p for part in parts for p in part)
        assert together == list(range((5 + i) * 6, (6 + i) * 6))


def test_a_batch_that_the_processes_cannot_share_is_an_error(ranks):
    ranks(2, 0)
    with pytest.raises(ValueError, match=r"IMS_PER_BATCH is 5, not a multiple of the 2 processes"):
        ResumableBatches(5)
