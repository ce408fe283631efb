"""Multi-head attention and the layers that fuse words and boxes. Plain torch."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class Attention(nn.Module):
    """Multi-head attention, on torch's own `scaled_dot_product_attention`.

    Args:
        dim: width of the tokens.
        num_heads: heads; they share the width.
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
            tokens: float [Q, T, D], or [1, T, D] where they are the same for every query.
            context: float [Q, S, D], or [1, S, D] likewise.
            bias: float [Q, S], added to the attention's logits; see `key_bias`.

        Returns:
            float [Q, T, D].
        """
        return self.attend(self.queries(tokens), *self.keys_and_values(context), bias)

    def queries(self, tokens: Tensor) -> Tensor:
        """Tokens [Q, T, D] as queries [Q, heads, T, D / heads]."""
        return self._split(self.query(tokens))

    def keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Context [Q, S, D] as keys and values, [Q, heads, S, D / heads] each."""
        key, value = self.key_value(context).chunk(2, dim=-1)
        return self._split(key), self._split(value)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """The second half of `forward`, from what the other two methods gave."""
        query, key, value = (x.expand(len(bias), -1, -1, -1) for x in (query, key, value))
        bias = bias[:, None, None].to(query.dtype)
        # Finite in half precision as well.
        bias = bias.clamp(min=torch.finfo(query.dtype).min / 2)
        with _training_kernel(query):
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


def _training_kernel(query: Tensor) -> AbstractContextManager:
    """On the CPU, the fused kernel's backward takes several times as long as the plain one's."""
    if query.is_cpu and query.requires_grad:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def key_bias(mask: Tensor) -> Tensor:
    """Bias of attention logits: padding gets nothing, the others each one over their number.

    For keys of one kind the number makes no difference. Where words and boxes are keys of one
    attention, it makes the balance between them independent of how many there are of each: there
    are some tens of boxes in a training step and hundreds at inference.

    Args:
        mask: bool [Q, S], False for padding.

    Returns:
        float32 [Q, S]; finite, so that a row of padding alone gives no NaN.
    """
    count = mask.sum(dim=1, keepdim=True).clamp(min=1)
    # Half of the least, since attention adds the logit to it.
    return torch.where(mask, -count.log(), torch.finfo(torch.float32).min / 2)


class FeedForward(nn.Module):
    """A gated linear unit with a ReLU (Shazeer, "GLU Variants Improve Transformer", 2020).

    What a box saw of the words and what it looks like are summed in its token; the gate lets
    the one multiply the other, as the FC module does.
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
        dim, num_heads, ffn_dim: widths and heads.
        dropout: on what each block adds.
        last: nothing reads the words behind this layer; they leave it as they came.
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
            boxes: float [Q, N, D], or [1, N, D] where they are the same for every query, as
                before the first layer: what comes before the attention is then done once.
            word_bias, box_bias: float [Q, L] and [Q, N]; see `key_bias`.

        Returns:
            words [Q, L, D] and boxes [Q, N, D].
        """
        tokens = boxes if self.last else _one_sequence(words, boxes)
        tokens = tokens + self.dropout(self._attend(words, boxes, word_bias, box_bias))
        tokens = tokens + self.dropout(self.ffn(self.norm_ffn(tokens)))
        if self.last:
            return words, tokens
        return tokens.tensor_split([words.shape[1]], dim=1)

    def _attend(self, words: Tensor, boxes: Tensor, word_bias: Tensor, box_bias: Tensor) -> Tensor:
        """What the attention adds to words and boxes, or in the last layer to the boxes."""
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
        """How the boxes share out their attention among the words: float [Q, N, L]."""
        words, boxes = self.norm_attention(words), self.norm_attention(boxes)
        return self.attention.weights(boxes, words, word_bias)


def _one_sequence(words: Tensor, boxes: Tensor) -> Tensor:
    """Words [Q, ..., L, D] and boxes [Q or 1, ..., N, D] behind each other."""
    return torch.cat([words, boxes.expand(len(words), *boxes.shape[1:])], dim=-2)


class StreamLayer(nn.Module):
    """One stream's half of a `CoAttentionLayer`."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int, dropout: float):
        super().__init__()
        self.norm_self, self.norm_ffn = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.cross_attention = Attention(dim, num_heads)
        self.self_attention = Attention(dim, num_heads)
        self.ffn = FeedForward(dim, ffn_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        own: Tensor,
        normed: Tensor,
        other_normed: Tensor,
        own_bias: Tensor,
        other_bias: Tensor,
    ) -> Tensor:
        """Attend to the other stream, then to the own one, then the feed-forward block."""
        own = own + self.dropout(self.cross_attention(normed, other_normed, other_bias))
        normed = self.norm_self(own)
        own = own + self.dropout(self.self_attention(normed, normed, own_bias))
        return own + self.dropout(self.ffn(self.norm_ffn(own)))


class CoAttentionLayer(nn.Module):
    """Two streams: words attend to boxes while boxes attend to words (both as they were before
    the layer), then each to itself, then a feed-forward block each.

    Args:
        dim, num_heads, ffn_dim, dropout: as for `JointLayer`, of each stream.
        last: nothing reads the words behind this layer; they have no stream in it.
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
        boxes = self.boxes(boxes, normed_boxes, normed_words, box_bias, word_bias)
        if self.words is not None:
            words = self.words(words, normed_words, normed_boxes, word_bias, box_bias)
        return words, boxes

    def word_attention(self, words: Tensor, boxes: Tensor, word_bias: Tensor) -> Tensor:
        """See `JointLayer.word_attention`."""
        return self.boxes.cross_attention.weights(
            self.norm_boxes(boxes), self.norm_words(words), word_bias
        )
