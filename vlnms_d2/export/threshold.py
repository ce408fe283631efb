"""How many proposals a query keeps, and the threshold that leaves a given mean number of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ..file_io import atomic_write

_LOW_BITS = 16


def check_cut(top_n: int | None, score_thresh: float | None, mean_proposals: float | None) -> None:
    """Check the three ways to say how many proposals a query keeps.

    Raises:
        ValueError: more than one is given, or a value is out of range.
    """
    cuts = {
        "top_n": (top_n, lambda n: n >= 1, "at least 1"),
        "score_thresh": (score_thresh, lambda t: 0 <= t <= 1, "from 0 to 1"),
        "mean_proposals": (mean_proposals, lambda m: 1 <= m < math.inf, "at least 1"),
    }
    given = [name for name, (value, *_) in cuts.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are given, expected at most one of them")
    for name in given:
        value, is_valid, expected = cuts[name]
        if not is_valid(value):
            raise ValueError(f"{name} is {value}, expected a number {expected}")


def save_scores(path: Path, scores_of_queries: Iterable[np.ndarray]) -> None:
    """Write what `threshold_for_mean` needs: all scores except the best of each query, which is
    kept whatever the threshold. Those of each query are float32, in descending order."""
    scores, num_answered = [np.zeros(0, np.float32)], 0
    for query_scores in scores_of_queries:
        scores.append(query_scores[1:])
        num_answered += len(query_scores) > 0
    with atomic_write(path) as file:
        np.savez(file, scores=np.concatenate(scores), num_answered=num_answered)


def threshold_for_mean(files: Sequence[Path], mean: float) -> float:
    """The threshold that leaves a mean number of proposals per query that has any.

    Args:
        files: written by `save_scores`.
        mean: at least 1.
    """

    def read(key: str) -> Iterator[np.ndarray]:
        for file in files:
            with np.load(file, allow_pickle=False) as arrays:
                yield arrays[key]

    num_answered = sum(int(number) for number in read("num_answered"))
    return threshold_for_count(lambda: read("scores"), (mean - 1) * num_answered)


def threshold_for_count(read_scores: Callable[[], Iterator[np.ndarray]], count: float) -> float:
    """The threshold above which the number of scores is closest to `count`.

    Exact, and in memory that does not grow with the number of scores: non-negative float32 numbers
    are in the order of their bits, so two histograms, of the upper and of the lower 16 bits, give
    the score of any rank.

    Args:
        read_scores: yields all scores, float32 and non-negative, in arrays; called twice.
        count: how many scores to leave.

    Returns:
        A float32 number: one of the scores, or the number right below it. Of two thresholds that
        are equally close, the higher one. 0 without scores; below all scores if there are fewer
        than `count`.
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
        # Adding 0 turns negative zero, whose bits are out of order, into positive zero.
        bits = (scores.astype(np.float32) + np.float32(0)).view(np.uint32)
        counts += np.bincount(bin_of(bits), minlength=len(counts))
    return counts


def _bin_of(counts: np.ndarray, rank: int) -> tuple[int, int]:
    """The bin of the score of a rank (1 is the best), and how many scores are in higher bins."""
    at_least = counts[::-1].cumsum()
    place = int(np.searchsorted(at_least, rank))
    return len(counts) - 1 - place, int(at_least[place - 1]) if place else 0
