"""Similarity of words: vectors of GloVe or MiniLM behind one interface.

A file in GloVe's text format is converted once to two arrays, which are kept beside it or in a
given folder: the vectors (.npy, float32 [N, D], rows of unit length or zero) and the index (.npy,
uint64 [2, W]: hashes of the words in ascending order, and the row of each). Their names contain the
size and modification time of the text file, so that a changed file is converted again.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import hashlib
import io
import os
import re
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..file_io import atomic_write, shown
from .minilm import encode, load_minilm

KEY = "MODEL.VLNMS.PSEUDO_GT.WORD_VECTORS"
CACHE_VERSION = 1
LINES_FOR_DIM = 100  # lines that decide how many numbers each line has
LINES_PER_CHUNK = 2000

_GLOVE = "for example glove.840B.300d.txt from https://nlp.stanford.edu/projects/glove/"


class WordVectors(ABC):
    """Vectors of words."""

    name: str  # their source
    dim: int  # numbers per word

    def __call__(self, words: Sequence[str]) -> np.ndarray:
        """The vectors of W words, float32 [W, dim]: of unit length, or zero for unknown words.

        Raises:
            TypeError: `words` is a single string.
        """
        if isinstance(words, str):
            raise TypeError(
                f"expected a sequence of words, got the string {shown(words)}; use [{shown(words)}]"
            )
        distinct = {word: i for i, word in enumerate(dict.fromkeys(words))}
        return self._look_up(list(distinct))[[distinct[word] for word in words]]

    def similarity(self, a: Sequence[str], b: Sequence[str]) -> np.ndarray:
        """Cosines of A words with B words, float32 [A, B]; 0 where one of them is unknown."""
        return np.clip(self(a) @ self(b).T, -1, 1)

    @abstractmethod
    def _look_up(self, words: list[str]) -> np.ndarray:
        """`__call__` for distinct words."""

    def __deepcopy__(self, memo) -> WordVectors:
        return self  # immutable, so copies of a model share it


class GloveVectors(WordVectors):
    """Vectors from a file in GloVe's text format, `word v1 ... vd` per line.

    The file is read once and kept as arrays (see above), which open at once. A word that is not in
    the file is looked up in lower case. The first of equal words counts.

    Args:
        path: for example glove.840B.300d.txt from https://nlp.stanford.edu/projects/glove/.
        cache_dir: folder for the arrays; None for that of the file.

    Raises:
        FileNotFoundError: no such file.
        ImportError: the file must be read, and pyarrow is not installed.
        ValueError: a line is malformed, or the file has none.
        OSError: the arrays cannot be written.
    """

    def __init__(self, path: str | Path, cache_dir: str | Path | None = None):
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"no word vectors at {path} ({KEY}): expected a file in GloVe's text format, "
                f"{_GLOVE}, or nothing for those of MiniLM"
            )
        self.name = str(path)
        self._cache_dir = None if cache_dir is None else Path(cache_dir)
        self._vectors, self._index = _open_cache(path.resolve(), self._cache_dir)
        self.dim = self._vectors.shape[1]

    def __len__(self) -> int:
        """Number of distinct words."""
        return self._index.shape[1]

    def __contains__(self, word: str) -> bool:
        """Whether the file has exactly this word."""
        return self._rows([word])[0] >= 0

    def __reduce__(self):
        return type(self), (self.name, self._cache_dir)  # the arrays stay on disk

    def _look_up(self, words: list[str]) -> np.ndarray:
        rows = self._rows(words)
        unknown = np.flatnonzero(rows < 0)
        rows[unknown] = self._rows([words[i].lower() for i in unknown])
        vectors = np.zeros((len(words), self.dim), dtype=np.float32)
        vectors[rows >= 0] = self._vectors[rows[rows >= 0]]
        return vectors

    def _rows(self, words: list[str]) -> np.ndarray:
        """int64 [W]: the row of each word, -1 where the file does not have it."""
        hashes = np.array([_hash(word) for word in words], dtype=np.uint64)
        known, rows = self._index
        at = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
        return np.where(known[at] == hashes, rows[at].astype(np.int64), -1)


class MiniLMVectors(WordVectors):
    """Each word or phrase as a sentence of its own through MiniLM, averaged over its pieces.

    Every word is encoded once and remembered. Any word that is not blank is known.

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
    """`MiniLMVectors` for an empty source or "MiniLM", otherwise `GloveVectors` of that path.

    Raises:
        FileNotFoundError, ImportError, OSError, ValueError: see the two classes.
    """
    if source in ("", MiniLMVectors.name):
        return MiniLMVectors()
    return GloveVectors(source, cache_dir)


def read_word_vectors(path: str | Path, words: Collection[str], dim: int) -> dict[str, np.ndarray]:
    """The vectors of some words, as they stand in a file in GloVe's text format.

    Returns:
        word -> float32 [dim], for the words that are in the file; the first of equal words counts.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file has no vectors or is damaged, or the line of one of the words does not
            have `dim` numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no word vectors at {path} (MODEL.VLNMS.WORD_VECTORS): expected GloVe's text format, "
            f"{_GLOVE}"
        )
    wanted = set(words)
    vectors: dict[str, np.ndarray] = {}
    _find_dim(path)  # refuses what has no vectors
    for number, line in enumerate(_read_lines(path), start=1):
        # The word ends at the first space unless it contains spaces itself.
        if line.split(" ", 1)[0].rstrip() not in wanted:
            continue
        word, vector, problem = _parse_line(line.rstrip(), dim)
        if word not in wanted or word in vectors:
            continue
        if vector is None:
            raise ValueError(
                f"{path}, line {number}: expected {shown(word)} and {dim} finite numbers "
                f"(MODEL.VLNMS.BIGRU.EMBED_DIM), got {problem}"
            )
        vectors[word] = vector
    return vectors


# --- the file --------------------------------------------------------------------------------


def _read_lines(path: Path) -> Iterator[str]:
    """The lines of a file in UTF-8 or, with its byte-order mark, UTF-16; or of its gzip."""
    with path.open("rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    with gzip.open(path) if is_gzip else path.open("rb") as file:
        try:
            is_utf16 = file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
            encoding = "utf-16" if is_utf16 else "utf-8-sig"
            yield from io.TextIOWrapper(file, encoding, errors="replace")
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: damaged gzip ({error}); download it again") from error


def _parse_line(line: str, dim: int) -> tuple[str, np.ndarray | None, str]:
    """The word of a line without white space at its end; its vector, float32 [dim], or None for a
    malformed line; what the line has instead."""
    # From the right, since a few "words" of GloVe 840B contain spaces.
    word, *fields = line.rsplit(" ", dim)
    first, *more = word.split(" ")
    if more and all(map(_is_number, more)):  # too many numbers rather than a longer word
        word, fields = first, more + fields
    problem = f"{shown(word)} and {len(fields)} fields"
    if not word or len(fields) != dim or not all(map(_is_number, fields)):
        return word, None, problem
    with np.errstate(over="ignore"):  # becomes infinite, which is malformed
        vector = np.array([float(field) for field in fields], dtype=np.float32)
    return word, vector if np.isfinite(vector).all() else None, problem


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def _parse_lines(lines: list[str], dim: int) -> tuple[list[str], np.ndarray] | None:
    """The words and vectors, float32 [L, dim], of lines without white space at their end; None
    if a line is malformed or unusual, so that `_parse_line` must decide."""
    import pyarrow as pa
    import pyarrow.compute as pc

    fields = pc.split_pattern(pa.array(lines, pa.string()), " ", max_splits=dim, reverse=True)
    words = pc.list_element(fields, 0).to_pylist()
    try:
        numbers = pc.list_slice(fields, 1).flatten().cast(pa.float64()).to_numpy()
    except pa.ArrowInvalid:
        return None
    with np.errstate(over="ignore"):
        numbers = numbers.astype(np.float32)
    complete = pc.all(pc.equal(pc.list_value_length(fields), dim + 1)).as_py()
    if not (complete and np.isfinite(numbers).all() and all(words)):
        return None
    if any(_is_number(word.rsplit(" ", 1)[1]) for word in words if " " in word):
        return None
    return words, numbers.reshape(-1, dim)


def _read_chunks(source: Path, dim: int) -> Iterator[tuple[list[str], np.ndarray]]:
    """The words and vectors of a file in chunks of at most `LINES_PER_CHUNK`, in order."""
    lines, first = _read_lines(source), 1
    while chunk := [line.rstrip() for line in islice(lines, LINES_PER_CHUNK)]:
        parsed = _parse_lines([line for line in chunk if line], dim)
        yield parsed or _parse_one_by_one(source, chunk, first, dim)
        first += len(chunk)


def _parse_one_by_one(
    source: Path, lines: list[str], first: int, dim: int
) -> tuple[list[str], np.ndarray]:
    words, vectors = [], []
    for number, line in enumerate(lines, start=first):
        if not line:
            continue
        word, vector, problem = _parse_line(line, dim)
        if vector is None:
            raise ValueError(
                f"{source}, line {number}: expected a word and {dim} finite numbers separated by "
                f"spaces (GloVe's text format; {dim} as in most of the first lines), got "
                f"{problem}. Download the file again"
            )
        words.append(word)
        vectors.append(vector)
    return words, np.array(vectors, dtype=np.float32).reshape(-1, dim)


def _find_dim(source: Path) -> int:
    """Numbers per line: the most common number of spaces in the first lines."""
    lines = [line.rstrip() for line in islice(_read_lines(source), LINES_FOR_DIM)]
    counts = Counter(line.count(" ") for line in lines if line)
    dim = counts.most_common(1)[0][0] if counts else 0
    if not dim:
        raise ValueError(
            f"{source}: expected lines of a word and numbers separated by spaces, in GloVe's text "
            "format, but there are none. Check the file, or download it again"
        )
    if dim > 1 and re.fullmatch(r"\d+ \d+", lines[0]):
        raise ValueError(
            f"{source}, line 1: {shown(lines[0])} is the size of the file, with which those of "
            "word2vec and fastText begin; delete that line"
        )
    return dim


# --- the arrays ------------------------------------------------------------------------------


def _open_cache(source: Path, folder: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """The vectors of a text file, memory-mapped, and their index; made if there are none for it."""
    vectors_path, index_path = _cache_paths(source, folder)
    arrays = _read_cache(vectors_path, index_path)
    if arrays is None:
        try:
            vectors_path.parent.mkdir(parents=True, exist_ok=True)
            _make_cache(source, vectors_path, index_path)
        except OSError as error:
            raise OSError(
                f"cannot keep the vectors of {source} in {vectors_path.parent} ({error}): expected "
                "a folder that can be written to, with room for 4 bytes per number. Move the file "
                "to one, or give another folder (cache_dir)"
            ) from error
        # Delete the arrays of earlier versions of the text file.
        stem = glob.escape(vectors_path.name.rsplit(".vlnms-", 1)[0])
        for path in vectors_path.parent.glob(f"{stem}.vlnms-v*-*-*.npy"):
            if path not in (vectors_path, index_path):
                path.unlink(missing_ok=True)
        arrays = _read_cache(vectors_path, index_path)
        if arrays is None:
            raise OSError(f"{vectors_path} was written but cannot be read back; check the disk")
    return arrays


def _cache_paths(source: Path, folder: Path | None) -> tuple[Path, Path]:
    status = source.stat()
    stem = source.name
    if folder is not None:  # may be shared by files of the same name
        stem += "-" + hashlib.sha256(os.fsencode(source)).hexdigest()[:12]
    stem += f".vlnms-v{CACHE_VERSION}-{status.st_size}-{status.st_mtime_ns}"
    folder = source.parent if folder is None else folder.resolve()
    return folder / f"{stem}.vectors.npy", folder / f"{stem}.index.npy"


def _read_cache(vectors_path: Path, index_path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """The two arrays; None if they are missing or damaged."""
    try:
        vectors = np.load(vectors_path, mmap_mode="r", allow_pickle=False)
        index = np.load(index_path, allow_pickle=False)
    except Exception:  # with damaged headers NumPy raises all kinds of errors
        return None
    sound = (
        (vectors.dtype, vectors.ndim) == (np.float32, 2)
        and (index.dtype, index.ndim, len(index)) == (np.uint64, 2, 2)
        and 0 < index.shape[1] <= len(vectors)
        and index[1].max() < len(vectors)
    )
    return (vectors, index) if sound else None


def _make_cache(source: Path, vectors_path: Path, index_path: Path) -> None:
    """Convert the text file chunk by chunk; the index is written last."""
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{source}: reading GloVe's text format needs pyarrow. Install it with\n"
            '    pip install "vlnms_d2[nlp]"'
        ) from error
    dim = _find_dim(source)
    hashes: list[int] = []
    with atomic_write(vectors_path) as file:
        _write_header(file, 0, dim)
        for words, vectors in _read_chunks(source, dim):
            hashes += map(_hash, words)
            rows = vectors.astype(np.float64)
            lengths = np.linalg.norm(rows, axis=1, keepdims=True)
            file.write((rows / np.where(lengths > 0, lengths, 1)).astype("<f4").data)
        _write_header(file, len(hashes), dim)
    # `unique` gives the first position of equal words.
    known, first = np.unique(np.array(hashes, dtype=np.uint64), return_index=True)
    with atomic_write(index_path) as file:
        np.save(file, np.stack([known, first.astype(np.uint64)]), allow_pickle=False)


def _write_header(file: BinaryIO, rows: int, dim: int) -> None:
    """The header of an .npy file. NumPy pads it for any number of rows, so that it can be written
    before that number is known, and overwritten afterwards."""
    file.seek(0)
    header = {"descr": "<f4", "fortran_order": False, "shape": (rows, dim)}
    np.lib.format.write_array_header_1_0(file, header)


def _hash(word: str) -> int:
    """64 bits of a word. Among the 2.2 million words of GloVe 840B, the chance that any two
    collide is one in ten million."""
    digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
