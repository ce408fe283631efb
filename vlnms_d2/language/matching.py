"""How much the words of a text resemble the names of categories."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from .kinds import Kinds, words_of
from .mentions import MentionFinder
from .nouns import NounFinder
from .rules import RULES
from .word_vectors import WordVectors, load_word_vectors


class CategoryMatcher:
    """Compares what a text speaks of with every word of the category names (SPEC section 6).

    Args:
        category_names: C names; "dining table" and "dining_table" are of two words.
        mentions: from texts to what each of them speaks of, for example `NounFinder.nouns`.
        vectors: of words.
        kinds: mentions that are a kind of some categories have the cosine 1 with these and 0 with
            all others; None to compare all by their vectors.
        least: mentions whose cosine with no name is higher are left out.

    Raises:
        ValueError: a name without words.
    """

    def __init__(
        self,
        category_names: Sequence[str],
        mentions: Callable[[Sequence[str]], list[list[str]]],
        vectors: WordVectors,
        kinds: Kinds | None = None,
        least: float = -math.inf,
    ):
        self.category_names = list(category_names)
        self.mentions = mentions
        self.vectors = vectors
        self.kinds = kinds
        self.least = least
        words = [words_of(name) for name in category_names]
        if not all(words):
            empty = self.category_names[words.index([])]
            raise ValueError(f"the category name {empty!r} has no words; give it a name")
        self._words = [word for own in words for word in own]
        self._starts = np.cumsum([0] + [len(own) for own in words])[:-1]

    def cosines(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Per text float32 [L, C]: of its L mentions, the best cosine with a word of each name."""
        return [cosines for _, cosines in self.compare(texts)]

    def best_cosines(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [T, C]: for each name the best cosine of any mention; -1 where there is none."""
        best = [own.max(axis=0, initial=-1.0) for own in self.cosines(texts)]
        return np.array(best, dtype=np.float32).reshape(len(texts), len(self.category_names))

    def compare(self, texts: Sequence[str]) -> list[tuple[list[str], np.ndarray]]:
        """Per text its L mentions and their cosines, float32 [L, C]."""
        mentioned = self.mentions(texts)
        distinct = dict.fromkeys(mention for own in mentioned for mention in own)
        table = self._compare(list(distinct))
        row_of = {
            mention: i
            for i, mention in enumerate(distinct)
            if table[i].max(initial=-1.0) > self.least
        }
        kept = [[mention for mention in own if mention in row_of] for own in mentioned]
        return [(own, table[[row_of[mention] for mention in own]]) for own in kept]

    def _compare(self, mentions: list[str]) -> np.ndarray:
        table = np.zeros((len(mentions), len(self.category_names)), dtype=np.float32)
        unknown = []
        for i, mention in enumerate(mentions):
            classes = () if self.kinds is None else self.kinds.classes_of(mention)
            if classes:
                table[i, list(classes)] = 1.0
            else:
                unknown.append(i)
        if unknown and self._words:
            cosines = self.vectors.similarity([mentions[i] for i in unknown], self._words)
            table[unknown] = np.maximum.reduceat(cosines, self._starts, axis=1)
        return table


def category_matcher(
    category_names: Sequence[str],
    pipeline: str = "",
    word_vectors: str = "",
) -> CategoryMatcher:
    """The matcher of Category: mentions, kinds and vectors together.

    Args:
        category_names: C names.
        pipeline: see `NounFinder`.
        word_vectors: see `load_word_vectors`.
    """
    kinds = Kinds(category_names)
    mentions = MentionFinder(NounFinder(pipeline), kinds)
    vectors = load_word_vectors(word_vectors)
    return CategoryMatcher(category_names, mentions, vectors, kinds, RULES.least)
