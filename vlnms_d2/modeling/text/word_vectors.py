"""Word vectors from a text file in the format of GloVe."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np

from ...language.glove_line import parse_vector, split_line


def read_word_vectors(path: str | Path, words: Collection[str], dim: int) -> dict[str, np.ndarray]:
    """Vectors of `words` from a text file with one `word v1 ... vd` a line.

    Lines are parsed from the right, since a few "words" of GloVe 840B hold spaces.

    Args:
        path: the file, for example `glove.840B.300d.txt` from https://nlp.stanford.edu/projects/glove/.
        words: the words wanted; all others are passed over.
        dim: numbers a line.

    Returns:
        word -> float32 [dim]; words that the file lacks are missing.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a wanted line does not hold `dim` numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no word vectors at {path} (MODEL.VLNMS.WORD_VECTORS): expected GloVe's text format, "
            "for example glove.840B.300d.txt from https://nlp.stanford.edu/projects/glove/"
        )
    wanted = set(words)
    vectors: dict[str, np.ndarray] = {}
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            # The word ends at the first space unless it holds spaces itself.
            if line.split(" ", 1)[0].rstrip() not in wanted:
                continue
            word, values = split_line(line, dim)
            if word not in wanted or word in vectors:
                continue
            vector = parse_vector(values, dim)
            if vector is None:
                raise ValueError(
                    f"{path}, line {number}: expected {word!r} and {dim} finite numbers "
                    f"(MODEL.VLNMS.BIGRU.EMBED_DIM), found {len(values)} fields after the word"
                )
            vectors[word] = vector
    return vectors
