"""The layers of Trans and their blocks, attention and feed-forward, in plain PyTorch."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class Attention(nn.Module):
    """Multi-head attention, by torch's `scaled_dot_product_attention`.

    Args:
        dim: width of the tokens.
        num_heads: number of heads, each of width `dim / num_heads`.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, context: Tensor, bias: Tensor) -> Tensor:
        """Let the tokens attend to the context.

        Args:
            tokens: float [Q, T, D], or [1, T, D] if they are the same for every query.
            context: float [Q, S, D], or [1, S, D] likewise.
            bias: float [Q, S], added to the attention logits; see `key_bias`.

        Returns:
            float [Q, T, D].
        """
        return self.attend(self.queries(tokens), *self.keys_and_values(context), bias)

    def queries(self, tokens: Tensor) -> Tensor:
        """Attention queries [Q, heads, T, D / heads] from tokens [Q, T, D]."""
        return self._split(self.query(tokens))

    def keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, [Q, heads, S, D / heads] each, from context [Q, S, D]."""
        key, value = self.key_value(context).chunk(2, dim=-1)
        return self._split(key), self._split(value)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """The second half of `forward`, on the outputs of `queries` and `keys_and_values`."""
        query, key, value = (x.expand(len(bias), -1, -1, -1) for x in (query, key, value))
        bias = bias[:, None, None].to(query.dtype)  # [Q, 1, 1, S]
        # `key_bias` is finite in float32 but may not be in half precision.
        bias = bias.clamp(min=torch.finfo(query.dtype).min / 2)
        with _fastest_kernel(query):
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def weights(self, tokens: Tensor, context: Tensor, bias: Tensor) -> Tensor:
        """The attention weights, averaged over the heads: float [Q, T, S]."""
        query, (key, _) = self.queries(tokens), self.keys_and_values(context)
        logits = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
        return (logits + bias[:, None, None]).softmax(dim=-1).mean(dim=1)

    def _split(self, x: Tensor) -> Tensor:
        """[Q, T, D] -> [Q, heads, T, D / heads]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def _fastest_kernel(query: Tensor) -> AbstractContextManager:
    """A context that selects the plain attention kernel for training on the CPU, where the fused
    kernel's backward pass takes several times as long."""
    if query.is_cpu and query.requires_grad:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def key_bias(mask: Tensor) -> Tensor:
    """Bias on attention logits that excludes padding and weights each of n keys by 1 / n.

    Among words alone or boxes alone the weight makes no difference. If words and boxes are keys of
    one attention, it keeps the balance between them independent of their numbers: a training step
    has tens of boxes, inference hundreds.

    Args:
        mask: bool [Q, S], False for padding.

    Returns:
        float32 [Q, S]; finite, so that a row of padding alone gives no NaN.
    """
    count = mask.sum(dim=1, keepdim=True).clamp(min=1)  # [Q, 1]
    # Half of the minimum, so that the sum with a logit is finite too.
    return torch.where(mask, -count.log(), torch.finfo(torch.float32).min / 2)


class FeedForward(nn.Module):
    """A gated linear unit with a ReLU (Shazeer, "GLU Variants Improve Transformer", 2020).

    A box's token is the sum of its appearance and of the words that it attended to. The gate allows
    the one to be multiplied by the other, as the FC module does.
    """

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.hidden_and_gate = nn.Linear(dim, 2 * hidden_dim)
        self.out = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        hidden, gate = self.hidden_and_gate(x).chunk(2, dim=-1)
        return self.out(hidden * gate.relu())


class JointLayer(nn.Module):
    """Self-attention over words and boxes in one sequence, then a feed-forward block.

    Args:
        dim: width D of the tokens.
        num_heads, ffn_dim: attention heads, and hidden width of the feed-forward block.
        dropout: dropout on the output of each block.
        last: whether this is the last layer. Nothing reads its words, so they stay unchanged.
    """

    def __init__(self, dim: int, num_heads: int, ffn_dim: int, dropout: float, last: bool = False):
        super().__init__()
        self.norm_attention, self.norm_ffn = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, num_heads)
        self.ffn = FeedForward(dim, ffn_dim)
        self.dropout = nn.Dropout(dropout)
        self.last = last

    def forward(
        self, words: Tensor, boxes: Tensor, word_bias: Tensor, box_bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Fuse words and boxes.

        Args:
            words: float [Q, L, D].
            boxes: float [Q, N, D], or [1, N, D] if they are the same for every query, as before
                the first layer; what precedes the attention is then computed only once.
            word_bias, box_bias: float [Q, L] and [Q, N]; see `key_bias`.

        Returns:
            words [Q, L, D] and boxes [Q, N, D].
        """
        tokens = boxes if self.last else _one_sequence(words, boxes)  # [Q, L + N, D] if not last
        tokens = tokens + self.dropout(self._attend(words, boxes, word_bias, box_bias))
        tokens = tokens + self.dropout(self.ffn(self.norm_ffn(tokens)))
        if self.last:
            return words, tokens
        return tokens.tensor_split([words.shape[1]], dim=1)

    def _attend(self, words: Tensor, boxes: Tensor, word_bias: Tensor, box_bias: Tensor) -> Tensor:
        """The attention's output: [Q, L + N, D], or in the last layer [Q, N, D] for the boxes."""
        words, boxes = self.norm_attention(words), self.norm_attention(boxes)
        queries = self.attention.queries(boxes)
        if not self.last:
            queries = _one_sequence(self.attention.queries(words), queries)
        keys, values = map(
            _one_sequence,
            self.attention.keys_and_values(words),
            self.attention.keys_and_values(boxes),
        )
        bias = torch.cat([word_bias, box_bias], dim=1)
        return self.attention.attend(queries, keys, values, bias)

    def word_attention(self, words: Tensor, boxes: Tensor, word_bias: Tensor) -> Tensor:
        """Attention weights of the boxes over the words: float [Q, N, L]."""
        words, boxes = self.norm_attention(words), self.norm_attention(boxes)
        return self.attention.weights(boxes, words, word_bias)


def _one_sequence(words: Tensor, boxes: Tensor) -> Tensor:
    """Concatenate words [Q, ..., L, D] and boxes [Q or 1, ..., N, D]."""
    return torch.cat([words, boxes.expand(len(words), *boxes.shape[1:])], dim=-2)


class StreamLayer(nn.Module):
    """The layer of one of the two streams of a `CoAttentionLayer`; arguments as there."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int, dropout: float):
        super().__init__()
        self.norm_self, self.norm_ffn = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.cross_attention = Attention(dim, num_heads)
        self.self_attention = Attention(dim, num_heads)
        self.ffn = FeedForward(dim, ffn_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, crossed: Tensor, bias: Tensor) -> Tensor:
        """Add the cross-attention, attend to this stream, then apply the feed-forward block.

        Args:
            tokens: float [Q, T, D], this stream.
            crossed: float [Q, T, D], the output of `cross_attention`.
            bias: float [Q, T]; see `key_bias`.
        """
        tokens = tokens + self.dropout(crossed)
        normed = self.norm_self(tokens)
        tokens = tokens + self.dropout(self.self_attention(normed, normed, bias))
        return tokens + self.dropout(self.ffn(self.norm_ffn(tokens)))


class CoAttentionLayer(nn.Module):
    """Two streams: words attend to boxes and boxes to words (both as they enter the layer), then
    each stream attends to itself and passes through a feed-forward block.

    Args:
        dim, num_heads, ffn_dim, dropout: of each stream, as for `JointLayer`.
        last: whether this is the last layer. Nothing reads its words, so it has no word stream.
    """

    def __init__(self, dim: int, num_heads: int, ffn_dim: int, dropout: float, last: bool = False):
        super().__init__()
        self.norm_words, self.norm_boxes = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.words = None if last else StreamLayer(dim, num_heads, ffn_dim, dropout)
        self.boxes = StreamLayer(dim, num_heads, ffn_dim, dropout)

    def forward(
        self, words: Tensor, boxes: Tensor, word_bias: Tensor, box_bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `JointLayer.forward`."""
        normed_words, normed_boxes = self.norm_words(words), self.norm_boxes(boxes)
        crossed = self.boxes.cross_attention(normed_boxes, normed_words, word_bias)
        boxes = self.boxes(boxes, crossed, box_bias)
        if self.words is not None:
            crossed = self.words.cross_attention(normed_words, normed_boxes, box_bias)
            words = self.words(words, crossed, word_bias)
        return words, boxes

    def word_attention(self, words: Tensor, boxes: Tensor, word_bias: Tensor) -> Tensor:
        """See `JointLayer.word_attention`."""
        return self.boxes.cross_attention.weights(
            self.norm_boxes(boxes), self.norm_words(words), word_bias
        )


FUSION_LAYERS = {
    "joint": JointLayer,
    "co_attention": CoAttentionLayer,
    "cross_attention": JointLayer,
}
