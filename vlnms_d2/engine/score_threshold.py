"""The threshold that leaves a given mean number of proposals, of scores that lie in files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ..file_io import atomic_write

_LOW_BITS = 16


def save_scores(path: Path, scores_of_queries: Iterable[np.ndarray]) -> None:
    """Write what `threshold_for_mean` needs: all scores but the best of each query, which stays
    whatever the threshold.

    Args:
        path: where to.
        scores_of_queries: per query float32, falling.
    """
    scores, num_answered = [np.zeros(0, np.float32)], 0
    for own in scores_of_queries:
        scores.append(own[1:])
        num_answered += len(own) > 0
    with atomic_write(path) as file:
        np.savez(file, scores=np.concatenate(scores), num_answered=num_answered)


def threshold_for_mean(files: Sequence[Path], mean: float) -> float:
    """The threshold that leaves a mean number of proposals per query of those that have any.

    Args:
        files: as `save_scores` wrote them.
        mean: wanted, at least 1.
    """

    def read(key: str) -> Iterator[np.ndarray]:
        for file in files:
            with np.load(file, allow_pickle=False) as arrays:
                yield arrays[key]

    num_answered = sum(int(number) for number in read("num_answered"))
    return threshold_for_count(lambda: read("scores"), (mean - 1) * num_answered)


def threshold_for_count(read_scores: Callable[[], Iterator[np.ndarray]], count: float) -> float:
    """The threshold above which the number of scores comes closest to a given one.

    Exact, in memory that does not depend on how many scores there are: float32 numbers from 0 up
    order as their bits do, so two histograms, of the upper and of the lower bits, find any rank.

    Args:
        read_scores: gives all scores, float32 from 0 up, in arrays; called twice.
        count: wanted.

    Returns:
        A float32 number: one of the scores or the number right below it. Of two thresholds that
        come equally close the higher one. 0 where there is no score; where fewer scores than
        `count` are there, one below them all.
    """
    upper = _histogram(read_scores, lambda bits: bits >> _LOW_BITS)
    total = int(upper.sum())
    if not total:
        return 0.0
    # Scores as good as or better than this rank, counted from 1, should remain.
    rank = int(np.clip(np.ceil(count), 1, total))
    high, above_high = _bin_of(upper, rank)
    lower = _histogram(
        read_scores, lambda bits: bits[bits >> _LOW_BITS == high] & ((1 << _LOW_BITS) - 1)
    )
    low, above_low = _bin_of(lower, rank - above_high)
    score = np.array([high << _LOW_BITS | low], dtype=np.uint32).view(np.float32)[0]
    without = above_high + above_low
    with_it = without + int(lower[low])
    if abs(without - count) <= abs(with_it - count):
        return float(score)
    return float(np.nextafter(score, np.float32(-1)))


def _histogram(
    read_scores: Callable[[], Iterator[np.ndarray]], bin_of: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    counts = np.zeros(1 << _LOW_BITS, dtype=np.int64)
    for scores in read_scores():
        # Adding 0 turns the negative zero, whose bits are out of order, into the positive one.
        bits = (scores.astype(np.float32) + np.float32(0)).view(np.uint32)
        counts += np.bincount(bin_of(bits), minlength=len(counts))
    return counts


def _bin_of(counts: np.ndarray, rank: int) -> tuple[int, int]:
    """The bin of the score with a rank, counted from 1 at the best, and how many are in the bins
    above it."""
    at_least = counts[::-1].cumsum()
    place = int(np.searchsorted(at_least, rank))
    return len(counts) - 1 - place, int(at_least[place - 1]) if place else 0
