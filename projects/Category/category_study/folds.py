"""Cross-validation of Category over photos: the rules (`CategoryRules`) measured on a photo were
chosen on other photos."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tabulate import tabulate
from tqdm import tqdm

from reranking.annotations import Mentioned, read_annotations, read_mentioned
from reranking.detections import Detections, DetectionStore, check_not_corners
from reranking.queries import read_queries
from reranking.recall import (
    IOU_THRESHOLD,
    MEANS,
    METHODS,
    TOPS,
    match_related,
    oracle_relatedness,
)
from vlnms_d2.evaluation.matching import Match, MatchTable
from vlnms_d2.language.matching import RULES, CategoryMatcher, CategoryRules, MentionFinder
from vlnms_d2.language.nouns import NounFinder
from vlnms_d2.language.synonyms import Synonyms
from vlnms_d2.language.word_vectors import WordVectors, load_word_vectors
from vlnms_d2.modeling.relatedness import category_relatedness
from vlnms_d2.rerank import NMS_THRESH, rerank

LEASTS = (0.6, 0.7, 0.8, 0.9, 0.99)  # the last one: the words of the name themselves
GENERALS = (0.2, 0.5, 1.0)
SLOPES = (4.0, 6.29, 10.0)
MIDPOINTS = (0.4, 0.514, 0.65)


def measure(
    detections: Path,
    annotations: Path,
    captions: Path,
    mentions: Path,
    *,
    num_folds: int,
    seed: int,
) -> dict[str, Any]:
    """Cross-validate Category, with MiniLM's vectors and the plugin's own spaCy pipeline.

    Args:
        detections, annotations, captions, mentions: see `read_photos`.
        num_folds, seed: see `assign_folds`.

    Returns:
        As `cross_validate`; and "chosen_on_all", the rules that are best on all photos, and
        "in_use", those of the plugin.

    Raises:
        FileNotFoundError, ValueError: see `read_photos` and `assign_folds`.
    """
    names, photos = read_photos(detections, annotations, captions, mentions)
    folds = assign_folds(len(photos), num_folds, seed)
    grid = tqdm(rules_grid(), desc="rules", disable=None)
    tried = match_category(photos, names, grid, NounFinder(), load_word_vectors(""))
    references = {m: match_reference(photos, names, m) for m in ("detector", "oracle")}
    return cross_validate(tried, references, folds) | {
        "chosen_on_all": asdict(choose(tried, range(len(photos)))),
        "in_use": asdict(RULES),
    }


class Photo(NamedTuple):
    """A photo and those of its captions that mention an object.

    Attributes:
        detections: the detections after class-wise NMS. As r is the same for all boxes of a class,
            NMS by fused scores would keep the same ones, whatever the rules.
        captions: Q texts.
        mentioned: the objects that each of them mentions.
    """

    detections: Detections
    captions: tuple[str, ...]
    mentioned: tuple[Mentioned, ...]


def read_photos(
    detections: Path, annotations: Path, captions: Path, mentions: Path
) -> tuple[list[str], list[Photo]]:
    """The category names by class, and the photos in ascending order of their ids.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or the files do not fit together.
    """
    known = read_annotations(annotations)
    queries = read_queries(captions)
    image_of = {query.query_id: query.image_id for query in queries}
    mentioned = read_mentioned(mentions, known, image_of)
    by_image: dict[int, list[tuple[str, Mentioned]]] = {}
    for query in queries:
        if query.query_id in mentioned:
            captions_of_image = by_image.setdefault(query.image_id, [])
            captions_of_image.append((query.text, mentioned[query.query_id]))
    with tempfile.TemporaryDirectory() as folder:
        store = DetectionStore.build(detections, known.class_of, annotations, Path(folder))
        sizes = {image_id: image.size for image_id, image in known.images.items()}
        check_not_corners(detections, ((store.of(i).boxes, sizes.get(i)) for i in by_image))
        photos = [
            Photo(_after_nms(store.of(i), known.category_names), *zip(*by_image[i], strict=True))
            for i in sorted(by_image)
        ]
    return known.category_names, photos


def _after_nms(detections: Detections, category_names: Sequence[str]) -> Detections:
    [kept] = rerank(
        detections.corners,
        detections.scores,
        detections.classes,
        category_names,
        [""],
        topk=-1,
        nms_thresh=NMS_THRESH,
        relatedness=np.ones((1, len(detections.scores)), dtype=np.float32),
    )
    return Detections(*(field[kept.candidate_index.numpy()] for field in detections))


def rules_grid() -> list[CategoryRules]:
    """All rules to try. Those of the file come first, as the first of equally good ones wins."""
    choices = product(LEASTS, GENERALS, SLOPES, MIDPOINTS)
    tried = [CategoryRules(*choice) for choice in choices]
    return list(dict.fromkeys([RULES, *tried]))


def match_category(
    photos: Sequence[Photo],
    category_names: Sequence[str],
    grid: Iterable[CategoryRules],
    nouns: NounFinder,
    vectors: WordVectors,
) -> dict[CategoryRules, list[list[Match]]]:
    """The matches of Category by each of the rules, per photo and caption.

    Args:
        photos, category_names: as of `read_photos`.
        grid: the rules.
        nouns, vectors: find nouns and embed words.
    """
    texts = [text for photo in photos for text in photo.captions]
    ends = np.cumsum([len(photo.captions) for photo in photos])
    synonyms = Synonyms(category_names)
    mentions = MentionFinder(nouns, synonyms)
    cosines: dict[tuple[float, float], np.ndarray] = {}
    matches: dict[bytes, list[list[Match]]] = {}
    by_rules = {}
    for rules in grid:
        words = rules.least, rules.general
        if words not in cosines:
            matcher = CategoryMatcher(category_names, mentions, vectors, synonyms, *words)
            cosines[words] = matcher.best_cosines(texts)
        related = category_relatedness(cosines[words], rules.slope, rules.midpoint).numpy()
        # Many rules give the same relatedness, which is matched only once.
        key = related.tobytes()
        if key not in matches:
            matches[key] = [
                _match(photo, category_names, per_class[:, photo.detections.classes])
                for photo, per_class in zip(photos, np.split(related, ends[:-1]), strict=True)
            ]
        by_rules[rules] = matches[key]
    return by_rules


def match_reference(
    photos: Sequence[Photo], category_names: Sequence[str], method: str
) -> list[list[Match]]:
    """The matches of "detector" or "oracle", per photo and caption."""
    matches = []
    for photo in photos:
        related = oracle_relatedness(photo.mentioned, photo.detections.classes)
        if method == "detector":
            related = np.ones_like(related)
        matches.append(_match(photo, category_names, related))
    return matches


def _match(photo: Photo, category_names: Sequence[str], related: np.ndarray) -> list[Match]:
    detections = photo.detections
    return match_related(
        detections.corners,
        detections.scores,
        detections.classes,
        category_names,
        related,
        photo.mentioned,
        NMS_THRESH,
    )


def assign_folds(num_photos: int, num_folds: int, seed: int) -> np.ndarray:
    """Assign photos at random to folds of (almost) equal size.

    Returns:
        int64 [photos], the fold of each.

    Raises:
        ValueError: fewer than two folds, or more than there are photos.
    """
    if not 2 <= num_folds <= num_photos:
        raise ValueError(
            f"{num_folds} folds of {num_photos} photos, expected from 2 to {num_photos} folds"
        )
    return np.random.default_rng(seed).permutation(num_photos) % num_folds


def choose(tried: dict[CategoryRules, list[list[Match]]], photos: Sequence[int]) -> CategoryRules:
    """The rules with the highest mean of the recalls at `TOPS` on the given photos; the first of
    equally good ones."""
    return max(tried, key=lambda rules: np.mean(_recalls_at_tops(_table(tried[rules], photos))))


def cross_validate(
    tried: dict[CategoryRules, list[list[Match]]],
    references: dict[str, list[list[Match]]],
    folds: np.ndarray,
) -> dict[str, Any]:
    """Recall on each fold with the rules chosen on the others, averaged over all captions.

    Args:
        tried: for each of the rules the matches of Category, per photo and caption.
        references: the matches of "detector" and "oracle".
        folds: int64 [photos], as `assign_folds` gives them.

    Returns:
        "folds", for each the chosen "rules" and the number of its "photos" and "captions";
        "methods", for each of `METHODS` "top" and "mean" as in `recall_of_mentions`, with the
        thresholds of all methods chosen on the other folds; "captions", the number of captions.
    """
    parts: dict[str, list[tuple[MatchTable, dict[float, float]]]] = {m: [] for m in METHODS}
    described = []
    for fold in np.unique(folds).tolist():
        inside, outside = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
        rules = choose(tried, outside)
        for method, matches in (references | {"category": tried[rules]}).items():
            others = _table(matches, outside)
            thresholds = {wanted: others.threshold_for(wanted) for wanted in MEANS}
            parts[method].append((_table(matches, inside), thresholds))
        sizes = {
            "photos": len(inside),
            "captions": sum(len(references["oracle"][i]) for i in inside),
        }
        described.append({"rules": asdict(rules)} | sizes)
    weights = [one["captions"] for one in described]
    return {
        "captions": sum(weights),
        "folds": described,
        "methods": {method: _pool(tables, weights) for method, tables in parts.items()},
    }


def _pool(
    parts: Sequence[tuple[MatchTable, dict[float, float]]], weights: Sequence[int]
) -> dict[str, dict[str, dict[str, float]]]:
    """Means over the captions of all folds."""

    def mean(counts_of: Callable[[MatchTable, dict[float, float]], np.ndarray]) -> dict[str, float]:
        summaries = [table.summary(counts_of(table, thresholds)) for table, thresholds in parts]
        recall, proposals = (
            float(np.average([summary[key] for summary in summaries], weights=weights))
            for key in ("context", "proposals")
        )
        return {"recall": recall, "proposals": proposals}

    return {
        "top": {str(n): mean(lambda t, _, n=n: np.minimum(t.num_proposals, n)) for n in TOPS},
        "mean": {f"{m:g}": mean(lambda t, chosen, m=m: t.counts(chosen[m])) for m in MEANS},
    }


def _table(matches: Sequence[Sequence[Match]], photos: Sequence[int]) -> MatchTable:
    return MatchTable([match for i in photos for match in matches[i]], IOU_THRESHOLD)


def _recalls_at_tops(table: MatchTable) -> list[float]:
    return [table.summary(np.minimum(table.num_proposals, n))["context"] for n in TOPS]


def format_folds(results: dict[str, Any]) -> str:
    """The results of `cross_validate` as text."""
    points = [("top", str(n), f"N={n}") for n in TOPS]
    points += [("mean", f"{m:g}", f"mean {m:g}") for m in MEANS]
    rows = {
        method: [results["methods"][method][kind][key] for kind, key, _ in points]
        for method in METHODS
    }
    recalls = {method: [point["recall"] for point in row] for method, row in rows.items()}
    table = [[label, *recalls[method]] for method, label in METHODS.items()]
    detector, category, oracle = (recalls[method] for method in METHODS)
    gains = [(b - a, c - a) for a, b, c in zip(detector, category, oracle, strict=True)]
    shares = [100 * gain / most if most else None for gain, most in gains]
    table.append(["share of the oracle's gain", *shares])
    table += [
        [f"proposals: {label}", *(point["proposals"] for point in rows[method])]
        for method, label in METHODS.items()
    ]
    headers = ["proposals of", *(header for *_, header in points)]
    folds = [
        f"fold {number}: {fold['photos']} photos, {fold['captions']} captions, {fold['rules']}"
        for number, fold in enumerate(results["folds"])
    ]
    return "\n".join(
        [
            tabulate(table, headers=headers, tablefmt="pipe", floatfmt=".2f", missingval="-"),
            f"Recall in percent of the mentioned boxes at IoU > {IOU_THRESHOLD:g}, mean over "
            f"{results['captions']:,} captions. Rules and thresholds were chosen on the photos of "
            "the other folds.",
            *folds,
        ]
    )
