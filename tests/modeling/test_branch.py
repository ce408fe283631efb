"""The relatedness branch: encoding the queries of several images, and scoring them in chunks."""

import math

import pytest
import torch
from closeness import assert_rounds_alike
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_relatedness import (
    KINDS,
    TEXT,
    make,
    make_fc,
    make_locations,
    make_text,
    make_visual,
    random_normal,
)

from vlnms_d2.modeling.branch import RelatednessBranch
from vlnms_d2.modeling.relatedness import Relatedness, RelatednessOutput
from vlnms_d2.modeling.text import TextEncoder, TextFeatures
from vlnms_d2.modeling.text.build import pad_words

WORDS = ["a", "red", "cup", "dog", "left"]


class SpyEncoder(TextEncoder):
    """A vector per word; `calls` are the lists of queries that it was given."""

    output_dim = TEXT

    def __init__(self):
        super().__init__()
        self.calls = []
        self.vectors = random_normal(len(WORDS), TEXT, seed=0)

    def forward(self, queries: list[str]) -> TextFeatures:
        self.calls.append(queries)
        ids = [[WORDS.index(word) for word in query.split()] for query in queries]
        ids, mask, _ = pad_words(ids, torch.device("cpu"))
        return TextFeatures(self.vectors[ids] * mask[..., None], mask)


class SpyRelatedness(Relatedness):
    """Says a query takes 100 bytes; `calls` are the numbers of queries that it was given."""

    def __init__(self):
        super().__init__()
        self.calls, self.asked = [], []

    def forward(self, visual, locations, text, with_attention=False):
        self.calls.append(len(text))
        return RelatednessOutput(text.words.new_zeros(len(text), len(visual)))

    def bytes_per_query(self, num_boxes, num_words):
        self.asked.append((num_boxes, num_words))
        return 100


def make_branch(relatedness: Relatedness, **options) -> RelatednessBranch:
    return RelatednessBranch(None, SpyEncoder(), relatedness, **options)


def score(branch: RelatednessBranch, num_boxes: int, text: TextFeatures, with_attention=True):
    boxes = make_visual(num_boxes), make_locations(num_boxes)
    return branch.score(*boxes, text, with_attention)


# --- queries -----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.lists(st.sampled_from(WORDS), max_size=3).map(" ".join), max_size=5),
        max_size=4,
    )
)
def test_each_distinct_query_is_encoded_once(queries):
    branch = make_branch(make_fc())
    features = branch.encode_queries(queries)
    (call,) = branch.text_encoder.calls
    everything = [text for own in queries for text in own]
    assert len(call) == len(set(call)) and set(call) == set(everything)
    assert len(features) == len(queries)
    for own, found in zip(queries, features, strict=True):
        # Also cut to the longest query of the image.
        expected = SpyEncoder()(own)
        assert torch.equal(found.mask, expected.mask)
        assert torch.equal(found.words, expected.words)


def test_a_query_of_two_images_gets_the_gradients_of_both():
    branch = make_branch(make_fc())
    branch.text_encoder.vectors.requires_grad_()
    features = branch.encode_queries([["red cup"], ["dog", "red cup", "red cup"]])
    sum(own.words.sum() for own in features).backward()
    times = branch.text_encoder.vectors.grad[:, 0].tolist()
    assert dict(zip(WORDS, times, strict=True)) == {"a": 0, "red": 3, "cup": 3, "dog": 1, "left": 0}


# --- chunks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("queries_per_chunk", [0, 1, 2, 3.5])
@torch.no_grad()
def test_scores_in_chunks_equal_those_at_once(queries_per_chunk, kind):
    # Of seed 0, FC with a ReLU would normalise what remains of nearly equal numbers.
    module, text = make(kind), make_text(2, 5, 0, 0, 1, 3, 4, seed=1)
    cost = module.bytes_per_query(4, 5)
    # Two fifths of the bound are for tensors.
    at_once = make_branch(module, chunk_bytes=30 * cost)
    chunked = make_branch(module, chunk_bytes=math.ceil(queries_per_chunk * cost * 5 / 2))
    calls, images = [], []
    module.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[2])))

    def spy(visual, locations, real=module.encode_boxes):
        images.append(len(visual))
        return real(visual, locations)

    module.encode_boxes = spy
    r, output = score(at_once, 4, text)
    assert calls == [7]
    chunked_r, chunked_output = score(chunked, 4, text)
    step = max(1, int(queries_per_chunk))
    assert max(calls[1:]) == step and sum(calls[1:]) == 7
    assert images == [4, 4]  # once per image, whatever the number of chunks
    assert_rounds_alike(chunked_r, r)
    for name, value in vars(output).items():
        found = getattr(chunked_output, name)
        if value is None:
            assert found is None and name == "deltas"
        else:
            assert_rounds_alike(found, value)
    assert output.attention is not None
    assert (output.deltas is not None) == (kind.startswith("Trans") and "unrefined" not in kind)


@pytest.mark.parametrize(
    ("chunk_bytes", "calls"),
    [
        (0, [1, 1, 1, 1, 1]),
        (249, [1, 1, 1, 1, 1]),
        (250, [1, 1, 1, 1, 1]),
        (499, [1, 1, 1, 1, 1]),
        (500, [2, 2, 1]),
        (999, [3, 2]),
        (1250, [5]),
        (1 << 40, [5]),
    ],
)
def test_a_chunk_has_as_many_queries_as_fit_and_at_least_one(chunk_bytes, calls):
    spy = SpyRelatedness()
    r, _ = score(make_branch(spy, chunk_bytes=chunk_bytes), 3, make_text(1, 2, 4, 0, 3))
    assert spy.calls == calls and r.shape == (5, 3)
    assert spy.asked == [(3, 4)]


def test_a_module_that_takes_nothing_gets_all_queries_at_once():
    spy = SpyRelatedness()
    spy.bytes_per_query = lambda num_boxes, num_words: 0
    score(make_branch(spy), 0, make_text(1, 2, 3))
    assert spy.calls == [3]


@pytest.mark.parametrize("with_attention", [True, False])
@torch.no_grad()
def test_every_chunk_is_asked_for_what_the_caller_asks_for(with_attention):
    branch = make_branch(make("Trans joint"), chunk_bytes=0)
    _, output = score(branch, 3, make_text(2, 4), with_attention)
    assert (output.attention is not None) == with_attention


# --- what comes out ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("chunk_bytes", [0, 1 << 28])
@torch.no_grad()
def test_empty_queries_leave_the_boxes_as_they_are(chunk_bytes, kind):
    module, text = make(kind), make_text(0, 3, 0, 1)
    r, output = score(make_branch(module, chunk_bytes=chunk_bytes), 4, text)
    direct = module(make_visual(4), make_locations(4), text)
    assert torch.equal(r[[0, 2]], torch.ones(2, 4))
    assert_rounds_alike(r[[1, 3]], direct.logits[[1, 3]].sigmoid())
    assert (r[[1, 3]] < 1).all()
    assert not output.attention[[0, 2]].any()
    if direct.deltas is not None:
        assert not output.deltas[[0, 2]].any() and direct.deltas[0].any()
        assert_rounds_alike(output.deltas[[1, 3]], direct.deltas[[1, 3]])


def test_an_empty_query_gets_1_also_where_the_module_gives_nan():
    class Nan(SpyRelatedness):
        def forward(self, visual, locations, text, with_attention=False):
            nan = torch.full((len(text), len(visual)), torch.nan)
            return RelatednessOutput(nan, None, nan[..., None].expand(-1, -1, 4))

    r, output = score(make_branch(Nan()), 2, make_text(0, 0))
    assert torch.equal(r, torch.ones(2, 2)) and torch.equal(output.deltas, torch.zeros(2, 2, 4))


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(
    ("num_boxes", "lengths"), [(0, (2, 3)), (3, ()), (0, ()), (3, (0, 0)), (0, (0,))]
)
@torch.no_grad()
def test_without_boxes_queries_or_words(num_boxes, lengths, kind):
    shape = (len(lengths), num_boxes)
    r, output = score(make_branch(make(kind), chunk_bytes=0), num_boxes, make_text(*lengths))
    assert r.shape == output.logits.shape == shape
    assert output.deltas is None or output.deltas.shape == (*shape, 4)
    assert torch.isfinite(r).all()
