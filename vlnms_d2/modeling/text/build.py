"""Text encoders: the interface, the registry, and padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.utils.registry import Registry
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ...config import lookup

TEXT_ENCODER_REGISTRY = Registry("TEXT_ENCODER")
TEXT_ENCODER_REGISTRY.__doc__ = """
Registry for text encoders: subclasses of :class:`TextEncoder`, built by `cls(cfg)`.
"""


@dataclass
class TextFeatures:
    """Encoded queries.

    Attributes:
        words: float [Q, L, D], one feature per word; zeros for padding.
        mask: bool [Q, L], True for words, which come first, and False for padding. A row without
            words is an empty query.
        lengths: int64 [Q], on the CPU, the numbers of words; by default those of the mask, which
            on a GPU makes the host wait.
    """

    words: Tensor
    mask: Tensor
    lengths: Tensor | None = None

    def __post_init__(self):
        if self.lengths is None:
            self.lengths = self.mask.sum(dim=1).cpu()

    def __len__(self) -> int:
        return len(self.mask)

    def __getitem__(self, index: Tensor | list[int] | slice) -> TextFeatures:
        """The queries at `index`, without the padding that none of them needs."""
        lengths = self.lengths[index.cpu() if isinstance(index, Tensor) else index]
        longest = int(lengths.max()) if len(lengths) else 0
        return TextFeatures(self.words[index][:, :longest], self.mask[index][:, :longest], lengths)

    @staticmethod
    def cat(parts: Sequence[TextFeatures]) -> TextFeatures:
        """Concatenate the queries of several parts, padded to the longest."""
        longest = max(part.mask.shape[1] for part in parts)
        missing = [longest - part.mask.shape[1] for part in parts]
        return TextFeatures(
            torch.cat([F.pad(p.words, (0, 0, 0, n)) for p, n in zip(parts, missing, strict=True)]),
            torch.cat([F.pad(p.mask, (0, n)) for p, n in zip(parts, missing, strict=True)]),
            torch.cat([part.lengths for part in parts]),
        )


class TextEncoder(nn.Module):
    """Base class of the text encoders.

    Attributes:
        output_dim: width D of the word features.
        fingerprints: hashes below 2**63 by name, saved with the weights so that a checkpoint is
            never read with another encoder. No buffers, which averages of weights (EMA) change.
        advice: what to do if a checkpoint has others.
        uses_vocabulary: whether it reads `MODEL.VLNMS.VOCAB`. If so, and the key is empty,
            tools/train_net.py builds a vocabulary.
    """

    output_dim: int
    uses_vocabulary = False

    def __init__(self):
        super().__init__()
        self.fingerprints: dict[str, int] = {}
        self.advice = ""

    def tokenize(self, query: str) -> list[str]:
        """The words of `query` as the encoder splits it, truncated to its maximum length."""
        raise NotImplementedError

    def forward(self, queries: list[str]) -> TextFeatures:
        """Encode queries. An empty or blank query gives a row without words."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, value in self.fingerprints.items():
            destination[prefix + name] = torch.tensor(value)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, *args):
        for name, value in self.fingerprints.items():
            saved = state_dict.pop(prefix + name, None)
            if saved is None:
                missing_keys.append(prefix + name)
            else:
                self.check_fingerprint(name, saved, value)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, *args)

    def check_fingerprint(self, name: str, saved: Tensor, value: int) -> None:
        """Raise a ValueError unless a checkpoint has this fingerprint, rounded if averaged."""
        if abs(saved.item() - value) > (value / 1000 if saved.is_floating_point() else 0):
            raise ValueError(
                "the checkpoint was trained with another vocabulary or text encoder: they differ "
                f"in the {name.removesuffix('_fingerprint')}. {self.advice}"
            )


def build_text_encoder(cfg, name: str | None = None) -> TextEncoder:
    """The text encoder of a name, by default `MODEL.VLNMS.TEXT_ENCODER`; see `lookup`."""
    encoder: Any = text_encoder_class(name or cfg.MODEL.VLNMS.TEXT_ENCODER)
    return encoder(cfg)


def text_encoder_class(name: str) -> type[TextEncoder]:
    """The text encoder class of a registered name; see `lookup`."""
    return lookup(TEXT_ENCODER_REGISTRY, name, "TEXT_ENCODER")


def pad_features(words: list[Tensor], dim: int, device: torch.device) -> TextFeatures:
    """Pad the features of queries, each float [L, dim], to the longest."""
    features = pad_sequence([*words, torch.zeros(0, dim)], batch_first=True)[: len(words)]
    lengths = torch.tensor([len(w) for w in words], dtype=torch.int64)
    mask = torch.arange(features.shape[1]) < lengths[:, None]
    return TextFeatures(features.to(device), mask.to(device), lengths)


def pad_words(words: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Word ids of Q queries, padded with 0, int64 [Q, L]; and `TextFeatures.mask`, `.lengths`."""
    lengths = torch.tensor([len(query) for query in words], dtype=torch.int64)
    mask = torch.arange(max(map(len, words), default=0)) < lengths[:, None]
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    ids[mask] = torch.tensor([word for query in words for word in query], dtype=torch.int64)
    return ids.to(device), mask.to(device), lengths
