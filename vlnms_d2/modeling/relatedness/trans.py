"""Transformer relatedness with box refinement (Sec. 3.2.2, Eq. 3)."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..text.build import TextFeatures
from .build import RELATEDNESS_REGISTRY, Relatedness, RelatednessOutput, at_least_float32


@RELATEDNESS_REGISTRY.register()
class Trans(Relatedness):
    """A transformer over words and boxes that predicts r and a refinement t for each box.

    The paper's "two-layer Transformer and co-attention" can be read in two ways, and both are
    available: "joint", self-attention over one sequence of words and boxes, and "co_attention",
    two streams that attend to each other. The layers normalise before each block (pre-norm), so
    that training needs no long warm-up.

    Args:
        visual_dim: width of the box features.
        text_dim: width of the word features.
        hidden_dim: width D of the tokens.
        num_heads, ffn_dim, num_layers, dropout: of the layers, see `MODEL.VLNMS.TRANS`.
        fusion: "joint" or "co_attention".
        refine: whether there is a box refinement, MLP_t.

    Raises:
        ValueError: `fusion` is unknown, or `hidden_dim` is not a multiple of `num_heads`.
    """

    compares_boxes = True

    @configurable
    def __init__(
        self,
        *,
        visual_dim: int,
        text_dim: int,
        hidden_dim: int = 768,
        num_heads: int = 12,
        ffn_dim: int = 3072,
        num_layers: int = 2,
        dropout: float = 0.1,
        fusion: str = "joint",
        refine: bool = True,
    ):
        super().__init__()
        if fusion not in FUSION_LAYERS:
            raise ValueError(
                f"MODEL.VLNMS.TRANS.FUSION is {fusion!r}, expected 'joint' or 'co_attention'"
            )
        if hidden_dim % num_heads:
            raise ValueError(
                f"MODEL.VLNMS.TRANS.HIDDEN_DIM is {hidden_dim}, not a multiple of "
                f"MODEL.VLNMS.TRANS.NUM_HEADS, {num_heads}"
            )
        self.hidden_dim, self.ffn_dim = hidden_dim, ffn_dim
        self.visual_token = nn.Sequential(
            nn.LayerNorm(visual_dim), nn.Linear(visual_dim, hidden_dim)
        )
        self.location_token = nn.Linear(5, hidden_dim)
        self.word_token = nn.Linear(text_dim, hidden_dim)
        self.layers = nn.ModuleList(
            FUSION_LAYERS[fusion](hidden_dim, num_heads, ffn_dim, dropout, last=i == num_layers - 1)
            for i in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_dim)
        self.fc_r = nn.Linear(hidden_dim, 1)
        self.mlp_t = Refinement(hidden_dim, visual_dim) if refine else None
        self.visual_dim, self.refines = visual_dim, refine

    @classmethod
    def from_config(cls, cfg, visual_dim: int, text_dim: int) -> dict:
        trans = cfg.MODEL.VLNMS.TRANS
        return {
            "visual_dim": visual_dim,
            "text_dim": text_dim,
            "hidden_dim": trans.HIDDEN_DIM,
            "num_heads": trans.NUM_HEADS,
            "ffn_dim": trans.FFN_DIM,
            "num_layers": trans.NUM_LAYERS,
            "dropout": trans.DROPOUT,
            "fusion": trans.FUSION,
            "refine": cfg.MODEL.VLNMS.REG_WEIGHT > 0,
        }

    def forward(
        self,
        visual: Tensor,
        locations: Tensor,
        text: TextFeatures,
        with_attention: bool = False,
    ) -> RelatednessOutput:
        """See `Relatedness.forward`."""
        # The same features twice if there is no refinement encoder.
        visual, for_refinement = visual[:, : self.visual_dim], visual[:, -self.visual_dim :]
        shape = (len(text), len(visual))
        if 0 in shape:  # attention needs at least one key; empty in gives empty out
            hidden = visual.new_zeros(*shape, self.hidden_dim)
            attention = visual.new_zeros(*shape, text.mask.shape[1]) if with_attention else None
        else:
            hidden, attention = self._fuse(visual, locations, text, with_attention)  # [Q, N, D]
        logits = at_least_float32(self.fc_r(hidden).squeeze(-1))  # [Q, N]
        deltas = None
        if self.mlp_t is not None:
            # Detached: see `Refinement` for why the refinement does not train the layers.
            deltas = at_least_float32(self.mlp_t(hidden.detach(), for_refinement))  # [Q, N, 4]
        return RelatednessOutput(logits, attention, deltas)

    def _fuse(
        self, visual: Tensor, locations: Tensor, text: TextFeatures, with_attention: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The box tokens after the layers, [Q, N, D], and the word attention, [Q, N, L] or None."""
        words, mask = text.words, text.mask
        num_words = mask.shape[1]
        if num_words == 0:  # only empty queries; attention needs at least one key
            words, mask = F.pad(words, (0, 0, 0, 1)), F.pad(mask, (0, 1))
        words = self.word_token(words)  # [Q, L, D]
        # [1, N, D], the same for every query before the first layer; then [Q, N, D]
        boxes = (self.visual_token(visual) + self.location_token(locations))[None]
        # [Q, L] and [Q, N]
        word_bias, box_bias = key_bias(mask), key_bias(mask.new_ones(len(mask), len(visual)))
        attention = None
        for layer in self.layers:
            if with_attention and layer is self.layers[-1]:
                attention = layer.word_attention(words, boxes, word_bias) * mask[:, None]
                attention = attention[..., :num_words]
            words, boxes = layer(words, boxes, word_bias, box_bias)
        return self.norm(boxes), attention

    def bytes_per_query(self, num_boxes: int, num_words: int) -> int:
        # The tensors of a layer that exist at once, in floats per token.
        # Attention: the layer's input, input and norm in one sequence, queries, keys and values
        # before and after concatenation, three outputs.
        attention = 12 * self.hidden_dim
        # Feed-forward: the input before and after the attentions, four norms, the output; hidden
        # units, gates before and after the ReLU, and their product.
        feed_forward = 7 * self.hidden_dim + 4 * self.ffn_dim
        return 4 * (num_boxes + num_words) * max(attention, feed_forward)


class Refinement(nn.Module):
    """MLP_t of the paper, applied to a box's token and, unlike there, also to its visual feature.

    The visual feature shows by how much a box is off, for which a token, occupied with what the
    query mentions, has little capacity. Its part is computed once per image. Learning to refine
    and to relate in the same layers costs recall, so they share none: with VISUAL_ENCODER
    "finetune" the visual feature comes from a second copy of the detector's head, and the tokens
    get no gradient from the refinement.

    Args:
        hidden_dim: width D of the tokens.
        visual_dim: width V of the visual features.
    """

    def __init__(self, hidden_dim: int, visual_dim: int):
        super().__init__()
        self.from_visual = nn.Sequential(
            nn.LayerNorm(visual_dim),
            nn.Linear(visual_dim, visual_dim),
            nn.ReLU(),
            nn.Linear(visual_dim, hidden_dim),
        )
        self.from_hidden = nn.Linear(hidden_dim, hidden_dim)
        self.hidden = nn.Linear(hidden_dim, hidden_dim)
        self.out = nn.Linear(hidden_dim, 4)
        # Training starts with almost no refinement.
        nn.init.normal_(self.out.weight, std=0.001)
        nn.init.zeros_(self.out.bias)

    def forward(self, hidden: Tensor, visual: Tensor) -> Tensor:
        """The refinements t [Q, N, 4] from tokens [Q, N, D] and visual features [N, V]."""
        x = self.from_hidden(hidden) + self.from_visual(visual)
        return self.out(self.hidden(x.relu()).relu())


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

    def forward(
        self,
        tokens: Tensor,
        normed: Tensor,
        other_normed: Tensor,
        bias: Tensor,
        other_bias: Tensor,
    ) -> Tensor:
        """Attend to the other stream, then to this one, then apply the feed-forward block.

        Args:
            tokens: float [Q, T, D], this stream; `normed` are these after the layer norm.
            other_normed: float [Q, S, D], the other stream after its layer norm.
            bias, other_bias: float [Q, T] and [Q, S]; see `key_bias`.
        """
        tokens = tokens + self.dropout(self.cross_attention(normed, other_normed, other_bias))
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
        boxes = self.boxes(boxes, normed_boxes, normed_words, box_bias, word_bias)
        if self.words is not None:
            words = self.words(words, normed_words, normed_boxes, word_bias, box_bias)
        return words, boxes

    def word_attention(self, words: Tensor, boxes: Tensor, word_bias: Tensor) -> Tensor:
        """See `JointLayer.word_attention`."""
        return self.boxes.cross_attention.weights(
            self.norm_boxes(boxes), self.norm_words(words), word_bias
        )


FUSION_LAYERS = {"joint": JointLayer, "co_attention": CoAttentionLayer}
