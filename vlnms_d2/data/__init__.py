"""Data sets in Detectron2's standard format, the mapper and the loaders."""

from .builtin import register_refshapes
from .dataset_mapper import GroundingMapper
from .loaders import build_grounding_test_loader, build_train_loader

__all__ = [
    "GroundingMapper",
    "build_grounding_test_loader",
    "build_train_loader",
    "register_refshapes",
]
