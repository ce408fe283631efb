"""Cross-validation of Category: what is measured on a fold was chosen on the others."""

import json
from dataclasses import replace

import numpy as np
import pytest

from category_study.folds import (
    assign_folds,
    choose,
    cross_validate,
    format_folds,
    match_category,
    match_reference,
    read_photos,
    rules_grid,
)
from reranking.recall import IOU_THRESHOLD, match_mentions, recall_of_mentions
from vlnms_d2.evaluation.matching import Match, MatchTable
from vlnms_d2.language.matching import RULES, CategoryMatcher, MentionFinder
from vlnms_d2.language.nouns import NounFinder
from vlnms_d2.language.synonyms import Synonyms
from vlnms_d2.modeling.relatedness import category_relatedness

OTHER = replace(RULES, slope=10.0)


def match(rank: int, num_proposals: int = 12, best: float = 0.9) -> Match:
    """Of one object that is hit first by the proposal of a rank."""
    scores = np.linspace(best, 0.1, num_proposals, dtype=np.float32)
    return Match(scores, None, np.array([rank], np.int32))


def test_folds_are_even_and_the_same_each_time():
    folds = assign_folds(13, 5, 0)
    assert sorted(np.bincount(folds).tolist()) == [2, 2, 3, 3, 3]
    assert (assign_folds(13, 5, 0) == folds).all() and (assign_folds(13, 5, 1) != folds).any()
    for number in (1, 14):
        with pytest.raises(ValueError, match=f"{number} folds of 13 photos"):
            assign_folds(13, number, 0)


def test_what_is_best_on_the_other_folds_is_measured():
    """Photo 0 alone is for the first rules, and it is measured by the second."""
    tried = {
        RULES: [[match(0)], [match(11)], [match(11)]],
        OTHER: [[match(11)], [match(0)], [match(0)]],
    }
    assert choose(tried, [0]) is RULES and choose(tried, [0, 1, 2]) is OTHER
    assert choose({RULES: tried[RULES], OTHER: tried[RULES]}, [0, 1]) is RULES
    alone = [[match(7)], [match(7), match(2)], [match(7)]]
    references = {"detector": alone, "oracle": [[match(0)], [match(0)] * 2, [match(0)]]}
    tried = {rules: [own[0], own[1] * 2, own[2]] for rules, own in tried.items()}
    results = cross_validate(tried, references, np.array([0, 1, 2]))
    assert results["captions"] == 4
    assert [fold["rules"]["slope"] for fold in results["folds"]] == [10.0, RULES.slope, 10.0]
    top = {method: own["top"] for method, own in results["methods"].items()}
    # Photo 0 by OTHER: missed. Photo 1, of two captions, by RULES, as 0 and 2 tie: missed as well.
    assert top["category"]["5"]["recall"] == top["category"]["10"]["recall"] == 25
    assert (top["detector"]["5"]["recall"], top["detector"]["10"]["recall"]) == (25, 100)
    assert top["oracle"]["5"] == {"recall": 100, "proposals": 5}
    assert "| share of the oracle's gain |" in format_folds(results)


def test_thresholds_are_of_the_other_folds():
    rng = np.random.default_rng(0)
    own = [
        [match(int(rng.integers(12)), best=rng.uniform(0.5, 1)) for _ in range(3)] for _ in range(6)
    ]
    folds = np.arange(6) % 3
    found = cross_validate({RULES: own}, {"detector": own, "oracle": own}, folds)
    hits, counts = [], []
    for fold in range(3):
        inside, outside = (
            [one for photo in np.flatnonzero(at) for one in own[photo]]
            for at in (folds == fold, folds != fold)
        )
        threshold = np.float32(MatchTable(outside, IOU_THRESHOLD).threshold_for(3.0))
        for one in inside:
            counts.append(max(1, int((one.scores > threshold).sum())))
            hits.append(one.context_rank[0] < counts[-1])
    for method in ("detector", "category", "oracle"):
        point = found["methods"][method]["mean"]["3"]
        assert point["recall"] == pytest.approx(100 * np.mean(hits))
        assert point["proposals"] == pytest.approx(np.mean(counts))


class NoVectors:
    """Words that are no kinds are like nothing."""

    def similarity(self, a, b):
        return np.zeros((len(a), len(b)), np.float32)


def test_matches_of_files_equal_those_of_rerank(tmp_path):
    """Though NMS is done once here for all rules, and without them."""
    rng = np.random.default_rng(1)
    names = {3: "dog", 1: "cat", 8: "car"}
    detections, annotations, captions, mentions = [], [], [], []
    texts = ("a dog and a puppy", "cats", "nothing at all", "a car behind the cat")
    for image_id in (5, 2):
        for n in range(40):
            box = [*rng.uniform(0, 60, 2).tolist(), *rng.uniform(10, 40, 2).tolist()]
            category_id = int(rng.choice(list(names)))
            entry = {"image_id": image_id, "bbox": box, "category_id": category_id}
            detections.append(entry | {"score": float(rng.random())})
            if n < 4:
                annotations.append(entry | {"id": 10 * image_id + n})
        for n, text in enumerate(texts):
            captions.append({"image_id": image_id, "id": 10 * image_id + n, "caption": text})
            ids = [10 * image_id + n] if n != 1 else []
            mentions.append({"caption_id": 10 * image_id + n, "annotation_ids": ids})
    categories = [{"id": key, "name": name} for key, name in names.items()]
    contents = {
        "detections": detections,
        "annotations": {"annotations": annotations, "categories": categories},
        "captions": {"annotations": captions},
        "mentions": mentions,
    }
    files = {name: tmp_path / f"{name}.json" for name in contents}
    for name, content in contents.items():
        files[name].write_text(json.dumps(content))
    category_names, photos = read_photos(**files)
    assert category_names == ["cat", "dog", "car"]
    assert [photo.captions for photo in photos] == [(texts[0], *texts[2:])] * 2
    finder, vectors, synonyms = NounFinder(), NoVectors(), Synonyms(category_names)
    found = match_category(photos, category_names, [RULES, OTHER], finder, vectors)
    references = {m: match_reference(photos, category_names, m) for m in ("detector", "oracle")}
    for rules, own in found.items():
        mentions = MentionFinder(finder, synonyms)
        used = (vectors, synonyms, rules.least, rules.general)
        matcher = CategoryMatcher(category_names, mentions, *used)
        expected = {"detector": [], "category": [], "oracle": []}
        for image_id, photo in zip((2, 5), photos, strict=True):
            here = [d for d in detections if d["image_id"] == image_id]
            boxes = np.array([d["bbox"] for d in here])
            boxes[:, 2:] += boxes[:, :2]
            classes = np.array([[1, 3, 8].index(d["category_id"]) for d in here])
            cosines = matcher.best_cosines(photo.captions)
            related = category_relatedness(cosines, rules.slope, rules.midpoint).numpy()[:, classes]
            scores = np.array([d["score"] for d in here])
            for method, matches in match_mentions(
                boxes, scores, classes, category_names, related, photo.mentioned, 0.5
            ).items():
                expected[method] += matches
        flat = {m: [x for photo in p for x in photo] for m, p in references.items()}
        flat["category"] = [x for photo in own for x in photo]
        assert recall_of_mentions(flat) == recall_of_mentions(expected)


def test_the_grid_begins_with_the_rules_in_use():
    grid = rules_grid()
    assert grid[0] == RULES and len(set(grid)) == len(grid) > 100
