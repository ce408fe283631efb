"""Transformer relatedness with box refinement (paper, Eq. 3; SPEC section 4)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..text.encoder import TextFeatures
from .attention import CoAttentionLayer, JointLayer, key_bias
from .base import RELATEDNESS_REGISTRY, Relatedness, RelatednessOutput, at_least_float32

LAYERS = {"joint": JointLayer, "co_attention": CoAttentionLayer}


@RELATEDNESS_REGISTRY.register()
class Trans(Relatedness):
    """Words and boxes as tokens; layers that fuse both; per box r and a refinement t.

    The paper's "two-layer Transformer and co-attention" can be read in two ways, so there are
    both: "joint", self-attention over one sequence of words and boxes, and "co_attention", two
    streams that attend to each other. The layers normalise before each block, which trains
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
        if fusion not in LAYERS:
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
            LAYERS[fusion](hidden_dim, num_heads, ffn_dim, dropout, last=i == num_layers - 1)
            for i in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_dim)
        self.fc_r = nn.Linear(hidden_dim, 1)
        self.mlp_t = Refinement(hidden_dim, visual_dim) if refine else None
        self.visual_dim, self.refines = visual_dim, refine

    @classmethod
    def from_config(cls, cfg) -> dict:
        trans = cfg.MODEL.VLNMS.TRANS
        return {
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
        if 0 in shape:  # attention wants at least one key; of nothing the heads make nothing
            hidden = visual.new_zeros(*shape, self.hidden_dim)
            attention = visual.new_zeros(*shape, text.mask.shape[1]) if with_attention else None
        else:
            hidden, attention = self._fuse(visual, locations, text, with_attention)
        logits = at_least_float32(self.fc_r(hidden).squeeze(-1))
        deltas = (
            None
            if self.mlp_t is None
            else at_least_float32(
                # What the tokens say of the mentioned ones, and nothing to them in return.
                self.mlp_t(hidden.detach(), for_refinement)
            )
        )
        return RelatednessOutput(logits, attention, deltas)

    def _fuse(
        self, visual: Tensor, locations: Tensor, text: TextFeatures, with_attention: bool
    ) -> tuple[Tensor, Tensor | None]:
        """What the layers make of the boxes, [Q, N, hidden_dim], and the word attention."""
        words, mask = text.words, text.mask
        num_words = mask.shape[1]
        if num_words == 0:  # empty queries alone; attention wants at least one key
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
        # A layer where it is widest. In the attention: the layer's input, that input and its norm
        # in one sequence, queries, keys and values before and after that, and three of what comes
        # out. In the feed-forward block: the input before and after the attentions, four of their
        # norms, the output, hidden units, gates before and after the ReLU, and their product.
        widest = max(12 * self.hidden_dim, 7 * self.hidden_dim + 4 * self.ffn_dim)
        return 4 * (num_boxes + num_words) * widest


class Refinement(nn.Module):
    """MLP_t of the paper, from a box's token, and beside that from its visual feature.

    How a box is off shows in the visual feature; a token has hardly room for it besides what is
    mentioned. What the feature gives is worked out once an image. Learning to refine and to relate
    in the same layers costs recall, so the two share none: the feature comes from a copy of the
    detector's head of its own (VISUAL_ENCODER "finetune"), and no gradient goes to the tokens.

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
        # It starts with next to no refinement.
        nn.init.normal_(self.out.weight, std=0.001)
        nn.init.zeros_(self.out.bias)

    def forward(self, hidden: Tensor, visual: Tensor) -> Tensor:
        """Refinements of tokens [Q, N, D] of boxes with visual features [N, V]: [Q, N, 4]."""
        x = self.from_hidden(hidden) + self.from_visual(visual)
        return self.out(self.hidden(x.relu()).relu())
