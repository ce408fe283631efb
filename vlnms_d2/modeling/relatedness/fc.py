"""FC relatedness (Sec. 3.2.1, Eq. 1 and 2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor, nn

from ..text.build import TextFeatures
from .build import RELATEDNESS_REGISTRY, Relatedness, RelatednessOutput, at_least_float32

# F.normalize's default: smaller norms are replaced by it.
EPS = 1e-12


@RELATEDNESS_REGISTRY.register()
class FC(Relatedness):
    """Soft attention over the words, then the product of box and query feature, scored linearly.

    With `attention="linear"`, Eq. 1 adds a term of the box and a term of the word, and the softmax
    over the words cancels the former: the weights are the same for every box. They are computed
    once per query, MLP_a is not needed at all, and all scores of Eq. 2 are two matrix products
    (see `score_pairs`). With `attention="additive"` the weights depend on the box.

    Args:
        visual_dim: width of the box features.
        text_dim: width of the word features and of m.
        hidden_dim: hidden width of MLP_a and MLP_b.
        attention: "linear" or "additive".
        relu: ReLU before the L2 norm, as in the authors' code.
        dropout: dropout on m and on the attention's box input, as in the authors' code.
    """

    @configurable
    def __init__(
        self,
        *,
        visual_dim: int,
        text_dim: int,
        hidden_dim: int = 1024,
        attention: str = "linear",
        relu: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        if attention not in ("linear", "additive"):
            raise ValueError(
                f"MODEL.VLNMS.ATTENTION is {attention!r}, expected 'linear' or 'additive'"
            )
        self.attention = attention
        self.relu = relu
        self.dropout = nn.Dropout(dropout)
        self.mlp_b = _mlp(visual_dim, hidden_dim, text_dim)
        if attention == "additive":
            self.mlp_a = _mlp(visual_dim, hidden_dim, text_dim)
            self.attend_box = nn.Linear(text_dim, text_dim, bias=False)
            self.attend_word = nn.Linear(text_dim, text_dim)
        self.fc_s = nn.Linear(text_dim, 1)
        self.fc_r = nn.Linear(text_dim, 1)

    @classmethod
    def from_config(cls, cfg, visual_dim: int, text_dim: int) -> dict:
        vlnms = cfg.MODEL.VLNMS
        return {
            "visual_dim": visual_dim,
            "text_dim": text_dim,
            "hidden_dim": vlnms.FC.HIDDEN_DIM,
            "attention": vlnms.ATTENTION,
            "relu": vlnms.FC.RELU,
            "dropout": vlnms.FC.DROPOUT,
        }

    def forward(
        self,
        visual: Tensor,
        locations: Tensor,
        text: TextFeatures,
        with_attention: bool = False,
    ) -> RelatednessOutput:
        """See `Relatedness.forward`; FC does not use the locations and always returns the
        attention."""
        attention = self.word_attention(visual, text)
        # q: [Q, D] with linear attention, [Q, N, D] with additive attention
        if attention.dim() == 2:
            query = torch.einsum("ql,qld->qd", attention, text.words)
        else:
            query = attention @ text.words
        box = self.mlp_b(visual)
        needs_direct = self.relu or (self.training and self.dropout.p > 0)
        if query.dim() == 2 and not needs_direct:
            logits = score_pairs(box, query, self.fc_r.weight[0], self.fc_r.bias)
        else:
            logits = self._score_directly(box, query)
        return RelatednessOutput(at_least_float32(logits), attention)

    def condense(self, text: TextFeatures) -> TextFeatures:
        """See `Relatedness.condense`: with linear attention, the attended word feature takes the
        place of a query's words, since the attention to a single word is 1."""
        if self.attention != "linear":
            return text
        query = torch.einsum("ql,qld->qd", self.word_attention(None, text), text.words)
        return TextFeatures(query[:, None], text.mask.any(dim=1, keepdim=True))

    def bytes_per_query(self, num_boxes: int, num_words: int) -> int:
        floats = 4 * num_boxes
        if self.attention == "additive":
            floats += 3 * num_boxes * num_words
        if self.attention == "additive" or self.relu:
            # The attended words of each box, their product with the box, and m.
            floats += 3 * num_boxes * self.fc_r.in_features
        return 4 * floats

    def word_attention(self, visual: Tensor, text: TextFeatures) -> Tensor:
        """Softmax over the words: [Q, L] (linear) or [Q, N, L] (additive); padding gets 0."""
        if self.attention == "linear":
            scores = self.fc_s(text.words).squeeze(-1)
            return masked_softmax(scores, text.mask)
        box = 2 * self.attend_box(self.dropout(self.mlp_a(visual)))
        word = 2 * self.attend_word(text.words)
        # tanh(x) = 2 sigmoid(2 x) - 1: on the CPU, torch's sigmoid is six times faster.
        weight, bias = 2 * self.fc_s.weight, self.fc_s.bias - self.fc_s.weight.sum()
        scores = box.new_zeros(len(text), len(visual), text.mask.shape[1])
        # Query by query, without padding: [Q, N, L, D] would take gigabytes for many queries.
        for i, length in enumerate(text.mask.sum(dim=1).tolist()):
            hidden = (box[:, None] + word[i, :length]).sigmoid_()
            scores[i, :, :length] = F.linear(hidden, weight, bias).squeeze(-1)
        return masked_softmax(scores, text.mask[:, None])

    def _score_directly(self, box: Tensor, query: Tensor) -> Tensor:
        """Eq. 2 directly: [Q, N] logits through m [Q, N, D]."""
        if query.dim() == 2:
            query = query[:, None]
        product = box[None] * query
        if self.relu:
            product = product.relu()
        m = F.normalize(at_least_float32(product), dim=-1, eps=EPS).to(product.dtype)
        return self.fc_r(self.dropout(m)).squeeze(-1)


def score_pairs(box: Tensor, query: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`weight . L2Norm(box_i * query_q) + bias` for all pairs, without an [Q, N, D] tensor.

    The numerator is a bilinear form and the squared norm another one, so both are matrix
    products: (q * u) V^T and (q * q) (V * V)^T.

    Args:
        box: float [N, D].
        query: float [Q, D].
        weight: float [D].
        bias: float [1].

    Returns:
        float [Q, N].
    """
    # Squares leave the range of half precision, so autocast is disabled here.
    box, query, weight, bias = map(at_least_float32, (box, query, weight, bias))
    with torch.autocast(box.device.type, enabled=False):
        numerator = (query * weight) @ box.T
        squared_norm = (query * query) @ (box * box).T
        # The clamp before the root keeps the gradient finite where a product is all zero.
        return numerator / squared_norm.clamp(min=EPS**2).sqrt() + bias


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last dimension where `mask` holds, 0 elsewhere; rows without any are 0."""
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1) * mask


def _mlp(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, out_dim))
