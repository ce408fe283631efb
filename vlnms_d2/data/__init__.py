"""Data sets in Detectron2's standard format, the mapper and the loaders.

Importing it registers the public data sets by name (`builtin`).
"""

from .builtin import register_all, register_flickr30k_entities, register_karpathy, register_refer
from .datasets.refshapes import register_refshapes
from .loaders import build_train_loader
from .mapper import GroundingMapper
