"""What texts have to do with categories, each distinct text once, kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ..file_io import atomic_write
from ..language.matching import category_matcher
from ..modeling.relatedness import category_relatedness as relatedness_of

TEXTS_PER_FILE = 1024


def category_relatedness(category_names: Sequence[str]) -> Callable[[list[str]], np.ndarray]:
    """From T texts to r of Category, float32 [T, C]; rows of ones name no category."""
    matcher = category_matcher(category_names)
    return lambda texts: relatedness_of(matcher.best_cosines(texts)).numpy()


class TextRows:
    """A table on disk with a row per distinct text.

    Args:
        folder: of the table.
        category_names: C names.
    """

    def __init__(self, folder: Path, category_names: Sequence[str]):
        self.folder = folder
        self.category_names = list(category_names)

    def encode(self, texts: Sequence[str], report: Callable[[int], object]) -> int:
        """Fill in the rows that are not there yet.

        Always in the same portions and in one process: how many processes there are, and where a
        run before was killed, does not change a bit of them.

        Args:
            texts: the distinct ones, in the order of the rows.
            report: takes how many more texts are done.

        Returns:
            How many texts name no category.
        """
        self.folder.mkdir(exist_ok=True)
        encode, num_silent = None, 0
        for start in range(0, len(texts), TEXTS_PER_FILE):
            portion = list(texts[start : start + TEXTS_PER_FILE])
            path = self._file(start // TEXTS_PER_FILE)
            if not path.is_file():
                if encode is None:  # it takes seconds to load
                    encode = category_relatedness(self.category_names)
                rows = np.asarray(encode(portion), dtype=np.float32)
                with atomic_write(path) as file:
                    np.save(file, rows)
            num_silent += int((np.load(path) == 1).all(axis=1).sum())
            report(len(portion))
        return num_silent

    def read(self, rows: Sequence[int]) -> np.ndarray:
        """float32 [len(rows), C]."""
        rows = np.asarray(rows, dtype=np.int64)
        found = np.empty((len(rows), len(self.category_names)), dtype=np.float32)
        files = rows // TEXTS_PER_FILE
        for number in np.unique(files).tolist():
            here = files == number
            # Mapped: of a file of many rows often few are wanted.
            table = np.load(self._file(number), mmap_mode="r")
            found[here] = table[rows[here] % TEXTS_PER_FILE]
        return found

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.npy"
