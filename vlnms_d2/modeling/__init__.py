"""The query-conditioned model: heads, candidates, relatedness and the postprocessor."""

from .cached_rcnn import CachedRCNN
from .candidates import Candidates, select_candidates
from .masks import SharedMasks
from .postprocessing import POSTPROCESSOR_REGISTRY, VLNMSPostprocessor, split_by_query
from .queries import use_queries
from .relatedness import RELATEDNESS_REGISTRY
from .roi_heads import VLNMSCascadeHead, VLNMSHead, VLNMSRes5Head
from .text import TEXT_ENCODER_REGISTRY
