"""How alike words are: vectors of GloVe or of MiniLM behind one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .glove_block import hash_word
from .glove_cache import open_vectors
from .minilm import encode, load_minilm

KEY = "MODEL.VLNMS.PSEUDO_GT.WORD_VECTORS"


class WordVectors(ABC):
    """Vectors of words.

    Attributes:
        name: where they come from.
        dim: numbers a word.
    """

    name: str
    dim: int

    def __call__(self, words: Sequence[str]) -> np.ndarray:
        """The vectors of W words.

        Returns:
            float32 [W, dim]; rows have unit length, those of unknown words are zero.

        Raises:
            TypeError: one string was given, which would be read letter by letter.
        """
        if isinstance(words, str):
            raise TypeError(
                f"expected a sequence of words, got the string {words!r}; use [{words!r}]"
            )
        distinct = {word: i for i, word in enumerate(dict.fromkeys(words))}
        return self._look_up(list(distinct))[[distinct[word] for word in words]]

    def similarity(self, a: Sequence[str], b: Sequence[str]) -> np.ndarray:
        """Cosines of A words with B words.

        Returns:
            float32 [A, B]; 0 where one of the two is unknown.
        """
        return np.clip(self(a) @ self(b).T, -1, 1)

    @abstractmethod
    def _look_up(self, words: list[str]) -> np.ndarray:
        """What `__call__` gives, for distinct words."""

    def __deepcopy__(self, memo) -> WordVectors:
        # Nothing of it changes; a copy of a model needs no second one.
        return self


class GloveVectors(WordVectors):
    """Vectors from a file in GloVe's text format, `word v1 ... vd` a line.

    The file is read once and kept as arrays, see `glove_cache`; afterwards it opens at once. A word
    that it lacks is looked up in lower case. Of equal words the first counts.

    Args:
        path: for example glove.840B.300d.txt from https://nlp.stanford.edu/projects/glove/.
        cache_dir: folder for the arrays; None for that of the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line is malformed, or the file has none.
        OSError: the arrays cannot be written.
    """

    def __init__(self, path: str | Path, cache_dir: str | Path | None = None):
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"no word vectors at {path} ({KEY}): expected a file in GloVe's text format, for "
                "example glove.840B.300d.txt from https://nlp.stanford.edu/projects/glove/, or "
                "nothing for those of MiniLM"
            )
        self.name = str(path)
        self._cache_dir = None if cache_dir is None else Path(cache_dir)
        self._vectors, self._index = open_vectors(path, self._cache_dir)
        self.dim = self._vectors.shape[1]

    def __len__(self) -> int:
        """Distinct words."""
        return self._index.shape[1]

    def __contains__(self, word: str) -> bool:
        """Whether the file has this very word."""
        return self._rows([word])[0] >= 0

    def __reduce__(self):
        # Arrays on disk are opened again, not carried along.
        return type(self), (self.name, self._cache_dir)

    def _look_up(self, words: list[str]) -> np.ndarray:
        rows = self._rows(words)
        unknown = np.flatnonzero(rows < 0)
        rows[unknown] = self._rows([words[i].lower() for i in unknown])
        vectors = np.zeros((len(words), self.dim), dtype=np.float32)
        vectors[rows >= 0] = self._vectors[rows[rows >= 0]]
        return vectors

    def _rows(self, words: list[str]) -> np.ndarray:
        """int64 [W]: the row of each word, -1 for those that the file lacks."""
        hashes = np.array([hash_word(word) for word in words], dtype=np.uint64)
        known, rows = self._index
        at = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
        return np.where(known[at] == hashes, rows[at].astype(np.int64), -1)


class MiniLMVectors(WordVectors):
    """Each word or phrase as a sentence of its own through MiniLM, averaged over its pieces.

    Every word is encoded once and remembered. Any word with a letter or sign is known.

    Raises:
        ImportError: transformers or the package of the model is not installed.
    """

    name = "MiniLM"

    def __init__(self):
        self._tokenizer, self._model = load_minilm(KEY)
        self.dim = self._model.config.hidden_size
        self._known: dict[str, np.ndarray] = {}

    def __reduce__(self):
        return type(self), ()

    def _look_up(self, words: list[str]) -> np.ndarray:
        new = [word for word in words if word.strip() and word not in self._known]
        for word, vector in zip(new, encode(self._tokenizer, self._model, new), strict=True):
            self._known[word] = vector
        zero = np.zeros(self.dim, dtype=np.float32)
        vectors = [self._known.get(word, zero) for word in words]
        return np.stack(vectors) if vectors else np.zeros((0, self.dim), dtype=np.float32)


def load_word_vectors(source: str, cache_dir: str | Path | None = None) -> WordVectors:
    """Empty or "MiniLM" gives `MiniLMVectors`, anything else `GloveVectors` of that path.

    Raises:
        FileNotFoundError, ImportError, OSError, ValueError: see the two classes.
    """
    if source in ("", MiniLMVectors.name):
        return MiniLMVectors()
    return GloveVectors(source, cache_dir)
