"""The paper's text encoder (Sec. 3.2.1): a vocabulary, word embeddings, a bidirectional GRU."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from detectron2.config import configurable
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ...file_io import shown, write_json
from ...language.word_vectors import read_word_vectors
from .build import TEXT_ENCODER_REGISTRY, TextEncoder, TextFeatures, pad_words

logger = logging.getLogger(__name__)

VOCABULARY_VERSION = 1
PAD, UNK = "<pad>", "<unk>"
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


def tokenize(text: str) -> list[str]:
    """Lower-case words of `text`; punctuation is dropped, "man's" stays one word."""
    straight = unicodedata.normalize("NFKC", text).replace("’", "'")
    return _WORD.findall(straight.lower())


SPLITS = {
    "words": tokenize,
    "spaces": lambda text: [word for word in text.lower().split() if word not in (PAD, UNK)],
}


def _splitter(name: str) -> Callable[[str], list[str]]:
    if name not in SPLITS:
        expected = " or ".join(SPLITS)
        raise ValueError(f"MODEL.VLNMS.BIGRU.SPLIT is {shown(name)}, expected {expected}")
    return SPLITS[name]


class Vocabulary:
    """Maps words to ids: 0 is padding, 1 any unknown word, the others follow from 2.

    Args:
        words: distinct words, without the special words `<pad>` and `<unk>`.

    Raises:
        ValueError: a word occurs twice or is one of the special ones.
    """

    def __init__(self, words: Iterable[str] = ()):
        self.words = (PAD, UNK, *words)
        self._ids = {word: i for i, word in enumerate(self.words)}
        if len(self._ids) != len(self.words):
            repeated = next(word for word, n in Counter(self.words).items() if n > 1)
            raise ValueError(f"the vocabulary holds {shown(repeated)} more than once")

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: str) -> bool:
        return word in self._ids

    def encode(self, words: Iterable[str]) -> list[int]:
        """The ids of words; 1 for unknown ones."""
        return [self._ids.get(word, 1) for word in words]

    @property
    def fingerprint(self) -> int:
        """A 63-bit hash of the words and their order."""
        digest = hashlib.sha256("\n".join(self.words).encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    @classmethod
    def build(
        cls, sentences: Iterable[str], min_count: int = 2, split: str = "words"
    ) -> Vocabulary:
        """The words that occur at least `min_count` times, most frequent first (Sec. 4). `split` is
        one of `SPLITS`."""
        words = _splitter(split)
        counts = Counter(word for sentence in sentences for word in words(sentence))
        kept = [word for word, n in counts.items() if n >= min_count]
        return cls(sorted(kept, key=lambda word: (-counts[word], word)))

    def save(self, path: str | Path) -> None:
        """Write the vocabulary as JSON, atomically."""
        write_json(path, {"version": VOCABULARY_VERSION, "words": list(self.words[2:])})

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is not a vocabulary, or one of another version.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"no vocabulary file {path} (MODEL.VLNMS.VOCAB): tools/train_net.py writes "
                "vocab.json beside the model that it trains; give the path of that file"
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version, words = content["version"], content["words"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f'{path} is not a vocabulary: expected JSON {{"version": {VOCABULARY_VERSION}, '
                f'"words": [...]}}, got an error reading it ({shown(error)})'
            ) from error
        if version != VOCABULARY_VERSION:
            raise ValueError(
                f"{path} is a vocabulary of version {shown(version)}; this release reads "
                f"{VOCABULARY_VERSION}"
            )
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError(f'{path}: "words" must be a list of strings')
        try:
            return cls(words)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


@TEXT_ENCODER_REGISTRY.register()
class BiGRU(TextEncoder):
    """Word embeddings and a bidirectional GRU, whose two outputs for a word are concatenated.

    Args:
        vocabulary: the known words.
        embed_dim: width of the embeddings.
        hidden_dim: width of the GRU per direction; `output_dim` is twice that.
        max_words: longer queries are truncated to this many words.
        split: "words": see `tokenize`; "spaces": at white space, as the tokens of REFER, and the
            parts that the vocabulary does not have as "words".
        freeze_embedding: the embeddings are not trained.
    """

    uses_vocabulary = True

    @configurable
    def __init__(
        self,
        *,
        vocabulary: Vocabulary,
        embed_dim: int,
        hidden_dim: int,
        max_words: int,
        split: str = "words",
        freeze_embedding: bool = False,
    ):
        super().__init__()
        if max_words < 1:
            raise ValueError(f"MODEL.VLNMS.MAX_WORDS is {max_words}, expected at least 1")
        self.vocabulary = vocabulary
        self.max_words = max_words
        _splitter(split)  # checks it
        self.split = split  # not the function, which cannot be pickled
        self.output_dim = 2 * hidden_dim
        self.embedding = nn.Embedding(len(vocabulary), embed_dim, padding_idx=0)
        self.embedding.requires_grad_(not freeze_embedding)
        self.gru = nn.GRU(embed_dim, hidden_dim, batch_first=True, bidirectional=True)
        self.fingerprints = {"vocabulary_fingerprint": vocabulary.fingerprint}
        self.advice = (
            f"MODEL.VLNMS.VOCAB has {len(vocabulary)} words: give the vocab.json that was written "
            "beside the weights"
        )

    @classmethod
    def from_config(cls, cfg):
        path, bigru = cfg.MODEL.VLNMS.VOCAB, cfg.MODEL.VLNMS.BIGRU
        if not path:
            logger.warning(
                "MODEL.VLNMS.VOCAB is empty: every word of a query is <unk> until you give the "
                "vocab.json that belongs to your weights, or train (tools/train_net.py builds one)."
            )
        return {
            "vocabulary": Vocabulary.load(path) if path else Vocabulary(),
            "embed_dim": bigru.EMBED_DIM,
            "hidden_dim": bigru.HIDDEN_DIM,
            "max_words": cfg.MODEL.VLNMS.MAX_WORDS,
            "split": bigru.SPLIT,
            "freeze_embedding": bigru.FREEZE_WORD_VECTORS and bool(cfg.MODEL.VLNMS.WORD_VECTORS),
        }

    def tokenize(self, query: str) -> list[str]:
        words = _splitter(self.split)(query)
        if self.split == "spaces":
            known = self.vocabulary
            words = [w for part in words for w in ([part] if part in known else tokenize(part))]
        return words[: self.max_words]

    def forward(self, queries: list[str]) -> TextFeatures:
        """Encode queries.

        Args:
            queries: Q strings.

        Returns:
            TextFeatures with words [Q, L, output_dim], L the longest query's number of words.
        """
        device = self.embedding.weight.device
        word_ids = [self.vocabulary.encode(self.tokenize(query)) for query in queries]
        ids, mask, lengths = pad_words(word_ids, device)  # [Q, L], [Q, L], [Q]
        features = self.embedding.weight.new_zeros(*ids.shape, self.output_dim)
        # cuDNN and packing reject sequences of length 0; empty queries keep their zeros. Sorted
        # here, on the CPU: unpacking after `enforce_sorted=False` waits for a GPU.
        rows = lengths.argsort(descending=True, stable=True)[: lengths.count_nonzero()]
        if len(rows):
            packed = pack_padded_sequence(
                self.embedding(ids[rows]), lengths[rows], batch_first=True
            )
            encoded, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True)
            # Under autocast, cuDNN returns half precision.
            encoded = encoded.to(features.dtype)  # [len(rows), L, output_dim]
            features = features.index_copy(0, rows.to(device), encoded)
        return TextFeatures(features, mask, lengths)

    @torch.no_grad()
    def load_word_vectors(self, path: str | Path) -> int:
        """Initialise the embeddings from a file in GloVe's format; the others stay random, or are
        zero if the embeddings are frozen. Returns how many words of the vocabulary have a vector
        there."""
        known = read_word_vectors(path, self.vocabulary.words, self.embedding.embedding_dim)
        if not self.embedding.weight.requires_grad:
            self.embedding.weight.zero_()
        for i, word in enumerate(self.vocabulary.words):
            if word in known:
                self.embedding.weight[i] = torch.from_numpy(known[word])
        return len(known)
