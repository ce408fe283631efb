"""Words: which are nouns, and how alike they are. Knows nothing of Detectron2."""

from .matching import CategoryMatcher
from .nouns import NounFinder
from .word_vectors import GloveVectors, MiniLMVectors, WordVectors, load_word_vectors

__all__ = [
    "CategoryMatcher",
    "GloveVectors",
    "MiniLMVectors",
    "NounFinder",
    "WordVectors",
    "load_word_vectors",
]
