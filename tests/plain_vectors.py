"""What the language parts are tested on: word vectors from a table, and all words as nouns."""

import numpy as np

from vlnms_d2.language.word_vectors import WordVectors


class TableVectors(WordVectors):
    """Unit vectors in the plane, at angles in degrees; words that the table lacks are unknown."""

    name, dim = "table", 2

    def __init__(self, angles: dict[str, float]):
        self.angles = angles

    def _look_up(self, words: list[str]) -> np.ndarray:
        vectors = np.zeros((len(words), 2), dtype=np.float32)
        for row, word in zip(vectors, words, strict=True):
            if word in self.angles:
                angle = np.deg2rad(self.angles[word])
                row[:] = np.cos(angle), np.sin(angle)
        return vectors


def all_words(texts) -> list[list[str]]:
    """Every word of each text, as if all were nouns."""
    return [text.split() for text in texts]
