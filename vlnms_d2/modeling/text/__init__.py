"""Text encoders: from query strings to word features."""

from .bert import BERT
from .bigru import BiGRU, Vocabulary, tokenize
from .build import (
    TEXT_ENCODER_REGISTRY,
    TextEncoder,
    TextFeatures,
    build_text_encoder,
    text_encoder_class,
)
