"""Query-aware proposals from anyone's boxes and scores."""

import sys

import numpy as np
import pytest
import torch
from detectron2.structures import Instances
from plain_vectors import TableVectors, all_words
from torchvision.ops import batched_nms

import vlnms_d2
from vlnms_d2.language.matching import CategoryMatcher
from vlnms_d2.modeling.relatedness import category_relatedness

MODULE = sys.modules["vlnms_d2.rerank"]  # the name in the package is the function
NAMES = ["cat", "dog", "cup"]
BOXES = np.array(
    [[0, 0, 10, 10], [1, 0, 11, 10], [50, 50, 80, 90], [0, 0, 10, 9], [20, 20, 30, 30]], np.float64
)
SCORES = np.array([0.9, 0.8, 0.5, 0.7, 0.3])
CLASSES = np.array([0, 0, 1, 1, 2])


@pytest.fixture
def by_words(monkeypatch):
    """Category by a table: words are like category names by their angles. Counts the texts that
    are read."""
    read = []

    def mentions(texts):
        read.extend(texts)
        return all_words(texts)

    def make(names):
        angles = {"cat": 0, "kitten": 20, "dog": 90, "cup": 180}
        made = CategoryMatcher(names, mentions, TableVectors(angles), least=0.5)
        made_ones.append(made)
        return made

    made_ones = []
    monkeypatch.setattr(MODULE, "category_matcher", make)
    MODULE._matcher.cache_clear()
    yield read, made_ones
    MODULE._matcher.cache_clear()


def rerank(queries=("a",), relatedness=None, **kwargs):
    if relatedness is None:
        relatedness = np.ones((len(queries), len(SCORES)))
    given = {"boxes": BOXES, "scores": SCORES, "classes": CLASSES, "category_names": NAMES}
    return vlnms_d2.rerank(**given | kwargs, queries=list(queries), relatedness=relatedness)


def test_one_instances_per_query_with_all_fields():
    related = np.array([[1.0, 1, 1, 1, 1], [0.1, 0.1, 1, 1, 0.5]])
    first, second = rerank(["a", "b"], related, image_size=(100, 200))
    assert isinstance(first, Instances) and first.image_size == (100, 200)
    # Box 1 overlaps box 0 of its class by 9/11; box 3 does too, but is of another class.
    assert first.candidate_index.tolist() == [0, 3, 2, 4]
    assert second.candidate_index.tolist() == [3, 2, 4, 0]
    for number, own in enumerate((first, second)):
        index = own.candidate_index
        assert index.dtype == torch.int64
        assert own.query_index.tolist() == [number] * 4
        assert torch.equal(own.pred_boxes.tensor, torch.tensor(BOXES, dtype=torch.float32)[index])
        assert torch.equal(own.pred_classes, torch.tensor(CLASSES)[index])
        assert np.allclose(own.cls_scores, SCORES[index])
        assert np.allclose(own.relatedness, related[number, index])
        assert torch.equal(own.scores, own.cls_scores * own.relatedness)
        assert {own.scores.dtype, own.cls_scores.dtype, own.relatedness.dtype} == {torch.float32}


def test_without_a_size_the_image_just_holds_the_boxes():
    [own] = rerank(boxes=BOXES + 0.25)
    assert own.image_size == (91, 81)


def test_numpy_and_torch_give_the_same():
    related = np.random.default_rng(0).random((3, 5))
    for kept, other in zip(
        rerank("abc", related),
        rerank(
            "abc",
            torch.from_numpy(related),
            boxes=torch.from_numpy(BOXES),
            scores=torch.from_numpy(SCORES),
            classes=torch.from_numpy(CLASSES).int(),
        ),
        strict=True,
    ):
        assert torch.equal(kept.candidate_index, other.candidate_index)
        assert torch.equal(kept.scores, other.scores)


def test_nms_and_cut_are_those_of_torchvision_per_query():
    rng = np.random.default_rng(1)
    corners = rng.uniform(0, 60, (200, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(5, 40, (200, 2))], axis=1)
    scores, classes = rng.random(200), rng.integers(0, 3, 200)
    related = rng.random((4, 200))
    for nms_thresh in (None, 0.3):
        found = vlnms_d2.rerank(
            boxes, scores, classes, NAMES, list("abcd"), topk=20, nms_thresh=nms_thresh,
            relatedness=related,
        )  # fmt: skip
        for query, own in enumerate(found):
            fused = torch.tensor(scores).float() * torch.tensor(related[query]).float()
            kept = batched_nms(
                torch.tensor(boxes).float(), fused, torch.tensor(classes), nms_thresh or 0.5
            )
            assert own.candidate_index.tolist() == kept[:20].tolist()


def test_the_cuts():
    assert [len(kept) for kept in rerank(topk=2)] == [2]
    assert [len(kept) for kept in rerank(topk=-1)] == [4]
    [own] = rerank(score_thresh=0.5)
    assert own.candidate_index.tolist() == [0, 3]  # 0.5 is not above 0.5
    [own] = rerank(score_thresh=0.99)
    assert own.candidate_index.tolist() == [0]  # the best one always stays
    [own] = rerank(nms_thresh=0.9)
    assert own.candidate_index.tolist() == [0, 1, 3, 2, 4]


def test_a_callable_gets_queries_boxes_and_classes():
    asked = []

    def mine(queries, boxes, classes):
        asked.append((list(queries), boxes.shape, classes.tolist()))
        return (classes[None] == torch.tensor([[1], [2]])).float()

    dogs, cups = rerank(["dogs", "cups"], mine)
    assert asked == [(["dogs", "cups"], (5, 4), CLASSES.tolist())]
    assert dogs.candidate_index[:2].tolist() == [3, 2] and cups.candidate_index[0] == 4


def test_category_follows_the_words(by_words):
    kitten, dog = rerank(["a kitten", "dog"], "Category")
    assert NAMES[kitten.pred_classes[0]] == "cat"
    assert dog.candidate_index.tolist()[:2] == [3, 2]
    expected = category_relatedness(np.cos(np.deg2rad([[20.0, 70, 160], [90, 0, 90]])))
    for own, of_class in zip((kitten, dog), expected, strict=True):
        assert np.allclose(own.relatedness, of_class[own.pred_classes], atol=1e-6)


def test_a_caption_that_names_no_category_leaves_the_detectors_order(by_words):
    [alone] = rerank(["anything"])
    for query in ("", "sunset over there", "..."):
        [own] = rerank([query], "Category")
        assert torch.equal(own.candidate_index, alone.candidate_index)
        assert torch.equal(own.scores, own.cls_scores) and bool((own.relatedness == 1).all())


def test_the_matcher_is_made_once_per_list_of_names(by_words):
    _, made = by_words
    rerank(["dog"], "Category")
    rerank(["cat"], "Category")
    assert len(made) == 1
    rerank(["dog"], "Category", category_names=[*NAMES, "bus"])
    assert len(made) == 2


def test_the_language_that_comes_with_it():
    names = ["person", "horse", "hot dog", "dog"]
    boxes = np.arange(4)[:, None] * 20 + np.array([0, 0, 10, 10])
    queries = ["A jockey on two horses.", "someone eats a hot dog", "It is over."]
    horse, hot_dog, nothing = vlnms_d2.rerank(boxes, [0.6, 0.5, 0.4, 0.9], range(4), names, queries)
    assert set(horse.pred_classes[:2].tolist()) == {0, 1}
    kept = hot_dog.pred_classes.tolist()
    assert kept.index(2) < kept.index(3)  # the more confident dog is not meant
    assert nothing.pred_classes.tolist() == [3, 0, 1, 2]


def test_empty_lists():
    assert rerank([], np.zeros((0, 5))) == []
    for empty in ([], np.zeros((0, 4))):
        first, second = rerank(
            "ab", np.zeros((2, 0)), boxes=empty, scores=[], classes=[], score_thresh=0.1
        )
        assert len(first) == len(second) == 0
        assert first.pred_boxes.tensor.shape == (0, 4)
        assert first.candidate_index.dtype == torch.int64


def test_boxes_of_zero_area_are_kept_and_suppress_nothing():
    boxes = np.array([[5, 5, 5, 9], [5, 5, 5, 9], [5, 5, 8, 9]])
    [own] = rerank(boxes=boxes, scores=[0.9, 0.8, 0.7], classes=[0, 0, 0], relatedness=[[1, 1, 1]])
    assert own.candidate_index.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scores": [0.9, float("nan"), 0.5, 0.7, 0.3]}, "score 1 is nan, expected a number from"),
        ({"scores": [0.9, 0.8, -0.5, 0.7, 0.3]}, "score 2 is -0.5"),
        ({"scores": [90, 0.8, 0.5, 0.7, 0.3]}, "score 0 is 90"),
        ({"scores": [0.9]}, r"got \[5, 4\], \[1\] and \[5\]"),
        ({"boxes": BOXES[:, :3]}, r"expected boxes \[N, 4\]"),
        ({"boxes": np.where(BOXES == 80, np.inf, BOXES)}, "box 2 is not finite"),
        ({"classes": [0, 0, 1, 1, 3]}, "classes go from 0 to 3, .* 3 category names"),
        ({"classes": [0, 0, 1, -1, 2]}, "classes go from -1"),
        ({"classes": CLASSES + 0.5}, "classes must be integers"),
        ({"relatedness": np.ones((2, 5))}, r"\[Q, N\] = \[1, 5\], got \[2, 5\]"),
        ({"relatedness": np.full((1, 5), np.nan)}, r"relatedness \[0, 0\] is nan"),
        ({"relatedness": [[1, 1, 1.5, 1, 1]]}, r"relatedness \[0, 2\] is 1.5"),
        ({"relatedness": lambda queries, boxes, classes: [[0.5]]}, r"got \[1, 1\]"),
        ({"relatedness": "FC"}, "relatedness is 'FC', expected \"Category\""),
    ],
)
def test_what_cannot_be_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        rerank(**wrong)


@pytest.mark.parametrize("queries", ["the cat", ["the cat", None]])
def test_queries_are_strings(queries):
    with pytest.raises(TypeError, match="string"):
        vlnms_d2.rerank(BOXES, SCORES, CLASSES, NAMES, queries)


@pytest.mark.parametrize("relatedness", ["Category", np.ones((1, 3))])
@pytest.mark.parametrize("names", ["cup", {0: "cup", 1: "dog"}, {"cup": 0, "dog": 1}])
def test_category_names_are_a_list(names, relatedness):
    boxes = np.array([[0, 0, 9, 9], [5, 5, 20, 30], [2, 2, 9, 9]])
    with pytest.raises(TypeError, match="category_names must be a list of names in class order"):
        vlnms_d2.rerank(
            boxes, [0.9, 0.8, 0.7], [0, 1, 0], names, ["a dog"], relatedness=relatedness
        )


@pytest.mark.parametrize("name", ["", " ", "_", None, 3])
def test_a_category_without_a_name_is_refused(name):
    with pytest.raises(ValueError, match=rf"the category name {name!r} has no words"):
        vlnms_d2.rerank(np.array([[0, 0, 9, 9.0]]), [0.9], [0], ["cup", name], ["a dog"])


def test_boxes_of_the_other_format_are_refused():
    xywh = np.array([[50, 40, 20, 10.0], [30, 60, 9, 80], [0, 0, 5, 5]])
    names, arguments = ["cup", "dog"], ([0.9, 0.8, 0.7], [0, 1, 0])
    with pytest.raises(ValueError, match=r"2 of 3 boxes, as \[50.*not \[x, y, width, height\]"):
        vlnms_d2.rerank(xywh, *arguments, names, ["a dog"])
    xyxy = xywh.copy()
    xyxy[:, 2:] += xyxy[:, :2]
    assert len(vlnms_d2.rerank(xyxy, *arguments, names, ["a dog"], image_size=(140, 70))[0]) == 3
    with pytest.raises(ValueError, match=r"2 of 3 boxes, as .* outside the image"):
        vlnms_d2.rerank(xyxy, *arguments, names, ["a dog"], image_size=(45, 38))
    # Detectors give the odd one.
    assert len(vlnms_d2.rerank(xywh[1:], [0.9, 0.8], [0, 1], names, ["a dog"])[0]) == 2


@pytest.mark.parametrize("cut", [{"topk": 0}, {"score_thresh": float("nan")}])
def test_a_cut_that_is_no_cut_is_refused(cut):
    with pytest.raises(ValueError, match="expected a positive topk, or a negative one for all"):
        vlnms_d2.rerank(np.array([[0, 0, 9, 9.0]]), [0.9], [0], ["cup"], ["a dog"], **cut)
