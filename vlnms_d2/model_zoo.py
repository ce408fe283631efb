"""The configs and weights that come with the plugin, as `detectron2.model_zoo` has Detectron2's.

Names are paths relative to configs/, such as "refshapes/vlnms_fc_trained.yaml". A RuntimeError says
that there is no such config, or that there are no trained weights for it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from .config import load_config
from .engine.checkpoint import SafeCheckpointer, load_weights

_FC = ("refshapes/vlnms_fc.pth", "refshapes/vocab.json")
_JOINT = ("refshapes/vlnms_trans.pth", "")

# Config -> weights and vocabulary, in models/. MODEL_ZOO.md has the results.
TRAINED = {
    "refshapes/vlnms_fc.yaml": _FC,
    "refshapes/vlnms_fc_trained.yaml": _FC,
    "refshapes/vlnms_trans_joint.yaml": _JOINT,
    "refshapes/vlnms_trans_trained.yaml": _JOINT,
    "refshapes/vlnms_trans_cross_attention.yaml": ("refshapes/vlnms_trans_cross_attention.pth", ""),
    "refshapes/vlnms_category.yaml": (_FC[0], ""),  # its detector
}


def get_config_file(name: str) -> str:
    """Path of a config file."""
    return _find("configs", name)


def get_checkpoint_path(name: str) -> str:
    """Path of the trained weights of a config."""
    if name not in TRAINED:
        known = ", ".join(TRAINED)
        raise RuntimeError(f"no trained weights of {name!r}; there are those of {known}")
    return _find("models", TRAINED[name][0])


def get_config(name: str, trained: bool = False) -> CfgNode:
    """A config; with `trained`, `MODEL.WEIGHTS` and `MODEL.VLNMS.VOCAB` are the trained weights and
    their vocabulary, otherwise those of the file."""
    cfg = load_config(get_config_file(name))
    if trained:
        cfg.MODEL.WEIGHTS = get_checkpoint_path(name)
        vocabulary = TRAINED[name][1]
        cfg.MODEL.VLNMS.VOCAB = vocabulary and _find("models", vocabulary)
    return cfg


def get(name: str, trained: bool = False, device: str | None = None) -> torch.nn.Module:
    """A model in training mode, with the weights of `get_config`.

    Args:
        device: in place of the config's; None on a machine without a GPU stands for "cpu".
    """
    cfg = get_config(name, trained)
    if device is not None or not torch.cuda.is_available():
        cfg.MODEL.DEVICE = device or "cpu"
    model = build_model(cfg)
    if trained:
        load_weights(cfg, model)
    else:  # such as a detector's, without those of the branch
        SafeCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model


def _find(kind: str, name: str) -> str:
    """A file below configs/ or models/, which setup.py copies into an installed package."""
    package = Path(__file__).resolve().parent
    paths = [folder / kind / name for folder in (package, package.parent)]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise RuntimeError(f"no {name!r} in the {kind} of vlnms_d2 ({paths[0]}, {paths[1]})")
    return str(path)
