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
    """Words and boxes as tokens, layers that fuse them, and per box r and a refinement t.

    The paper's "two-layer Transformer and co-attention" can be read in two ways, and both are
    available: "joint", self-attention over one sequence of words and boxes, and "co_attention",
    two streams that attend to each other. The layers normalise before each block, which trains
    without a long warm-up.

    Args:
        visual_dim: width of the box features.
        text_dim: width of the word features.
        hidden_dim: width of the tokens.
        num_heads, ffn_dim, num_layers, dropout: of the layers.
        fusion: "joint" or "co_attention".
        refine: whether there is a box refinement, MLP_t.

    Raises:
        ValueError: an unknown `fusion`, or heads that do not divide the width.
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
        visual, for_refinement = visual[:, : self.visual_dim], visual[:, -self.visual_dim :]
        shape = (len(text), len(visual))
        if 0 in shape:  # attention needs at least one key; empty in gives empty out
            hidden = visual.new_zeros(*shape, self.hidden_dim)
            attention = visual.new_zeros(*shape, text.mask.shape[1]) if with_attention else None
        else:
            hidden, attention = self._fuse(visual, locations, text, with_attention)
        logits = at_least_float32(self.fc_r(hidden).squeeze(-1))
        deltas = (
            None
            if self.mlp_t is None
            else at_least_float32(
                # Reads what the tokens know of the query, without gradient to them.
                self.mlp_t(hidden.detach(), for_refinement)
            )
        )
        return RelatednessOutput(logits, attention, deltas)

    def _fuse(
        self, visual: Tensor, locations: Tensor, text: TextFeatures, with_attention: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The box tokens after the layers, [Q, N, hidden_dim], and the word attention."""
        words, mask = text.words, text.mask
        num_words = mask.shape[1]
        if num_words == 0:  # only empty queries; attention needs at least one key
            words, mask = F.pad(words, (0, 0, 0, 1)), F.pad(mask, (0, 1))
        words = self.word_token(words)
        # boxes: [1, N, D], the same for every query before the first layer; then [Q, N, D]
        boxes = (self.visual_token(visual) + self.location_token(locations))[None]
        word_bias, box_bias = key_bias(mask), key_bias(mask.new_ones(len(mask), len(visual)))
        attention = None
        for layer in self.layers:
            if with_attention and layer is self.layers[-1]:
                attention = layer.word_attention(words, boxes, word_bias) * mask[:, None]
                attention = attention[..., :num_words]
            words, boxes = layer(words, boxes, word_bias, box_bias)
        return self.norm(boxes), attention

    def bytes_per_query(self, num_boxes: int, num_words: int) -> int:
        # A layer at its widest. In the attention: the layer's input, input and norm in one
        # sequence, queries, keys and values before and after concatenation, and three outputs. In
        # the feed-forward block: the input before and after the attentions, four norms, the
        # output, hidden units, gates before and after the ReLU, and their product.
        widest = max(12 * self.hidden_dim, 7 * self.hidden_dim + 4 * self.ffn_dim)
        return 4 * (num_boxes + num_words) * widest


class Refinement(nn.Module):
    """MLP_t of the paper, on a box's token and, in addition, on its visual feature.

    The visual feature shows how a box is off, and a token has little room for that beside what is
    mentioned. The visual part is computed once per image. Learning to refine and to relate in the
    same layers costs recall, so they share none: the visual feature comes from a second copy of
    the detector's head (VISUAL_ENCODER "finetune"), and the tokens get no gradient from here.

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
        # Starts with almost no refinement.
        nn.init.normal_(self.out.weight, std=0.001)
        nn.init.zeros_(self.out.bias)

    def forward(self, hidden: Tensor, visual: Tensor) -> Tensor:
        """Refinements of tokens [Q, N, D] of boxes with visual features [N, V]: [Q, N, 4]."""
        x = self.from_hidden(hidden) + self.from_visual(visual)
        return self.out(self.hidden(x.relu()).relu())


class Attention(nn.Module):
    """Multi-head attention, by torch's `scaled_dot_product_attention`.

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
        """The second half of `forward`, on the outputs of `queries` and `keys_and_values`."""
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
    """Bias of attention logits: excludes padding and weights each key by one over their number.

    For keys of a single kind the number makes no difference. Where words and boxes are keys of one
    attention, it makes the balance between them independent of how many there are of each: tens
    of boxes in a training step, hundreds at inference.

    Args:
        mask: bool [Q, S], False for padding.

    Returns:
        float32 [Q, S]; finite, so that a row of padding alone gives no NaN.
    """
    count = mask.sum(dim=1, keepdim=True).clamp(min=1)
    # Half of the minimum, since attention adds the logit to it.
    return torch.where(mask, -count.log(), torch.finfo(torch.float32).min / 2)


class FeedForward(nn.Module):
    """A gated linear unit with a ReLU (Shazeer, "GLU Variants Improve Transformer", 2020).

    A token sums a box's appearance and what it attended to among the words; the gate lets one
    multiply the other, as the FC module does.
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
        dropout: on the output of each block.
        last: no later layer reads the words, so they pass through unchanged.
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
                before the first layer: everything before the attention is then computed once.
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
        """The attention's output for words and boxes, or in the last layer for boxes only."""
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
        tokens: Tensor,
        normed: Tensor,
        other_normed: Tensor,
        bias: Tensor,
        other_bias: Tensor,
    ) -> Tensor:
        """Attend to the other stream, then to this one, then the feed-forward block."""
        tokens = tokens + self.dropout(self.cross_attention(normed, other_normed, other_bias))
        normed = self.norm_self(tokens)
        tokens = tokens + self.dropout(self.self_attention(normed, normed, bias))
        return tokens + self.dropout(self.ffn(self.norm_ffn(tokens)))


class CoAttentionLayer(nn.Module):
    """Two streams: words attend to boxes and boxes to words (both as they enter the layer), then
    each stream to itself, then a feed-forward block each.

    Args:
        dim, num_heads, ffn_dim, dropout: as for `JointLayer`, of each stream.
        last: no later layer reads the words, so they have no stream in this one.
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
