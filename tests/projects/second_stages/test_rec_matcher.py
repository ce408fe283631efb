"""The reference matcher: its parts against plain ones, padding, and that it learns."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from box_makers import make_regions
from closeness import assert_rounds_alike

from second_stages.optimisation import Schedule
from second_stages.rec_matcher import BoxBatch, ModularLanguage, RECMatcher, lay_out
from second_stages.rec_training import build_matcher, choose, train_matcher
from vlnms_d2.modeling.text import TextFeatures, Vocabulary

QUERIES = ["the red cup", "left", "cup next to the blue ball"]


@pytest.fixture
def matcher() -> RECMatcher:
    torch.manual_seed(0)
    vocabulary = Vocabulary(["the", "red", "cup", "left", "next", "to", "blue", "ball"])
    return RECMatcher(vocabulary, feature_dim=6, num_classes=3, hidden_dim=8, gru_dim=4).eval()


def test_language_against_a_plain_loop():
    torch.manual_seed(0)
    language = ModularLanguage(word_dim=5, num_modules=3)
    words = torch.randn(3, 4, 5)
    lengths = [4, 1, 0]
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    phrases, weights = language(TextFeatures(words * mask[..., None], mask))
    for q, length in enumerate(lengths):
        for m in range(3):
            own = words[q, :length]
            attention = language.attention(own)[:, m].softmax(0)
            expected = (attention[:, None] * own).sum(0)
            assert_rounds_alike(phrases[q, m], expected)
        mean = words[q, :length].mean(0) if length else torch.zeros(5)
        assert_rounds_alike(weights[q], language.module_weights(mean).softmax(0))


@torch.no_grad()
def plain_scores(matcher, regions, query):
    """The scores of one expression by loops over boxes and neighbours."""
    phrases, weights = matcher.language(matcher.text([query]))
    asked = [F.normalize(f(phrases[0, i]), dim=0) for i, f in enumerate(matcher.phrases)]
    one = BoxBatch.of([regions])
    around = lay_out(one.boxes, one.classes, one.mask, one.sizes)
    features = (regions.features.float() - matcher.mean) / matcher.scale
    looks = matcher.appearance(features) + matcher.class_embedding(regions.classes)
    scores = []
    for n in range(len(regions)):
        subject = F.normalize(matcher.subject(looks[n]), dim=0) @ asked[0]
        place = torch.cat([around.place[0, n], around.same[0, n].flatten()])
        location = F.normalize(matcher.location(place), dim=0) @ asked[1]
        relation = torch.tensor(-1.0)
        for k in range(int(around.is_other[0, n].sum())):
            neighbour = torch.cat([looks[around.others[0, n, k]], around.offsets[0, n, k]])
            found = F.normalize(matcher.relation(neighbour), dim=0) @ asked[2]
            relation = torch.maximum(relation, found)
        total = weights[0] @ torch.stack([subject, location, relation])
        scores.append(total * matcher.log_temperature.exp())
    return torch.stack(scores)


@torch.no_grad()
def test_scores_against_a_plain_loop_whatever_the_batch(matcher):
    images = [make_regions(n, seed=n) for n in (7, 1, 4)]
    matcher.fit_scale(torch.cat([one.features for one in images]).float())
    image = torch.tensor([2, 0, 0, 1, 2])  # in no order, as padding must not depend on it
    queries = [QUERIES[i] for i in (0, 1, 2, 2, 1)]
    scores = matcher(BoxBatch.of(images), queries, image)
    assert scores.shape == (5, 7)
    for row, query, i in zip(scores, queries, image.tolist(), strict=True):
        count = len(images[i])
        expected = plain_scores(matcher, images[i], query)
        assert_rounds_alike(row[:count], expected)
        assert (row[count:] == float("-inf")).all()


@torch.no_grad()
def test_an_empty_expression_still_scores(matcher):
    assert matcher(BoxBatch.of([make_regions(3)]), [""], torch.tensor([0])).isfinite().all()


def dataset(num_images=6):
    """Images whose expressions name the class of an object, each class once an image."""
    images, dicts = {}, []
    for image_id in range(1, num_images + 1):
        regions = make_regions(3, seed=image_id, image_id=image_id)
        regions.classes = torch.randperm(3, generator=torch.Generator().manual_seed(image_id))
        images[image_id] = regions
        expressions = [
            {"query": f"the {word}", "ann_id": int(regions.ids[regions.classes == k])}
            for k, word in enumerate(("cup", "ball", "dog"))
        ]
        dicts.append(
            {"image_id": image_id, "file_name": f"{image_id}.jpg", "expressions": expressions}
        )
    return dicts, images


def trained(seed=0):
    dicts, images = dataset()
    matcher = build_matcher(dicts, images, 3, seed)
    train_matcher(matcher, dicts, images, seed, Schedule(epochs=15, images_per_batch=3, lr=5e-3))
    return matcher, dicts, images


def test_it_learns_and_is_the_same_again():
    matcher, dicts, images = trained()
    chosen = choose(matcher, dicts, images, threshold=None)
    for one in dicts:
        found = [int(images[one["image_id"]].ids[c.box]) for c in chosen[one["image_id"]]]
        assert found == [e["ann_id"] for e in one["expressions"]]
    again, _, _ = trained()
    other, _, _ = trained(seed=1)
    same = [
        torch.equal(a, b) for a, b in zip(matcher.parameters(), again.parameters(), strict=True)
    ]
    assert all(same)
    assert not torch.equal(matcher.appearance.weight, other.appearance.weight)


def test_choosing_among_proposals_of_each_expression():
    matcher, dicts, images = trained()
    regions = images[1]
    regions.kept = torch.tensor([[2, -1], [0, 1], [1, 2]])
    regions.kept_scores = torch.tensor([[0.9, 0.0], [0.8, 0.2], [0.01, 0.005]])
    for threshold, seen in ((None, [[2], [0, 1], [1, 2]]), (0.5, [[2], [0], [1]])):
        chosen = choose(matcher, dicts[:1], images, threshold)[1]
        for choice, allowed in zip(chosen, seen, strict=True):
            assert choice.box in allowed


def test_a_referent_without_a_box_is_an_error():
    dicts, images = dataset(1)
    dicts[0]["expressions"][0]["ann_id"] = 99
    matcher = build_matcher(dicts, images, 3, 0)
    with pytest.raises(ValueError, match=r"1\.jpg: an expression's referent is annotation 99"):
        train_matcher(matcher, dicts, images, 0)
