"""FC relatedness (Sec. 3.2.1, Eq. 1 and 2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor, nn

from ...config import check_choice
from ..text.build import TextFeatures
from .build import RELATEDNESS_REGISTRY, Relatedness, RelatednessOutput, at_least_float32

# The default of F.normalize, which replaces smaller norms by this.
EPS = 1e-12


@RELATEDNESS_REGISTRY.register()
class FC(Relatedness):
    """Attention over the words (Eq. 1), then a linear layer on the L2-normalised product m of box
    and query feature (Eq. 2).

    With `attention="linear"`, the logit of Eq. 1 is the sum of a term of the box and a term of the
    word. The softmax over the words cancels the former, so the attention is the same for every box.
    Therefore it is computed once per query and without MLP_a, and all scores of Eq. 2 follow from
    two matrix products (see `score_pairs`). With `attention="additive"` it depends on the box.

    Args:
        visual_dim: width of the box features.
        text_dim: width D of the word features and of m.
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
        check_choice("ATTENTION", attention, ("linear", "additive"))
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
        self, visual: Tensor, locations: Tensor, text: TextFeatures, with_attention: bool = False
    ) -> RelatednessOutput:
        """See `Relatedness.forward`; FC does not use the locations and always returns the
        attention."""
        attention = self.word_attention(visual, text)  # [Q, L] or [Q, N, L]
        if attention.dim() == 2:
            query = torch.einsum("ql,qld->qd", attention, text.words)  # [Q, D]
        else:
            query = attention @ text.words  # [Q, N, D]
        box = self.mlp_b(visual)  # [N, D]
        # ReLU and dropout act on the elements of m, which score_pairs never computes.
        needs_m = self.relu or (self.training and self.dropout.p > 0)
        if query.dim() == 2 and not needs_m:
            logits = score_pairs(box, query, self.fc_r.weight[0], self.fc_r.bias)  # [Q, N]
        else:
            logits = self._score_directly(box, query)  # [Q, N]
        return RelatednessOutput(at_least_float32(logits), attention)

    def condense(self, text: TextFeatures) -> TextFeatures:
        """See `Relatedness.condense`. With linear attention, the attended word feature replaces
        the words of a query: as the only word, its attention is 1."""
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

    def word_attention(self, visual: Tensor | None, text: TextFeatures) -> Tensor:
        """Softmax over the words: [Q, L] (linear, which ignores `visual`) or [Q, N, L] (additive);
        0 for padding."""
        if self.attention == "linear":
            scores = self.fc_s(text.words).squeeze(-1)  # [Q, L]
            return masked_softmax(scores, text.mask)
        # fc_s(tanh(x)) as tanh(x) = 2 sigmoid(2 x) - 1: on the CPU, torch's sigmoid is six times
        # faster than its tanh.
        box = 2 * self.attend_box(self.dropout(self.mlp_a(visual)))  # [N, D]
        word = 2 * self.attend_word(text.words)  # [Q, L, D]
        weight, bias = 2 * self.fc_s.weight, self.fc_s.bias - self.fc_s.weight.sum()
        scores = box.new_zeros(len(text), len(visual), text.mask.shape[1])
        # Query by query, without padding: [Q, N, L, D] would take gigabytes for many queries.
        for i, length in enumerate(text.lengths.tolist()):
            hidden = (box[:, None] + word[i, :length]).sigmoid_()  # [N, length, D]
            scores[i, :, :length] = F.linear(hidden, weight, bias).squeeze(-1)
        return masked_softmax(scores, text.mask[:, None])

    def _score_directly(self, box: Tensor, query: Tensor) -> Tensor:
        """Eq. 2 as it is written, by way of m [Q, N, D]: logits [Q, N]."""
        if query.dim() == 2:
            query = query[:, None]  # [Q, 1, D]
        product = box[None] * query  # [Q, N, D]
        if self.relu:
            product = product.relu()
        m = F.normalize(at_least_float32(product), dim=-1, eps=EPS).to(product.dtype)
        return self.fc_r(self.dropout(m)).squeeze(-1)


def score_pairs(box: Tensor, query: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`weight . L2Norm(box_i * query_q) + bias` for all pairs, without a [Q, N, D] tensor.

    Both the dot product before normalisation and the squared norm are sums over D of a factor of
    the query times a factor of the box. So each is a matrix product for all pairs:
    (query * weight) box^T and (query * query) (box * box)^T.

    Args:
        box: float [N, D].
        query: float [Q, D].
        weight: float [D].
        bias: float [1].

    Returns:
        float [Q, N].
    """
    # Squares may overflow in half precision, so autocast is disabled here.
    box, query, weight, bias = map(at_least_float32, (box, query, weight, bias))
    with torch.autocast(box.device.type, enabled=False):
        numerator = (query * weight) @ box.T  # [Q, N]
        squared_norm = (query * query) @ (box * box).T  # [Q, N]
        # Clamped before the root, so that the gradient is finite if the norm is zero.
        return numerator / squared_norm.clamp(min=EPS**2).sqrt() + bias


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the elements of the last dimension that `mask` marks, 0 for the others, also if
    a row has no marked element."""
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1) * mask


def _mlp(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, out_dim))
