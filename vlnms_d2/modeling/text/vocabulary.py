"""Words, and the numbers that stand for them."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from ...file_io import write_json

VERSION = 1
PAD, UNK = "<pad>", "<unk>"
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


def tokenize(text: str) -> list[str]:
    """Lower-case words of `text`; punctuation is dropped, "man's" stays one word."""
    straight = unicodedata.normalize("NFKC", text).replace("’", "'")
    return _WORD.findall(straight.lower())


class Vocabulary:
    """A fixed list of words: 0 is padding, 1 any unknown word.

    Args:
        words: distinct words, without the two special ones.

    Raises:
        ValueError: a word occurs twice or is one of the special ones.
    """

    def __init__(self, words: Iterable[str] = ()):
        self.words = (PAD, UNK, *words)
        self._ids = {word: i for i, word in enumerate(self.words)}
        if len(self._ids) != len(self.words):
            repeated = next(word for word, n in Counter(self.words).items() if n > 1)
            raise ValueError(f"the vocabulary holds {repeated!r} more than once")

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: str) -> bool:
        return word in self._ids

    def encode(self, words: Iterable[str]) -> list[int]:
        """Word ids; unknown words give 1."""
        return [self._ids.get(word, 1) for word in words]

    @property
    def fingerprint(self) -> int:
        """A 63-bit number that differs between different vocabularies."""
        digest = hashlib.sha256("\n".join(self.words).encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    @classmethod
    def build(cls, sentences: Iterable[str], min_count: int = 2) -> Vocabulary:
        """The words seen at least `min_count` times, most frequent first (SPEC section 3)."""
        counts = Counter(word for sentence in sentences for word in tokenize(sentence))
        kept = [word for word, n in counts.items() if n >= min_count]
        return cls(sorted(kept, key=lambda word: (-counts[word], word)))

    def save(self, path: str | Path) -> None:
        """Write the vocabulary as JSON, whole or not at all."""
        write_json(path, {"version": VERSION, "words": list(self.words[2:])})

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
                f"no vocabulary file {path} (MODEL.VLNMS.VOCAB): the trainer writes vocab.json "
                "beside the model that it trains; give the path of that file"
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version, words = content["version"], content["words"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path} is not a vocabulary: expected JSON {{"version": {VERSION}, "words": '
                f"[...]}}, got an error reading it ({error!r})"
            ) from error
        if version != VERSION:
            raise ValueError(
                f"{path} is a vocabulary of version {version!r}; this release reads {VERSION}"
            )
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError(f'{path}: "words" must be a list of strings')
        try:
            return cls(words)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
