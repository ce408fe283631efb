"""Small relatedness modules of every kind, and boxes and queries to feed them."""

from __future__ import annotations

import torch
from torch import Tensor

from vlnms_d2.modeling.relatedness import FC, Relatedness, Trans
from vlnms_d2.modeling.text import TextFeatures

VISUAL, TEXT = 7, 6

KINDS = {
    "FC linear": (FC, {}),
    "FC additive": (FC, {"attention": "additive"}),
    "FC relu": (FC, {"relu": True}),
    "FC additive relu": (FC, {"attention": "additive", "relu": True}),
    "Trans joint": (Trans, {"fusion": "joint"}),
    "Trans co_attention": (Trans, {"fusion": "co_attention"}),
    "Trans cross_attention": (Trans, {"fusion": "cross_attention"}),
    "Trans joint unrefined": (Trans, {"fusion": "joint", "refine": False}),
}


def make_fc(**options) -> FC:
    torch.manual_seed(0)
    return FC(visual_dim=VISUAL, text_dim=TEXT, hidden_dim=9, **options).eval()


def make_trans(**options) -> Trans:
    """Of two heads and layers, with random norms too and refinements that are not next to 0."""
    options = {"hidden_dim": 8, "num_heads": 2, "ffn_dim": 10, **options}
    trans = Trans(visual_dim=VISUAL, text_dim=TEXT, **options).eval()
    torch.manual_seed(0)
    for parameter in trans.parameters():
        torch.nn.init.normal_(parameter)
    if trans.box_layers:  # the layers for each query are wider than those here
        for parameter in trans.layers.parameters():
            parameter.data /= 2
    if trans.mlp_t is not None:  # about as large as real ones
        torch.nn.init.normal_(trans.mlp_t.out.weight, std=0.03)
    return trans


def make(kind: str) -> Relatedness:
    cls, options = KINDS[kind]
    return (make_fc if cls is FC else make_trans)(**options)


def make_text(*lengths: int, seed: int = 0) -> TextFeatures:
    """Queries of so many random words."""
    longest = max(lengths, default=0)
    mask = torch.arange(longest) < torch.tensor(lengths, dtype=torch.int64)[:, None]
    words = random_normal(len(lengths), longest, TEXT, seed=seed) * mask[:, :, None]
    return TextFeatures(words, mask)


def make_visual(num_boxes: int, seed: int = 1) -> Tensor:
    return random_normal(num_boxes, VISUAL, seed=seed)


def make_locations(num_boxes: int, seed: int = 2) -> Tensor:
    return torch.rand(num_boxes, 5, generator=torch.Generator().manual_seed(seed))


def with_noisy_padding(text: TextFeatures, extra: int = 5) -> TextFeatures:
    """The same queries with so many more columns of padding, and large numbers in all padding."""
    mask = torch.cat([text.mask, text.mask.new_zeros(len(text), extra)], dim=1)
    words = torch.cat([text.words, text.words.new_zeros(len(text), extra, TEXT)], dim=1)
    return TextFeatures(words.masked_fill(~mask[..., None], 50.0), mask)


def random_normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
