"""What a text speaks of: its nouns, those that name a category taken together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .kinds import Kinds
from .nouns import NOUN_POS, NounFinder
from .rules import RULES, CategoryRules

_THINGS = ("NOUN", "PROPN")
_COLOURS = {"orange"}
"""Categories that before another noun are its colour."""


class MentionFinder:
    """Finds the words of texts that stand for things.

    "hot dog" is one mention, and no dog. Of a compound whose words are no kinds of a category only
    the head counts; of kinds the rules say.

    Args:
        nouns: tags the words.
        kinds: of the categories.
        rules: `heads_only` and `nouns_only` are of these.
    """

    def __init__(self, nouns: NounFinder, kinds: Kinds, rules: CategoryRules = RULES):
        self.nouns = nouns
        self.kinds = kinds
        self.rules = rules

    def __call__(self, texts: Iterable[str]) -> list[list[str]]:
        """Per text its mentions in lower case, in order."""
        return [self._mentions(tagged) for tagged in self.nouns.tagged(texts)]

    def _mentions(self, tagged: Sequence[tuple[str, str]]) -> list[str]:
        words = [word for word, _ in tagged]
        mentions, covered = [], set()
        for start, end, _ in self.kinds.find(words):
            covered.update(range(start, end))
            is_noun = end - start > 1 or tagged[start][1] in NOUN_POS or not self.rules.nouns_only
            left_out = self.rules.heads_only or words[start] in _COLOURS
            if is_noun and not (left_out and _before_noun(tagged, end)):
                mentions.append((start, " ".join(words[start:end])))
        for i, (word, pos) in enumerate(tagged):
            if i not in covered and pos in _THINGS and not _before_noun(tagged, i + 1):
                mentions.append((i, word))
        return [mention for _, mention in sorted(mentions)]


def _before_noun(tagged: Sequence[tuple[str, str]], end: int) -> bool:
    """Whether a noun follows the words before `end`."""
    return end < len(tagged) and tagged[end][1] in _THINGS
