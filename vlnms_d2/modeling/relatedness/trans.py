"""Transformer relatedness with box refinement (Sec. 3.2.2, Eq. 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor, nn

from ...config import check_choice
from ..text.build import TextFeatures
from .build import RELATEDNESS_REGISTRY, Relatedness, RelatednessOutput, at_least_float32
from .trans_layers import FUSION_LAYERS, JointLayer, key_bias

# Of the tokens that meet a query in "cross_attention".
NARROW_DIM, NARROW_HEADS, NARROW_FFN_DIM = 64, 4, 128


@RELATEDNESS_REGISTRY.register()
class Trans(Relatedness):
    """A transformer over words and boxes that predicts r and a refinement t for each box.

    The paper's "two-layer Transformer and co-attention" can be read in two ways, and both are
    available: "joint", self-attention over one sequence of words and boxes, and "co_attention",
    two streams that attend to each other. Both send all boxes through all layers for each query.

    "cross_attention", which is not in the paper, makes many queries cheap: in tokens of full width,
    boxes attend to each other without regard to the query, once per image; what depends on the
    query, attention over its words and these boxes, is done in tokens of width d = 64.

    The layers normalise before each block (pre-norm), so that training needs no long warm-up.

    Args:
        visual_dim: width of the box features.
        text_dim: width of the word features.
        hidden_dim: width D of the tokens.
        num_heads, ffn_dim, num_layers, dropout: of the layers, see `MODEL.VLNMS.TRANS`.
        fusion: "joint", "co_attention" or "cross_attention".
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
        check_choice("TRANS.FUSION", fusion, list(FUSION_LAYERS))
        if hidden_dim % num_heads:
            raise ValueError(
                f"MODEL.VLNMS.TRANS.HIDDEN_DIM is {hidden_dim}, not a multiple of "
                f"MODEL.VLNMS.TRANS.NUM_HEADS, {num_heads}"
            )
        self.visual_token = nn.Sequential(
            nn.LayerNorm(visual_dim), nn.Linear(visual_dim, hidden_dim)
        )
        self.location_token = nn.Linear(5, hidden_dim)
        self.box_layers = nn.ModuleList()  # once per image
        if fusion == "cross_attention":
            self.box_layers.extend(
                JointLayer(hidden_dim, num_heads, ffn_dim, dropout, last=True)
                for _ in range(num_layers)
            )
            self.narrow_token = nn.Sequential(
                nn.LayerNorm(hidden_dim), nn.Linear(hidden_dim, NARROW_DIM)
            )
            hidden_dim, num_heads, ffn_dim = NARROW_DIM, NARROW_HEADS, NARROW_FFN_DIM
        self.word_token = nn.Linear(text_dim, hidden_dim)
        self.layers = nn.ModuleList(  # for each query
            FUSION_LAYERS[fusion](hidden_dim, num_heads, ffn_dim, dropout, last=i == num_layers - 1)
            for i in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_dim)
        self.fc_r = nn.Linear(hidden_dim, 1)
        self.mlp_t = Refinement(hidden_dim, visual_dim) if refine else None
        self.hidden_dim, self.ffn_dim = hidden_dim, ffn_dim  # of the tokens that meet a query
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

    def encode_boxes(self, visual: Tensor, locations: Tensor) -> BoxTokens:
        """See `Relatedness.encode_boxes`."""
        # The same features twice if there is no refinement encoder.
        visual, for_refinement = visual[:, : self.visual_dim], visual[:, -self.visual_dim :]
        tokens = (self.visual_token(visual) + self.location_token(locations))[None]  # [1, N, D]
        if self.box_layers:
            no_words, bias = tokens[:, :0], tokens.new_zeros(tokens.shape[:2])
            for layer in self.box_layers if len(visual) else ():  # attention needs a key
                _, tokens = layer(no_words, tokens, bias[:, :0], bias)
            tokens = self.narrow_token(tokens)  # [1, N, d]
        refinement = None if self.mlp_t is None else self.mlp_t.from_visual(for_refinement)
        return BoxTokens(tokens, refinement)

    def forward(
        self,
        visual: Tensor | BoxTokens,
        locations: Tensor,
        text: TextFeatures,
        with_attention: bool = False,
    ) -> RelatednessOutput:
        """See `Relatedness.forward`."""
        boxes = visual if isinstance(visual, BoxTokens) else self.encode_boxes(visual, locations)
        shape = (len(text), boxes.tokens.shape[1])
        if 0 in shape:  # attention needs at least one key; empty in gives empty out
            hidden = boxes.tokens.new_zeros(*shape, boxes.tokens.shape[2])
            attention = hidden.new_zeros(*shape, text.mask.shape[1]) if with_attention else None
        else:
            hidden, attention = self._fuse(boxes, text, with_attention)  # [Q, N, D]
        logits = at_least_float32(self.fc_r(hidden).squeeze(-1))  # [Q, N]
        deltas = None
        if self.mlp_t is not None:
            # Detached: see `Refinement` for why the refinement does not train the layers.
            deltas = at_least_float32(self.mlp_t(hidden.detach(), boxes.refinement))  # [Q, N, 4]
        return RelatednessOutput(logits, attention, deltas)

    def _fuse(
        self, boxes: BoxTokens, text: TextFeatures, with_attention: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The box tokens after the layers, [Q, N, D], and the word attention, [Q, N, L] or None."""
        words, mask = text.words, text.mask
        num_words = mask.shape[1]
        if num_words == 0:  # only empty queries; attention needs at least one key
            words, mask = F.pad(words, (0, 0, 0, 1)), F.pad(mask, (0, 1))
        words = self.word_token(words)  # [Q, L, D]
        # [1, N, D], the same for every query before the first layer; then [Q, N, D]
        tokens = boxes.tokens
        # [Q, L] and [Q, N]
        word_bias, box_bias = key_bias(mask), key_bias(mask.new_ones(len(mask), tokens.shape[1]))
        attention = None
        for layer in self.layers:
            if with_attention and layer is self.layers[-1]:
                attention = layer.word_attention(words, tokens, word_bias) * mask[:, None]
                attention = attention[..., :num_words]
            words, tokens = layer(words, tokens, word_bias, box_bias)
        return self.norm(tokens), attention

    def bytes_per_query(self, num_boxes: int, num_words: int) -> int:
        # The tensors of a layer that exist at once, in floats per token.
        # Attention: the layer's input, input and norm in one sequence, queries, keys and values
        # before and after concatenation, three outputs.
        attention = 12 * self.hidden_dim
        # Feed-forward: the input before and after the attentions, four norms, the output; hidden
        # units, gates before and after the ReLU, and their product.
        feed_forward = 7 * self.hidden_dim + 4 * self.ffn_dim
        return 4 * (num_words + num_boxes) * max(attention, feed_forward)


@dataclass
class BoxTokens:
    """What `Trans` computes of the N boxes of an image, whatever the query.

    Attributes:
        tokens: float [1, N, D], the boxes as they meet a query; [1, N, d] in "cross_attention".
        refinement: float [N, D or d], the visual part of the box refinement; None without one.
    """

    tokens: Tensor
    refinement: Tensor | None


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
        """The refinements t [Q, N, 4] from tokens [Q, N, D] and the output of `from_visual`,
        [N, D]."""
        x = self.from_hidden(hidden) + visual
        return self.out(self.hidden(x.relu()).relu())
