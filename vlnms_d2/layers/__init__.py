"""Tensor operations of query-aware proposals, in plain PyTorch (no Detectron2 import)."""

from .fusion import FUSION_MODES, fuse_scores
from .nms import multi_query_nms

__all__ = ["FUSION_MODES", "fuse_scores", "multi_query_nms"]
