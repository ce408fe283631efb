"""VL-NMS for Detectron2: query-aware proposals from any Mask R-CNN.

Importing this package registers every component (ROI heads, text encoders, relatedness modules,
the postprocessor and the data sets).
"""

import importlib.util
import os
import sys

__version__ = "0.1.0"

if importlib.util.find_spec("detectron2") is None:
    raise ImportError(
        "vlnms_d2 is a Detectron2 plugin and Detectron2 is not installed: run "
        "`python tools/install_detectron2.py` in a checkout of vlnms_d2, or build your own from "
        "https://github.com/facebookresearch/detectron2."
    )

from . import data, model_zoo
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
    "import_modules",
    "model_zoo",
    "rerank",
    "split_by_query",
    "use_queries",
]


def import_modules() -> None:
    """Import the modules and .py files that `$VLNMS_D2_IMPORT` lists, separated as in `$PATH`.

    They register data sets and components of your own. Importing vlnms_d2 imports them, also in
    the processes that train or export; `--import` of the tools sets the variable.

    Raises:
        ImportError: there is no such module, or another one has the name of a file.
    """
    for entry in filter(None, os.environ.get("VLNMS_D2_IMPORT", "").split(os.pathsep)):
        folder, name = os.path.split(entry)
        sys.path.append(folder or os.getcwd())
        module = importlib.import_module(name.removesuffix(".py"))
        if folder and not os.path.samefile(entry, module.__file__ or os.devnull):
            raise ImportError(
                f"{entry}: {module.__file__} has the same name; give your file another one"
            )


import_modules()
