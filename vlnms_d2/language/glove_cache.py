"""A file of word vectors in GloVe's text format, as arrays that open at once.

Beside the text file, or in a folder given, lie two arrays: the vectors (.npy, float32 [N, D], rows
of unit length or zero) and the index (.npy, uint64 [2, W]: the words' hashes in rising order, and
the row of each). Their names hold the size and time of the text file, so those of another are never
taken for its own.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..file_io import atomic_write
from .glove_block import Block, MalformedLine, read_block

VERSION = 1
LINES_THAT_TELL = 100  # of which the number of fields is taken
BLOCK = 1 << 20  # bytes of text read at once
THREADS = min(4, os.cpu_count() or 1)


def open_vectors(source: Path, folder: Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The vectors of a text file and their index, made if there are none that fit it.

    Args:
        source: an existing file in GloVe's text format.
        folder: where to keep the arrays; None for the folder of the file.

    Returns:
        vectors, float32 [N, D] in the order of the file, mapped into memory; index, uint64 [2, W].

    Raises:
        ValueError: a line of the file is malformed, or there is none.
        OSError: the arrays cannot be written.
    """
    source = source.resolve()
    vectors_path, index_path = _cache_paths(source, folder)
    arrays = _read_cache(vectors_path, index_path)
    if arrays is None:
        try:
            vectors_path.parent.mkdir(parents=True, exist_ok=True)
            _make_cache(source, vectors_path, index_path)
        except OSError as error:
            raise OSError(
                f"cannot keep the vectors of {source} in {vectors_path.parent} ({error}): expected "
                "a folder that can be written to, with room for 4 bytes a number. Move the file "
                "to one, or give another folder (cache_dir)"
            ) from error
        _remove_others(vectors_path, index_path)
        arrays = _read_cache(vectors_path, index_path)
        if arrays is None:
            raise OSError(f"{vectors_path} was written but cannot be read back; check the disk")
    return arrays


def _cache_paths(source: Path, folder: Path | None) -> tuple[Path, Path]:
    status = source.stat()
    stem = source.name
    if folder is not None:  # files of one name may share it
        stem += "-" + hashlib.sha256(os.fsencode(source)).hexdigest()[:12]
    stem += f".vlnms-v{VERSION}-{status.st_size}-{status.st_mtime_ns}"
    folder = source.parent if folder is None else folder.resolve()
    return folder / f"{stem}.vectors.npy", folder / f"{stem}.index.npy"


def _remove_others(vectors_path: Path, index_path: Path) -> None:
    """Delete what was kept of other versions of the text file."""
    stem = vectors_path.name.rsplit(".vlnms-", 1)[0]
    for path in vectors_path.parent.glob(f"{glob.escape(stem)}.vlnms-v*-*-*.npy"):
        if path not in (vectors_path, index_path):
            path.unlink(missing_ok=True)


def _read_cache(vectors_path: Path, index_path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """The two arrays, None if they are missing, cut short or not what they should be."""
    try:
        vectors = np.load(vectors_path, mmap_mode="r", allow_pickle=False)
        index = np.load(index_path, allow_pickle=False)
    except Exception:  # damaged headers make numpy raise anything
        return None
    sound = (
        vectors.dtype == np.float32
        and vectors.ndim == 2
        and index.dtype == np.uint64
        and index.ndim == 2
        and len(index) == 2
        and 0 < index.shape[1] <= len(vectors)
        and index[1].max() < len(vectors)
        and (index[0, 1:] > index[0, :-1]).all()
    )
    return (vectors, index) if sound else None


def _make_cache(source: Path, vectors_path: Path, index_path: Path) -> None:
    """Read the text file block by block and write the two arrays, the index last."""
    dim = _find_dim(source)
    hashes = [np.zeros(0, dtype=np.uint64)]
    with atomic_write(vectors_path) as file:
        _write_header(file, 0, dim)
        for block in _read_blocks(source, dim):
            hashes.append(block.hashes)
            file.write(block.vectors.astype("<f4", copy=False).data)
        _write_header(file, sum(map(len, hashes)), dim)
    # Of equal words the first: `unique` gives the first place of each.
    words, rows = np.unique(np.concatenate(hashes), return_index=True)
    with atomic_write(index_path) as file:
        np.save(file, np.stack([words, rows.astype(np.uint64)]), allow_pickle=False)


def _write_header(file: BinaryIO, rows: int, dim: int) -> None:
    """The header of an .npy file, at its start. numpy leaves room in it for any number of rows, so
    it can be written before that is known, and again afterwards."""
    file.seek(0)
    header = {"descr": "<f4", "fortran_order": False, "shape": (rows, dim)}
    np.lib.format.write_array_header_1_0(file, header)


def _find_dim(source: Path) -> int:
    """Numbers a line: what most of the first lines have after a word without spaces."""
    with source.open(encoding="utf-8", errors="replace") as lines:
        filled = (line.rstrip() for line in lines if line.strip())
        fields = Counter(line.count(" ") for line in islice(filled, LINES_THAT_TELL))
    dim = fields.most_common(1)[0][0] if fields else 0
    if not dim:
        raise ValueError(
            f"{source}: expected lines of a word and numbers between spaces, in GloVe's text "
            "format, and found none. Check the file, or fetch it again"
        )
    return dim


def _read_blocks(source: Path, dim: int) -> Iterator[Block]:
    """The file in blocks, in order."""
    first_line = 1
    # Threads suffice: numpy does most of the work, and lets others work meanwhile.
    with source.open("rb") as file, ThreadPoolExecutor(THREADS) as pool:
        texts = _texts(file)
        waiting = deque(pool.submit(read_block, text, dim) for text in islice(texts, THREADS + 1))
        while waiting:
            try:
                block = waiting.popleft().result()
            except MalformedLine as error:
                raise ValueError(
                    f"{source}, line {first_line + error.number}: expected a word and {dim} finite "
                    f"numbers between spaces (GloVe's text format; {dim} as in most of the first "
                    f"lines), found {error.found}. If the file has a first line with its size, as "
                    "those of word2vec and fastText do, delete that line; else fetch the file again"
                ) from None
            waiting.extend(pool.submit(read_block, text, dim) for text in islice(texts, 1))
            first_line += block.num_lines
            yield block


def _texts(file: BinaryIO) -> Iterator[bytes]:
    """The file in pieces of whole lines."""
    while text := file.read(BLOCK):
        text += file.readline()
        yield text if text.endswith(b"\n") else text + b"\n"
