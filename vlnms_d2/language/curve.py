"""The curve of Category: from a cosine to a relatedness."""

import numpy as np

from .rules import RULES

SLOPE = RULES.slope
MIDPOINT = RULES.midpoint


def relatedness(
    cosines: np.ndarray, slope: float = SLOPE, midpoint: float = MIDPOINT
) -> np.ndarray:
    """r = sigmoid(slope * (cosine - midpoint)) of the best cosines with each category.

    Args:
        cosines: float [Q, C], as `CategoryMatcher.best_cosines` gives them.

    Returns:
        float32 [Q, C]. A query that names no category, of which all cosines are -1, gives 1 for
        all of them: nothing speaks against any box.
    """
    related = 1 / (1 + np.exp(-slope * (cosines.astype(np.float64) - midpoint)))
    return np.where((cosines <= -1).all(axis=1, keepdims=True), 1.0, related).astype(np.float32)
