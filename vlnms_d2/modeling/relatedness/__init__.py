"""Relatedness modules: how likely does the query mention the box? Plain torch."""

from .build import (
    RELATEDNESS_REGISTRY,
    Relatedness,
    RelatednessOutput,
    box_locations,
    build_relatedness,
    relatedness_class,
    text_encoder_name,
    visual_encoder_name,
)
from .category import Category, CategoryMentions, category_relatedness
from .fc import FC
from .portable import Portable, PortablePhrases, portable_relatedness
from .trans import Trans
