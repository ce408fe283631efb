"""The layers of the Trans module written token by token and head by head.

Every query stands alone, so there is no padding. Tokens are lists of vectors [D].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vlnms_d2.modeling.relatedness import Trans
from vlnms_d2.modeling.relatedness.trans_layers import (
    Attention,
    CoAttentionLayer,
    FeedForward,
    JointLayer,
    StreamLayer,
)

Tokens = list[Tensor]


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return layer.weight @ x + layer.bias


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean()
    return centred / (centred.square().mean() + 1e-5).sqrt() * norm.weight + norm.bias


def feed_forward(ffn: FeedForward, x: Tensor) -> Tensor:
    hidden_and_gate = linear(ffn.hidden_and_gate, x)
    half = len(hidden_and_gate) // 2
    return linear(ffn.out, hidden_and_gate[:half] * hidden_and_gate[half:].clamp(min=0))


def attend(
    attention: Attention, tokens: Tokens, context: Tokens, counts: list[int]
) -> tuple[Tokens, Tensor]:
    """What the tokens get, and the weights [T, S], averaged over the heads.

    Args:
        counts: per key the number of keys of its kind; it counts as one over that.
    """
    dim = len(attention.query.bias)
    head_dim = dim // attention.num_heads
    keys_values = [linear(attention.key_value, c) for c in context]
    outputs, weights = [], []
    for token in tokens:
        query = linear(attention.query, token)
        mixed, shares = [], []
        for start in range(0, dim, head_dim):
            head = slice(start, start + head_dim)
            scores = [
                (query[head] @ kv[:dim][head] / math.sqrt(head_dim)).exp() / count
                for kv, count in zip(keys_values, counts, strict=True)
            ]
            share = [score / sum(scores) for score in scores]
            values = [s * kv[dim:][head] for s, kv in zip(share, keys_values, strict=True)]
            mixed.append(sum(values, torch.zeros(head_dim).to(query)))
            shares.append(torch.stack(share) if share else query.new_zeros(0))
        outputs.append(linear(attention.out, torch.cat(mixed)))
        weights.append(torch.stack(shares).mean(dim=0))
    return outputs, torch.stack(weights) if weights else torch.zeros(0, len(context))


def normed(norm: nn.LayerNorm, tokens: Tokens) -> Tokens:
    return [layer_norm(norm, token) for token in tokens]


def add(tokens: Tokens, others: Tokens) -> Tokens:
    return [token + other for token, other in zip(tokens, others, strict=True)]


def add_ffn(layer: JointLayer | StreamLayer, tokens: Tokens) -> Tokens:
    return [t + feed_forward(layer.ffn, layer_norm(layer.norm_ffn, t)) for t in tokens]


def each(tokens: Tokens) -> list[int]:
    return [len(tokens)] * len(tokens)


def joint(layer: JointLayer, words: Tokens, boxes: Tokens) -> tuple[Tokens, Tokens, Tensor]:
    """Words and boxes after the layer, and the word attention [N, L] in it."""
    tokens = words + boxes
    before = normed(layer.norm_attention, tokens)
    mixed, _ = attend(layer.attention, before, before, each(words) + each(boxes))
    own_words, own_boxes = before[: len(words)], before[len(words) :]
    _, weights = attend(layer.attention, own_boxes, own_words, each(words))
    tokens = add_ffn(layer, add(tokens, mixed))
    return tokens[: len(words)], tokens[len(words) :], weights


def stream(
    layer: StreamLayer, own: Tokens, own_normed: Tokens, other_normed: Tokens
) -> tuple[Tokens, Tensor]:
    crossed, weights = attend(layer.cross_attention, own_normed, other_normed, each(other_normed))
    own = add(own, crossed)
    before = normed(layer.norm_self, own)
    own = add(own, attend(layer.self_attention, before, before, each(own))[0])
    return add_ffn(layer, own), weights


def co_attention(layer, words: Tokens, boxes: Tokens) -> tuple[Tokens, Tokens, Tensor]:
    """See `joint`."""
    normed_words = normed(layer.norm_words, words)
    normed_boxes = normed(layer.norm_boxes, boxes)
    boxes, weights = stream(layer.boxes, boxes, normed_boxes, normed_words)
    if layer.words is not None:
        words, _ = stream(layer.words, words, normed_words, normed_boxes)
    return words, boxes, weights


ONE_LAYER = {JointLayer: joint, CoAttentionLayer: co_attention}


def plain_trans(
    trans: Trans, visual: Tensor, locations: Tensor, words: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits [N], word attention [N, L] and deltas [N, 4] of at least one box and one query."""
    words = [linear(trans.word_token, word) for word in words]
    boxes = [
        linear(trans.visual_token[1], layer_norm(trans.visual_token[0], v))
        + linear(trans.location_token, where)
        for v, where in zip(visual, locations, strict=True)
    ]
    if trans.box_layers:
        for layer in trans.box_layers:
            _, boxes, _ = joint(layer, [], boxes)
        boxes = [linear(trans.narrow_token[1], b) for b in normed(trans.narrow_token[0], boxes)]
    for layer in trans.layers:
        words, boxes, attention = ONE_LAYER[type(layer)](layer, words, boxes)
    hidden = normed(trans.norm, boxes)
    logits = torch.cat([linear(trans.fc_r, h) for h in hidden])
    if trans.mlp_t is None:
        return logits, attention, None
    mlp_t = trans.mlp_t
    norm, first, _, second = mlp_t.from_visual
    deltas = []
    for h, v in zip(hidden, visual, strict=True):
        own = linear(second, linear(first, layer_norm(norm, v)).clamp(min=0))
        both = (linear(mlp_t.from_hidden, h) + own).clamp(min=0)
        deltas.append(linear(mlp_t.out, linear(mlp_t.hidden, both).clamp(min=0)))
    return logits, attention, torch.stack(deltas)
