"""Many lines of a file in GloVe's text format at once."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np

from .glove_line import parse_vector, split_line
from .glove_numbers import MARGIN, parse_numbers

_SPACE, _LINE_FEED = b" \n"


class Block(NamedTuple):
    """What lines hold.

    Attributes:
        num_lines: the empty ones too.
        hashes: uint64 [W], of the words (`hash_word`).
        vectors: float32 [W, D], of unit length, or zero.
    """

    num_lines: int
    hashes: np.ndarray
    vectors: np.ndarray


class MalformedLine(ValueError):
    """A line that is no word with so many finite numbers.

    Attributes:
        number: in its block, from 0.
        found: what is there instead.
    """

    def __init__(self, number: int, found: str):
        super().__init__(number, found)
        self.number = number
        self.found = found


def hash_word(word: str) -> int:
    """64 bits of a word. Among the 2.2 million words of GloVe 840B the chance that any two share
    them is one in ten million."""
    digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def read_block(text: bytes, dim: int) -> Block:
    """Read lines; the same as `split_line` and `parse_vector` one by one, which here read only
    those that are out of the ordinary.

    Args:
        text: whole lines of UTF-8, the last one with its end.
        dim: numbers a line.

    Raises:
        MalformedLine: the first one.
    """
    if b"\r" in text:
        text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    padded = b" " * MARGIN + text + b" "
    codes = np.frombuffer(padded, np.uint8)
    line_ends = np.flatnonzero(codes == _LINE_FEED)
    line_starts = np.concatenate([[MARGIN], line_ends[:-1] + 1])
    words, vectors = _read_plain(padded, codes, line_starts, line_ends, dim)
    for number in [i for i, word in enumerate(words) if word is None]:
        line = padded[line_starts[number] : line_ends[number]].decode("utf-8", "replace")
        if not line.strip():
            continue
        words[number], values = split_line(line, dim)
        vector = parse_vector(values, dim)
        if vector is None or not words[number]:
            raise MalformedLine(number, f"{words[number]!r} and {len(values)} fields")
        vectors[number] = vector
    kept = [i for i, word in enumerate(words) if word is not None]
    hashes = np.array([hash_word(words[i]) for i in kept], dtype=np.uint64)
    return Block(len(words), hashes, _normalised(vectors[kept]))


def _read_plain(
    padded: bytes, codes: np.ndarray, line_starts: np.ndarray, line_ends: np.ndarray, dim: int
) -> tuple[list[str | None], np.ndarray]:
    """Of each line the word and the numbers, float32 [L, D], where it has as many spaces as
    numbers; of other and malformed lines None and anything."""
    gaps = np.flatnonzero((codes == _SPACE) | (codes == _LINE_FEED))
    at_end = np.searchsorted(gaps, line_ends)
    num_gaps = np.diff(at_end, prepend=MARGIN - 1)
    plain = np.flatnonzero(num_gaps == dim + 1)
    places = gaps[at_end[plain, None] + np.arange(-dim, 1)]
    starts, ends = places[:, :-1] + 1, places[:, 1:]
    values, fits = parse_numbers(codes, starts, ends)
    odd = ~fits
    values[odd] = [
        _float(padded[start:end])
        for start, end in zip(starts[odd].tolist(), ends[odd].tolist(), strict=True)
    ]
    vectors = np.zeros((len(line_ends), dim), dtype=np.float32)
    with np.errstate(over="ignore"):  # infinite, hence left out
        vectors[plain] = values
    words: list[str | None] = [None] * len(line_ends)
    good = np.isfinite(vectors[plain]).all(axis=1) & (places[:, 0] > line_starts[plain])
    for line, start, end in zip(
        plain[good].tolist(),
        line_starts[plain[good]].tolist(),
        places[good, 0].tolist(),
        strict=True,
    ):
        words[line] = padded[start:end].decode("utf-8", "replace")
    return words, vectors


def _float(number: bytes) -> float:
    try:
        return float(number)
    except ValueError:
        return np.nan


def _normalised(vectors: np.ndarray) -> np.ndarray:
    rows = vectors.astype(np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.where(lengths > 0, lengths, 1)).astype(np.float32)
