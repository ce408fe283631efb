"""Data sets in Detectron2's standard format, the mapper and the loaders.

Importing it registers the data sets that the plugin knows by name (`builtin`).
"""

from .builtin import register_all
from .dataset_mapper import GroundingMapper
from .datasets.refshapes import register_refshapes
from .loaders import build_grounding_test_loader, build_train_loader
from .register import register_flickr30k_entities, register_karpathy, register_refer

__all__ = [
    "GroundingMapper",
    "build_grounding_test_loader",
    "build_train_loader",
    "register_all",
    "register_flickr30k_entities",
    "register_karpathy",
    "register_refer",
    "register_refshapes",
]
