"""How well cosines of words tell which objects an expression speaks of, and the numbers chosen
by it: gamma of the pseudo ground truth and the curve of Category."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vlnms_d2.data.pseudo_gt import same_box, with_cosines
from vlnms_d2.language.matching import CategoryMatcher


class Pairs(NamedTuple):
    """Pairs of an expression and an annotated object of its image.

    Attributes:
        cosines: float32 [P], the best of any noun with the object's category name.
        foreground: bool [P], whether the expression speaks of the object.
        referent: bool [P], whether it is the referent, or has its box.
    """

    cosines: np.ndarray
    foreground: np.ndarray
    referent: np.ndarray


class ClassPairs(NamedTuple):
    """Pairs of an expression and a category that its image has.

    Attributes:
        cosines: float32 [P], the best of any mention with the category's name; -1 without any.
        named: bool [P], whether the expression speaks of an object of the category.
    """

    cosines: np.ndarray
    named: np.ndarray


class GammaResult(NamedTuple):
    """What a gamma finds of the contextual objects; all from 0 to 1.

    Attributes:
        gamma: objects whose cosine is above it are taken for context.
        precision: share of true ones among those taken; 1 where none is.
        recall: share of the true ones that are taken; 1 where there are none.
        f1: their harmonic mean.
    """

    gamma: float
    precision: float
    recall: float
    f1: float


def collect_pairs(images: Sequence[dict[str, Any]], matcher: CategoryMatcher) -> Pairs:
    """All pairs of a data set whose contextual objects are annotated.

    Args:
        images: dataset dicts in the standard format.
        matcher: with the names of the data set's categories.

    Raises:
        ValueError: an expression without annotated context.
    """
    parts = [(np.zeros(0, np.float32), np.zeros(0, bool), np.zeros(0, bool))]
    for image, cosines in with_cosines(images, matcher):
        annotations, expressions = image["annotations"], image["expressions"]
        for expression in expressions:
            if expression["context_ann_ids"] is None:
                raise ValueError(
                    f"sentence {expression['sent_id']} of image {image['image_id']} has no "
                    "annotated contextual objects; measure on a data set that has them, such as "
                    "refshapes_train"
                )
        classes = [a["category_id"] for a in annotations]
        ids = np.array([a["id"] for a in annotations])
        context = [np.isin(ids, e["context_ann_ids"]) for e in expressions]
        referent = same_box(annotations, [e["ann_id"] for e in expressions])
        context = np.array(context, dtype=bool).reshape(referent.shape)
        parts.append((cosines[:, classes].ravel(), (context | referent).ravel(), referent.ravel()))
    return Pairs(*map(np.concatenate, zip(*parts, strict=True)))


def collect_class_pairs(images: Sequence[dict[str, Any]], matcher: CategoryMatcher) -> ClassPairs:
    """All pairs of a data set whose contextual objects are annotated.

    Args:
        images: dataset dicts in the standard format.
        matcher: with the names of the data set's categories.
    """
    parts = [(np.zeros(0, np.float32), np.zeros(0, bool))]
    for image, cosines in with_cosines(images, matcher):
        class_of = {a["id"]: a["category_id"] for a in image["annotations"]}
        present = sorted(set(class_of.values()))
        for expression, row in zip(image["expressions"], cosines, strict=True):
            foreground = {class_of[i] for i in expression["context_ann_ids"]}
            foreground.add(class_of[expression["ann_id"]])
            parts.append((row[present], np.isin(present, list(foreground))))
    return ClassPairs(*map(np.concatenate, zip(*parts, strict=True)))


def try_gammas(pairs: Pairs, gammas: Sequence[float]) -> list[GammaResult]:
    """Precision and recall of the contextual objects at each gamma; referents do not count."""
    others = ~pairs.referent
    cosines, context = pairs.cosines[others], pairs.foreground[others]
    results = []
    for gamma in gammas:
        taken = cosines > gamma
        hits = int((taken & context).sum())
        precision = hits / taken.sum() if taken.any() else 1.0
        recall = hits / context.sum() if context.any() else 1.0
        f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
        results.append(GammaResult(float(gamma), float(precision), float(recall), float(f1)))
    return results


def fit_curve(pairs: ClassPairs, num_steps: int = 50) -> tuple[float, float]:
    """Logistic regression of "the expression names the category" on the cosine, by Newton's method.

    Args:
        pairs: of expressions and categories.
        num_steps: at most.

    Returns:
        slope and midpoint: p = sigmoid(slope * (cosine - midpoint)).

    Raises:
        ValueError: all categories are named or none is, or the cosines are all the same.
    """
    x = np.stack([pairs.cosines, np.ones_like(pairs.cosines)], axis=1).astype(np.float64)
    y = pairs.named.astype(np.float64)
    if len(np.unique(y)) < 2 or len(np.unique(pairs.cosines)) < 2:
        raise ValueError("there is nothing to fit: all cosines are the same, or all answers")
    weights = np.zeros(2)
    # A little weight decay: where a cosine tells both kinds apart there would be no end.
    decay = np.eye(2) * 1e-3
    for _ in range(num_steps):
        p = 1 / (1 + np.exp(-x @ weights))
        gradient = x.T @ (p - y) + decay @ weights
        step = np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + decay, gradient)
        weights -= step
        if np.abs(step).max() < 1e-9:
            break
    slope, intercept = weights
    return float(slope), float(-intercept / slope)
