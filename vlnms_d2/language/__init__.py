"""Finds nouns in texts and compares them with category names. Independent of Detectron2."""

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
