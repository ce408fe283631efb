"""What a text mentions, and how similar that is to the names of categories."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .nouns import NOUN_POS, NounFinder
from .synonyms import Synonyms, words_of_names
from .word_vectors import WordVectors, load_word_vectors

RULES_FILE = Path(__file__).parent / "category_rules.json"

_THINGS = ("NOUN", "PROPN")
_ATTRIBUTES = {"orange", "glass"}  # say what a noun that follows is like: "orange cat"


@dataclass(frozen=True)
class CategoryRules:
    """The choices behind `Category` that were made on data.

    tools/cross_validate_category.py measures alternatives on photos; tools/calibrate_words.py
    fits `slope` and `midpoint`: r = sigmoid(slope * (cosine - midpoint)).
    """

    least: float  # words that are no synonyms count if their cosine with some name is above this
    general: float  # cosine of "animal" with the categories that are kinds of it; of "dog" it is 1
    slope: float
    midpoint: float


RULES = CategoryRules(**json.loads(RULES_FILE.read_text(encoding="utf-8")))
"""The rules in use."""


class MentionFinder:
    """Finds the words of texts that name things.

    "hot dog" is one mention, and not a dog. Synonyms of categories count anywhere if the tagger
    sees a noun, and "baseball player bat" has two; of other compounds only the head counts. Neither
    the group in "a group of zebras" nor the baby in "a baby zebra" is a person.
    """

    def __init__(self, nouns: NounFinder, synonyms: Synonyms):
        self.nouns = nouns
        self.synonyms = synonyms
        self._person, self._animals = map(set, map(synonyms.classes_of, ("person", "animal")))

    def __call__(self, texts: Iterable[str]) -> list[list[str]]:
        """For each text its mentions in lower case, in order."""
        return [self._mentions(tagged) for tagged in self.nouns.tagged(texts)]

    def _mentions(self, tagged: Sequence[tuple[str, str]]) -> list[str]:
        words = [word for word, _ in tagged]
        mentions, covered = [], set()
        found = self.synonyms.find(words)
        before, after = {m.end: m.classes for m in found}, {m.start: m.classes for m in found}
        for start, end, classes in found:
            covered.update(range(start, end))
            is_group = self.synonyms.is_collective(words[end - 1])
            if is_group and (words[end : end + 1] == ["of"] or before.get(start)):
                continue
            if set(classes) == self._person and set(after.get(end) or (-1,)) <= self._animals:
                continue
            is_noun = end - start > 1 or tagged[start][1] in NOUN_POS
            is_noun = is_noun or self._is_said_outright(tagged, start)
            is_attribute = words[start] in _ATTRIBUTES and _noun_follows(tagged, end)
            if classes and is_noun and not is_attribute:
                mentions.append((start, " ".join(words[start:end])))
        for i, (word, pos) in enumerate(tagged):
            if i not in covered and pos in _THINGS and not _noun_follows(tagged, i + 1):
                mentions.append((i, word))
        return [mention for _, mention in sorted(mentions)]

    def _is_said_outright(self, tagged: Sequence[tuple[str, str]], position: int) -> bool:
        """Whether a synonym counts though it is tagged as no noun: taggers take "sink" for a verb
        and "orange" for an adjective. But "they train dogs" has no train."""
        word, pos = tagged[position]
        before, after = (
            tagged[i][1] if 0 <= i < len(tagged) else "" for i in (position - 1, position + 1)
        )
        if word in _ATTRIBUTES and (before != "DET" or after in ("ADJ", "CCONJ")):
            return False
        has_object = pos == "VERB" and after in ("DET", "PRON", *_THINGS)
        is_name = self.synonyms.is_name(word) and pos != "AUX" and not has_object
        return is_name or self.synonyms.is_never(word, pos)


def _noun_follows(tagged: Sequence[tuple[str, str]], end: int) -> bool:
    return end < len(tagged) and tagged[end][1] in _THINGS


class CategoryMatcher:
    """Compares what a text mentions with every word of the category names (paper, Sec. 3.3).

    Args:
        category_names: C names; "dining table" and "dining_table" have two words each.
        mentions: from texts to the mentions of each, for example `NounFinder.nouns`.
        vectors: of words.
        synonyms: a mention that is a synonym of some categories has cosine 1 with these and 0 with
            all others; other mentions are compared with the last word of each name only. None
            compares all mentions with all words by their vectors.
        least: mentions compared by vectors without a cosine above this are ignored.
        general: the cosine in place of 1 of mentions such as "animal".

    Raises:
        ValueError: a name has no words.
    """

    def __init__(
        self,
        category_names: Sequence[str],
        mentions: Callable[[Sequence[str]], list[list[str]]],
        vectors: WordVectors,
        synonyms: Synonyms | None = None,
        least: float = -math.inf,
        general: float = 1.0,
    ):
        self.category_names = list(category_names)
        self.mentions = mentions
        self.vectors = vectors
        self.synonyms = synonyms
        self.least = least
        self.general = general
        name_words = words_of_names(category_names)
        if synonyms is not None:
            name_words = [words[-1:] for words in name_words]
        self._words = [word for words in name_words for word in words]
        self._starts = np.cumsum([0] + [len(words) for words in name_words])[:-1]

    def cosines(self, texts: Sequence[str]) -> list[np.ndarray]:
        """For each text float32 [L, C]: the best cosine of each of its L mentions with the words
        of each name."""
        return [cosines for _, cosines in self.compare(texts)]

    def best_cosines(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [T, C]: the best cosine of any mention with each name; -1 without a mention."""
        best = [cosines.max(axis=0, initial=-1.0) for cosines in self.cosines(texts)]
        return np.array(best, dtype=np.float32).reshape(len(texts), len(self.category_names))

    def compare(self, texts: Sequence[str]) -> list[tuple[list[str], np.ndarray]]:
        """For each text its L mentions and their cosines, float32 [L, C]."""
        mentions_of_texts = self.mentions(texts)
        distinct = list(dict.fromkeys(m for mentions in mentions_of_texts for m in mentions))
        table, similar = self._compare(distinct)
        row_of = {mention: row for row, mention in enumerate(distinct) if similar[row]}
        kept = [[m for m in mentions if m in row_of] for mentions in mentions_of_texts]
        return [(mentions, table[[row_of[m] for m in mentions]]) for mentions in kept]

    def _compare(self, mentions: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """float32 [M, C] for M distinct mentions, and which of these count, bool [M]."""
        table = np.zeros((len(mentions), len(self.category_names)), dtype=np.float32)
        by_vectors = []
        for row, mention in enumerate(mentions):
            classes = () if self.synonyms is None else self.synonyms.classes_of(mention)
            if classes:
                is_general = self.synonyms.is_general(mention)
                table[row, list(classes)] = self.general if is_general else 1.0
            else:
                by_vectors.append(row)
        if by_vectors and self._words:
            cosines = self.vectors.similarity([mentions[row] for row in by_vectors], self._words)
            table[by_vectors] = np.maximum.reduceat(cosines, self._starts, axis=1)
        similar = np.ones(len(mentions), dtype=bool)
        similar[by_vectors] = table[by_vectors].max(axis=1, initial=-1.0) > self.least
        return table, similar


def category_matcher(
    category_names: Sequence[str], pipeline: str = "", word_vectors: str = ""
) -> CategoryMatcher:
    """The matcher of `Category`: mentions, synonyms and word vectors together.

    For `pipeline` see `NounFinder`, for `word_vectors` see `load_word_vectors`.
    """
    synonyms = Synonyms(category_names)
    mentions = MentionFinder(NounFinder(pipeline), synonyms)
    vectors = load_word_vectors(word_vectors)
    return CategoryMatcher(category_names, mentions, vectors, synonyms, RULES.least, RULES.general)
