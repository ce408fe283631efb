"""Calibration of word similarities: gamma of the pseudo ground truth, and the logistic curve that
turns cosines into the relatedness of Category."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from detectron2.data import MetadataCatalog
from tabulate import tabulate

from pseudo_gt import same_box, with_cosines
from vlnms_d2.data.pseudo_gt import load_expressions
from vlnms_d2.language.matching import CategoryMatcher, category_matcher
from vlnms_d2.language.nouns import NounFinder
from vlnms_d2.language.word_vectors import load_word_vectors

GAMMAS = [round(0.2 + 0.05 * i, 2) for i in range(14)]


class Pairs(NamedTuple):
    """Pairs of an expression and an annotated object of its image.

    Attributes:
        cosines: float32 [P], the best of any noun with the object's category name.
        foreground: bool [P], whether the expression mentions the object.
        referent: bool [P], whether the object is the referent, or has the same box.
    """

    cosines: np.ndarray
    foreground: np.ndarray
    referent: np.ndarray


class ClassPairs(NamedTuple):
    """Pairs of an expression and a category that is present in its image.

    Attributes:
        cosines: float32 [P], the best of any mention with the category's name; -1 without any.
        named: bool [P], whether the expression mentions an object of the category.
    """

    cosines: np.ndarray
    named: np.ndarray


class GammaResult(NamedTuple):
    """How well a gamma selects the contextual objects; all values from 0 to 1.

    Attributes:
        gamma: objects whose cosine is above it are selected as contextual.
        precision: share of contextual objects among those selected; 1 if none is selected.
        recall: share of the contextual objects that are selected; 1 if there are none.
        f1: their harmonic mean.
    """

    gamma: float
    precision: float
    recall: float
    f1: float


def collect_pairs(images: Sequence[dict[str, Any]], matcher: CategoryMatcher) -> Pairs:
    """All pairs of an expression and an object of a data set with annotated contextual objects.

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
    """All pairs of an expression and a category of a data set with annotated contextual objects.

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
    """Precision and recall of the contextual objects at each gamma; referents are excluded."""
    others = ~pairs.referent
    cosines, context = pairs.cosines[others], pairs.foreground[others]
    results = []
    for gamma in gammas:
        selected = cosines > gamma
        hits = int((selected & context).sum())
        precision = hits / selected.sum() if selected.any() else 1.0
        recall = hits / context.sum() if context.any() else 1.0
        f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
        results.append(GammaResult(float(gamma), float(precision), float(recall), float(f1)))
    return results


def fit_curve(pairs: ClassPairs, num_steps: int = 50) -> tuple[float, float]:
    """Logistic regression of "the expression names the category" on the cosine, by Newton's method.

    Args:
        pairs: the training data.
        num_steps: maximum number of Newton steps.

    Returns:
        slope and midpoint: p = sigmoid(slope * (cosine - midpoint)).

    Raises:
        ValueError: all categories are named or none is, or the cosines are all the same.
    """
    x = np.stack([pairs.cosines, np.ones_like(pairs.cosines)], axis=1).astype(np.float64)
    y = pairs.named.astype(np.float64)
    if len(np.unique(y)) < 2 or len(np.unique(pairs.cosines)) < 2:
        raise ValueError(
            "cannot fit the curve: all cosines are equal, or all pairs have the same label"
        )
    weights = np.zeros(2)
    # A little weight decay: where a cosine separates the classes, the optimum is at infinity.
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


def calibrate(dataset: str, word_vectors: str, pipeline: str) -> str:
    """Choose gamma and the logistic curve on a data set.

    Args:
        dataset: a registered data set with annotated contextual objects.
        word_vectors: a GloVe-format file; "" for MiniLM.
        pipeline: a spaCy pipeline; "" for the plugin's own.

    Returns:
        Precision and recall at every gamma as a table, and the chosen config keys.
    """
    vectors = load_word_vectors(word_vectors)
    names = MetadataCatalog.get(dataset).thing_classes
    images = load_expressions([dataset])
    pairs = collect_pairs(images, CategoryMatcher(names, NounFinder(pipeline).nouns, vectors))
    results = try_gammas(pairs, GAMMAS)
    best = max(results, key=lambda result: result.f1)
    rows = [
        [f"{r.gamma:.2f}{' *' if r is best else ''}"]
        + [f"{100 * value:.2f}" for value in (r.precision, r.recall, r.f1)]
        for r in results
    ]
    table = tabulate(rows, ["gamma", "precision", "recall", "F1"], "pipe", disable_numparse=True)
    matcher = category_matcher(names, pipeline, word_vectors)
    slope, midpoint = fit_curve(collect_class_pairs(images, matcher))
    return "\n".join(
        [
            f"{dataset}, {vectors.name}: {len(pairs.cosines)} pairs",
            table,
            f"MODEL.VLNMS.PSEUDO_GT.GAMMA {best.gamma}",
            f"MODEL.VLNMS.CATEGORY.SLOPE {slope:.2f} MODEL.VLNMS.CATEGORY.MIDPOINT {midpoint:.3f}",
        ]
    )
