"""Multi-head attention and the gated feed-forward layer, against loops over tokens and heads."""

import plain_attention
import pytest
import torch
import torch.nn.functional as F
from closeness import assert_rounds_alike
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_relatedness import random_normal

from vlnms_d2.modeling.relatedness.trans_layers import Attention, FeedForward, key_bias

DIM = 8


def make_attention(num_heads: int = 2) -> Attention:
    torch.manual_seed(0)
    attention = Attention(DIM, num_heads)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    return attention


def make_mask(*lengths: int) -> torch.Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def random_case(num_tokens: int, *lengths: int, seed: int = 0):
    """Tokens, context and a mask of so many keys per query."""
    tokens = random_normal(len(lengths), num_tokens, DIM, seed=seed)
    context = random_normal(len(lengths), max(lengths), DIM, seed=seed + 1)
    return tokens, context, make_mask(*lengths)


@settings(max_examples=40, deadline=None)
@given(
    num_heads=st.sampled_from([1, 2, 4, 8]),
    num_tokens=st.integers(1, 4),
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
)
@torch.no_grad()
def test_attention_equals_a_loop_over_tokens_and_heads(num_heads, num_tokens, lengths, seed):
    attention = make_attention(num_heads).double()
    tokens, context, mask = random_case(num_tokens, *lengths, seed=seed)
    tokens, context = tokens.double(), context.double()
    found = attention(tokens, context, key_bias(mask))
    weights = attention.weights(tokens, context, key_bias(mask))
    assert found.shape == tokens.shape and weights.shape == (len(lengths), num_tokens, max(lengths))
    for i, length in enumerate(lengths):
        outputs, shares = plain_attention.attend(
            attention, list(tokens[i]), list(context[i, :length]), [length] * length
        )
        torch.testing.assert_close(found[i], torch.stack(outputs))
        torch.testing.assert_close(weights[i, :, :length], shares)
        assert (weights[i, :, length:] == 0).all()


@torch.no_grad()
def test_the_bias_is_added_to_the_logits():
    attention, (tokens, context, _) = make_attention(num_heads=1), random_case(3, 4)
    odds = torch.tensor([[1.0, 2.0, 3.0, 0.5]])
    plain = attention.weights(tokens, context, torch.zeros(1, 4))
    expected = F.normalize(plain * odds, p=1, dim=-1)
    torch.testing.assert_close(attention.weights(tokens, context, odds.log()), expected)


def test_padding_gets_nothing_and_the_others_one_over_their_number():
    bias = key_bias(make_mask(4, 1, 2))
    assert bias.dtype == torch.float32
    shares = bias.exp()
    expected = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1, 0, 0, 0], [0.5, 0.5, 0, 0]])
    torch.testing.assert_close(shares, expected)


def test_two_kinds_of_keys_weigh_the_same_whatever_their_numbers():
    """Equal logits: each kind gets half of the attention."""
    words, boxes = key_bias(make_mask(2, 5)), key_bias(torch.ones(2, 300, dtype=torch.bool))
    shares = torch.cat([words, boxes], dim=1).softmax(dim=1)
    torch.testing.assert_close(shares[:, :5].sum(dim=1), torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_bias_without_queries_or_keys(shape):
    assert key_bias(torch.zeros(shape, dtype=torch.bool)).shape == shape


@pytest.mark.parametrize("logit", [0.0, 1e30])
def test_a_row_of_padding_alone_gives_finite_numbers_and_gradients(logit):
    attention, (tokens, context, mask) = make_attention(), random_case(3, 4, 0)
    assert torch.isfinite(key_bias(mask)).all()
    with torch.no_grad():
        attention.query.bias += logit**0.5
        attention.key_value.bias[:DIM] += logit**0.5
        inference = attention(tokens, context, key_bias(mask))
    assert torch.isfinite(inference).all()
    assert torch.isfinite(attention.weights(tokens, context, key_bias(mask))).all()
    training = attention(tokens, context, key_bias(mask))
    training.sum().backward()
    assert torch.isfinite(training).all()
    assert all(torch.isfinite(p.grad).all() for p in attention.parameters())


def test_training_and_inference_take_different_kernels_of_the_same_numbers(monkeypatch):
    """The fused kernel for inference, the plain one where there will be a backward."""
    fused = []

    def spy(*args, **kwargs):
        fused.append(torch.backends.cuda.flash_sdp_enabled())
        return real(*args, **kwargs)

    real = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    attention, (tokens, context, mask) = make_attention(), random_case(5, 3, 7, 1, 0)
    training = attention(tokens, context, key_bias(mask))
    with torch.no_grad():
        inference = attention(tokens, context, key_bias(mask))
    assert fused == [False, True] and torch.backends.cuda.flash_sdp_enabled()
    assert training.requires_grad and not inference.requires_grad
    assert_rounds_alike(inference, training)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_autocast_is_near_full_precision(dtype):
    attention, (tokens, context, mask) = make_attention(), random_case(5, 3, 7, 1)
    bias = key_bias(mask)
    exact, exact_weights = (f(tokens, context, bias) for f in (attention, attention.weights))
    with torch.autocast("cpu", dtype=dtype):
        found, weights = (f(tokens, context, bias) for f in (attention, attention.weights))
    torch.testing.assert_close(found.float(), exact, atol=0.1, rtol=0.02)
    torch.testing.assert_close(weights.float(), exact_weights, atol=0.02, rtol=0)


@torch.no_grad()
def test_padding_alone_is_finite_in_half_precision_too():
    attention, (tokens, context, _) = make_attention(), random_case(5, 3, 7, 1)
    mask = torch.zeros(context.shape[:2], dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.float16):
        query, key, value = attention.queries(tokens), *attention.keys_and_values(context)
        bias = key_bias(mask)
        assert torch.isfinite(attention.attend(query, key, value, bias)).all()
        # All keys alike, as in full precision.
        even = value.mean(dim=2, keepdim=True).expand_as(query).transpose(1, 2).flatten(2)
        torch.testing.assert_close(
            attention.attend(query * 0, key, value, bias), attention.out(even), atol=0.02, rtol=0
        )


@torch.no_grad()
def test_feed_forward_is_a_linear_unit_times_a_relu_gate():
    torch.manual_seed(0)
    ffn, x = FeedForward(DIM, 5).double(), random_normal(2, 3, DIM, seed=0).double()
    weight, bias = ffn.hidden_and_gate.weight, ffn.hidden_and_gate.bias
    assert weight.shape == (10, DIM)
    expected = torch.zeros(2, 3, DIM).double()
    for i in range(2):
        for j in range(3):
            hidden = [
                (weight[k] @ x[i, j] + bias[k]) * max(0, weight[k + 5] @ x[i, j] + bias[k + 5])
                for k in range(5)
            ]
            expected[i, j] = ffn.out.weight @ torch.stack(hidden) + ffn.out.bias
            torch.testing.assert_close(plain_attention.feed_forward(ffn, x[i, j]), expected[i, j])
    torch.testing.assert_close(ffn(x), expected)
