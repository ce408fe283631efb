"""Relatedness modules: how likely does the query mention the box? Plain torch."""

from .base import RELATEDNESS_REGISTRY, Relatedness, RelatednessOutput, build_relatedness
from .fc import FC

__all__ = [
    "FC",
    "RELATEDNESS_REGISTRY",
    "Relatedness",
    "RelatednessOutput",
    "build_relatedness",
]
