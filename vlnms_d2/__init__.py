"""VL-NMS for Detectron2: query-aware proposals from any Mask R-CNN.

Importing this package registers every component (ROI heads, text encoders, relatedness modules,
the postprocessor and the data sets).
"""

import importlib.util

__version__ = "0.1.0"

if importlib.util.find_spec("detectron2") is None:
    raise ImportError(
        "vlnms_d2 is a Detectron2 plugin and Detectron2 is not installed: run "
        "`python tools/install_detectron2.py` in a checkout of vlnms_d2, or build your own from "
        "https://github.com/facebookresearch/detectron2."
    )

from . import data
from .config import add_vlnms_config
from .engine.predictor import VLNMSPredictor
from .modeling import (
    POSTPROCESSOR_REGISTRY,
    RELATEDNESS_REGISTRY,
    TEXT_ENCODER_REGISTRY,
    VLNMSCascadeHead,
    VLNMSHead,
    VLNMSPostprocessor,
    VLNMSRes5Head,
    split_by_query,
    use_queries,
)
from .rerank import rerank

__all__ = [
    "POSTPROCESSOR_REGISTRY",
    "RELATEDNESS_REGISTRY",
    "TEXT_ENCODER_REGISTRY",
    "VLNMSCascadeHead",
    "VLNMSHead",
    "VLNMSPostprocessor",
    "VLNMSPredictor",
    "VLNMSRes5Head",
    "add_vlnms_config",
    "data",
    "rerank",
    "split_by_query",
    "use_queries",
]
