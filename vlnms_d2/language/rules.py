"""What of Category was chosen on data: a handful of numbers, in a file of its own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).parent / "category_rules.json"


@dataclass(frozen=True)
class CategoryRules:
    """What counts as a mention of a category, and how much.

    tools/cross_validate_category.py measures other choices on photos; the curve's two numbers are
    those of tools/calibrate_words.py.

    Attributes:
        heads_only: of a compound only its head counts; else kinds of categories count wherever
            they stand, and "baseball player bat" has two.
        nouns_only: a word that is a kind counts only where the tagger sees a noun.
        least: of words that are no kind of a category, those count whose cosine with a name is
            higher.
        slope, midpoint: r = sigmoid(slope * (cosine - midpoint)).
    """

    heads_only: bool
    nouns_only: bool
    least: float
    slope: float
    midpoint: float


RULES = CategoryRules(**json.loads(FILE.read_text(encoding="utf-8")))
"""Those that are used."""
