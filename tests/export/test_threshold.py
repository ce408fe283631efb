"""The threshold that leaves a wanted number of scores."""

import numpy as np
import pytest

from vlnms_d2.export.threshold import threshold_for_count


def chosen(scores, count) -> float:
    parts = np.array_split(np.asarray(scores, dtype=np.float32), 3)
    return threshold_for_count(lambda: iter(parts), count)


def num_above(scores, threshold) -> int:
    return int((np.asarray(scores, dtype=np.float32) > np.float32(threshold)).sum())


@pytest.mark.parametrize("seed", range(5))
def test_no_other_threshold_comes_closer(seed):
    rng = np.random.default_rng(seed)
    # Many ties, and values of which only the lower bits differ.
    scores = rng.choice(np.float32(0.3) + np.arange(20, dtype=np.float32) * 1e-7, 300)
    scores = np.concatenate([scores, rng.random(100), [0, 0, -0.0, 1, 1]]).astype(np.float32)
    possible = np.array([num_above(scores, t) for t in [-1, *np.unique(scores)]])
    for count in [0, 0.4, 1, 2, 17.5, 100, 250, 399, 404, 405, 1000]:
        best = np.abs(possible - count).min()
        got = num_above(scores, chosen(scores, count))
        assert abs(got - count) == best
        # Of two equally close ones the one with fewer.
        assert got == possible[np.abs(possible - count) == best].min()


def test_thresholds_that_leave_all_or_none():
    assert num_above([0.0, 0.5], chosen([0.0, 0.5], 2)) == 2
    assert chosen([0.25, 0.5], 0) == 0.5
    assert chosen([], 5) == 0.0
