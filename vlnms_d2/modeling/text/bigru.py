"""The paper's text encoder: word embeddings and a bidirectional GRU (SPEC section 3)."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from detectron2.config import configurable
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ...language.word_vectors import read_word_vectors
from .encoder import TEXT_ENCODER_REGISTRY, TextEncoder, TextFeatures, pad_words
from .vocabulary import Vocabulary, tokenize

logger = logging.getLogger(__name__)


@TEXT_ENCODER_REGISTRY.register()
class BiGRU(TextEncoder):
    """Embeddings and a bidirectional GRU; a word's feature is both directions side by side.

    Args:
        vocabulary: the known words.
        embed_dim: width of the embeddings.
        hidden_dim: width of the GRU per direction; `output_dim` is twice that.
        max_words: longer queries are cut off after this many words.
    """

    uses_vocabulary = True

    @configurable
    def __init__(self, *, vocabulary: Vocabulary, embed_dim: int, hidden_dim: int, max_words: int):
        super().__init__()
        if max_words < 1:
            raise ValueError(f"MODEL.VLNMS.MAX_WORDS is {max_words}, expected at least 1")
        self.vocabulary = vocabulary
        self.max_words = max_words
        self.output_dim = 2 * hidden_dim
        self.embedding = nn.Embedding(len(vocabulary), embed_dim, padding_idx=0)
        self.gru = nn.GRU(embed_dim, hidden_dim, batch_first=True, bidirectional=True)
        # Saved with the weights, so that a checkpoint is never read with another vocabulary.
        self.register_buffer("vocabulary_fingerprint", torch.tensor(vocabulary.fingerprint))

    @classmethod
    def from_config(cls, cfg):
        path = cfg.MODEL.VLNMS.VOCAB
        if not path:
            logger.warning(
                "MODEL.VLNMS.VOCAB is empty: every word of a query is <unk> until you give the "
                "vocab.json that belongs to your weights, or train (the trainer builds one)."
            )
        return {
            "vocabulary": Vocabulary.load(path) if path else Vocabulary(),
            "embed_dim": cfg.MODEL.VLNMS.BIGRU.EMBED_DIM,
            "hidden_dim": cfg.MODEL.VLNMS.BIGRU.HIDDEN_DIM,
            "max_words": cfg.MODEL.VLNMS.MAX_WORDS,
        }

    def tokenize(self, query: str) -> list[str]:
        return tokenize(query)[: self.max_words]

    def forward(self, queries: list[str]) -> TextFeatures:
        """Encode queries.

        Args:
            queries: Q strings.

        Returns:
            TextFeatures with words [Q, L, output_dim], L the longest query's number of words.
        """
        device = self.embedding.weight.device
        words = [self.vocabulary.encode(self.tokenize(query)) for query in queries]
        ids, mask = pad_words(words, device)
        features = self.embedding.weight.new_zeros(*ids.shape, self.output_dim)
        # cuDNN and the packing refuse sequences of length 0; empty queries keep their zeros.
        rows = [i for i, query in enumerate(words) if query]
        if rows:
            lengths = torch.tensor([len(words[i]) for i in rows])
            packed = pack_padded_sequence(
                self.embedding(ids[rows]), lengths, batch_first=True, enforce_sorted=False
            )
            encoded, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True)
            # Under autocast, cuDNN answers in half precision.
            encoded = encoded.to(features.dtype)
            features = features.index_copy(0, torch.tensor(rows, device=device), encoded)
        return TextFeatures(features, mask)

    @torch.no_grad()
    def load_word_vectors(self, path: str | Path) -> int:
        """Initialise the embeddings from a GloVe-format file; returns how many words it knew."""
        known = read_word_vectors(path, self.vocabulary.words, self.embedding.embedding_dim)
        for i, word in enumerate(self.vocabulary.words):
            if word in known:
                self.embedding.weight[i] = torch.from_numpy(known[word])
        return len(known)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        found = state_dict.get(prefix + "vocabulary_fingerprint")
        if found is not None and int(found) != self.vocabulary.fingerprint:
            raise ValueError(
                "the checkpoint was trained with another vocabulary than the one of "
                f"MODEL.VLNMS.VOCAB ({len(self.vocabulary)} words): give the vocab.json that was "
                "written beside the weights"
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
