"""Stacked cross-attention and its loss, against plain ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from box_makers import make_regions
from closeness import FEW_LAYERS, assert_rounds_alike

from second_stages.optimisation import Schedule
from second_stages.retrieval import (
    StackedCrossAttention,
    build_cross_attention,
    compare_all,
    train_cross_attention,
    triplet_loss,
)
from vlnms_d2.modeling.text import TextFeatures, Vocabulary


@pytest.fixture
def model() -> StackedCrossAttention:
    torch.manual_seed(0)
    return StackedCrossAttention(Vocabulary(["red", "cup", "ball"]), 6, embed_dim=5, joint_dim=8)


def plain_similarity(boxes, words, smoothing):
    """SCAN i-t AVG of one image and one caption, as its equations go."""
    cosines = torch.tensor([[float(v @ e) for e in words] for v in boxes])
    positive = cosines.clamp(min=0)
    length = positive.square().sum(0).sqrt().clamp(min=1e-12)
    total = 0.0
    for i, box in enumerate(boxes):
        weights = (smoothing * positive[i] / length).softmax(0)
        attended = (weights[:, None] * words).sum(0)
        total += float(F.cosine_similarity(box, attended, dim=0))
    return total / len(boxes)


def encoded(lengths, dim=8, seed=0):
    """Unit vectors float [len, max, dim], zero behind their length, and the mask."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    vectors = F.normalize(torch.randn(*mask.shape, dim, generator=generator), dim=-1)
    return vectors, mask


def test_against_the_equations_whatever_the_padding(model):
    boxes, mask = encoded([4, 1, 6])
    words, word_mask = encoded([3, 5], seed=1)
    words = words * word_mask[..., None]
    similarities = model(boxes, mask, TextFeatures(words, word_mask))
    for i in range(3):
        for c in range(2):
            expected = plain_similarity(boxes[i, mask[i]], words[c, word_mask[c]], model.smoothing)
            assert float(similarities[i, c]) == pytest.approx(expected, abs=FEW_LAYERS)


def test_pairs_are_the_same_as_all_against_all(model):
    boxes, mask = encoded([4, 2])
    words, word_mask = encoded([3, 5], seed=1)
    text = TextFeatures(words * word_mask[..., None], word_mask)
    pairs = model.compare_pairs(boxes, mask, text)
    assert_rounds_alike(pairs, model(boxes, mask, text).diagonal())


def test_pairs_of_several_images_are_those_of_each(model):
    boxes, mask = encoded([4, 2, 3, 1, 0, 5])
    words, word_mask = encoded([3, 5], seed=1)
    text = TextFeatures(words * word_mask[..., None], word_mask)
    boxes, mask = boxes.view(3, 2, *boxes.shape[1:]), mask.view(3, 2, -1)
    each = torch.stack([model.compare_pairs(boxes[i], mask[i], text) for i in range(3)])
    assert_rounds_alike(model.compare_pairs(boxes, mask, text), each)


@torch.no_grad()
def test_captions_without_words_and_images_without_boxes(model):
    text = model.encode_captions(["red cup", ""])
    similarities = model(torch.zeros(1, 2, 8), torch.zeros(1, 2, dtype=torch.bool), text)
    assert similarities.tolist() == [[0.0, 0.0]]
    boxes, mask = encoded([3])
    similarities = model(boxes, mask, text)
    assert similarities.isfinite().all()
    assert float(similarities[0, 1]) == 0.0


@pytest.mark.parametrize("hardest", [True, False])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_loss_against_a_plain_loop(size, hardest):
    similarities = torch.randn(size, size, generator=torch.Generator().manual_seed(size))
    expected = 0.0
    for i in range(size):
        own = float(similarities[i, i])
        others = [j for j in range(size) if j != i]
        for wrong in ([similarities[i, j] for j in others], [similarities[j, i] for j in others]):
            losses = [max(0.0, 0.2 + float(w) - own) for w in wrong]
            expected += max(losses, default=0.0) if hardest else sum(losses) / max(size - 1, 1)
    assert float(triplet_loss(similarities, hardest)) == pytest.approx(expected, abs=FEW_LAYERS)


def dataset(num_images=8):
    """Images whose boxes all look like their word, which their captions say."""
    vocabulary = [f"word{k}" for k in range(num_images)]
    images, dicts = {}, []
    looks = torch.randn(num_images, 6, generator=torch.Generator().manual_seed(5))
    for k, word in enumerate(vocabulary):
        regions = make_regions(2 + k % 3, seed=k, image_id=k)
        regions.features = (looks[k] + 0.1 * regions.features).half()
        images[k] = regions
        captions = [{"sent_id": 10 * k + n, "query": f"a {word}"} for n in range(2)]
        dicts.append({"image_id": k, "expressions": captions})
    return dicts, images


def trained(seed=0, epochs=20):
    dicts, images = dataset()
    model = build_cross_attention(dicts, images, seed)
    train_cross_attention(model, dicts, images, seed, Schedule(epochs, 8, 5e-3))
    return model, dicts, images


def test_it_learns_and_is_the_same_again():
    model, dicts, images = trained()
    rows = dict(compare_all(model, dicts, images, num_boxes=None))
    similarities = torch.stack([rows[one["image_id"]] for one in dicts])
    assert (similarities.argmax(dim=0) == torch.arange(8).repeat_interleave(2)).all()
    again, _, _ = trained()
    assert torch.equal(model.project.weight, again.project.weight)


def test_boxes_of_each_pair_are_those_that_the_caption_keeps():
    model, dicts, images = trained()
    everything = dict(compare_all(model, dicts, images, num_boxes=None))
    num_captions = 2 * len(dicts)
    for regions in images.values():
        regions.kept = torch.arange(len(regions)).repeat(num_captions, 1)
        regions.kept_scores = torch.ones(num_captions, len(regions))
    for image_id, row in compare_all(model, dicts, images, num_boxes=None):
        assert_rounds_alike(row, everything[image_id])
    for regions in images.values():
        regions.kept[:, 1:] = -1
    first = dict(compare_all(model, dicts, images, num_boxes=None))
    for regions in images.values():
        regions.kept = None
    for image_id, row in compare_all(model, dicts, images, num_boxes=1):
        assert_rounds_alike(row, first[image_id])


def test_boxes_for_other_captions_are_an_error():
    dicts, images = dataset()
    model = build_cross_attention(dicts, images, 0)
    images[0].kept = torch.zeros(3, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="image 0 has boxes for 3 captions, expected 16"):
        list(compare_all(model, dicts, images, num_boxes=10))


def keep(images, dicts, boxes_of, group=None):
    """Let each image keep `boxes_of` it for the captions of its group of images."""
    group = group or len(dicts)
    for start in range(0, len(dicts), group):
        members = dicts[start : start + group]
        sent_ids = [e["sent_id"] for one in members for e in one["expressions"]]
        for one in members:
            regions = images[one["image_id"]]
            regions.sent_ids = torch.tensor(sent_ids)
            regions.kept = boxes_of(regions).repeat(len(sent_ids), 1)
            regions.kept_scores = torch.ones(regions.kept.shape)


def test_to_learn_from_all_boxes_of_each_pair_is_to_learn_from_those_of_the_image():
    # Two epochs: Adam makes steps of gradients that are rounding alone, and after 20 epochs weights
    # of equal models can differ by percents.
    expected, dicts, images = trained(epochs=2)
    keep(images, dicts, lambda regions: torch.arange(len(regions)))
    model = build_cross_attention(dicts, images, 0)
    train_cross_attention(model, dicts, images, 0, Schedule(2, 8, 5e-3))
    assert_rounds_alike(model.project.weight, expected.project.weight)


def test_to_learn_from_the_first_boxes_is_not_to_see_the_others():
    def learnt(cut, num_boxes):
        dicts, images = dataset()
        model = build_cross_attention(dicts, images, 0)  # its scale is that of all boxes
        if cut:
            keep(images, dicts, lambda regions: torch.arange(len(regions))[:num_boxes])
        train_cross_attention(
            model, dicts, images, 0, Schedule(2, 8, 5e-3), num_boxes=None if cut else num_boxes
        )
        return model.project.weight

    assert_rounds_alike(learnt(True, 1), learnt(False, 1))


def test_batches_are_of_images_that_were_asked_the_same():
    dicts, images = dataset()
    keep(images, dicts, lambda regions: torch.arange(len(regions)), group=3)
    asked = []
    model = build_cross_attention(dicts, images, 0)
    encode = model.encode_captions
    model.encode_captions = lambda captions: asked.append(captions) or encode(captions)
    train_cross_attention(model, dicts, images, 0, Schedule(2, 2, 5e-3))
    group_of = {e["query"]: k // 3 for k, one in enumerate(dicts) for e in one["expressions"]}
    assert all(len({group_of[query] for query in batch}) == 1 for batch in asked)
    # An epoch: two batches of the groups of three, one of the group of two; every image once.
    epochs = [sorted(query for batch in asked[k : k + 5] for query in batch) for k in (0, 5)]
    assert len(asked) == 10
    assert all(epoch == sorted(one["expressions"][0]["query"] for one in dicts) for epoch in epochs)


def test_an_image_without_boxes_for_its_own_captions_is_an_error():
    dicts, images = dataset()
    keep(images, dicts[1:], lambda regions: torch.arange(len(regions)))
    images[0].sent_ids, images[0].kept = images[1].sent_ids, images[1].kept
    model = build_cross_attention(dicts, images, 0)
    with pytest.raises(ValueError, match="image 0 has no boxes for its captions"):
        train_cross_attention(model, dicts, images, 0)
