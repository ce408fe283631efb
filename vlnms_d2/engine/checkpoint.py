"""Weights: read without running code, and checked before anything is answered with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from torch import nn

from ..data.datasets.refer import PlainUnpickler, load_plain_pickle
from ..file_io import atomic_write


class ArrayUnpickler(PlainUnpickler):
    """Also makes NumPy arrays, of which the `.pkl` files of Detectron2's model zoo consist."""

    encodings = ("latin1",)
    allowed = frozenset(
        (module, name)
        for module, names in {
            "numpy": ("dtype", "ndarray"),
            "collections": ("OrderedDict",),
            "_codecs": ("encode",),
            **{f"numpy.{core}.numeric": ("_frombuffer",) for core in ("core", "_core")},
            **{f"numpy.{c}.multiarray": ("_reconstruct", "scalar") for c in ("core", "_core")},
        }.items()
        for name in names
    )


class SafeCheckpointer(DetectionCheckpointer):
    """`DetectionCheckpointer` that runs no code of the files that it reads, and writes to a
    temporary file and renames it, so that no interruption leaves an incomplete checkpoint.

    It gives the model an attribute `detector_weights`: the name of the file that its detector first
    came from, which checkpoints of the trainer keep.

    Attributes:
        incompatible: missing keys and wrong shapes of the last weights that were loaded.
    """

    incompatible: Any = None

    def _load_file(self, filename: str) -> dict[str, Any]:
        if not filename.endswith(".pkl"):
            if filename.endswith(".pyth"):
                self._torch_load(filename)  # Detectron2 reads it again, as it likes
            loaded = super()._load_file(filename)
        else:
            loaded = load_plain_pickle(filename, ArrayUnpickler)
            if isinstance(loaded, dict) and not {"model", "__author__"} <= loaded.keys():
                # As in Detectron2: of Detectron or Caffe2.
                blobs = loaded.get("blobs", loaded)
                blobs = {k: v for k, v in blobs.items() if not k.endswith("_momentum")}
                loaded = {"model": blobs, "__author__": "Caffe2", "matching_heuristics": True}
        if not isinstance(loaded, dict) or not isinstance(loaded.get("model"), dict):
            raise ValueError(f"{filename}: expected weights, a dictionary of tensors or arrays")
        self.model.detector_weights = loaded.get("detector_weights") or Path(filename).name
        return loaded

    def _torch_load(self, f: str) -> Any:
        return torch.load(f, map_location="cpu", weights_only=True)

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        self.incompatible = super()._load_model(checkpoint)
        return self.incompatible

    def save(self, name: str, **kwargs) -> None:
        """Save the model, all checkpointables and `kwargs` to `{save_dir}/{name}.pth`."""
        if not self.save_dir or not self.save_to_disk:
            return
        content = {"model": self.model.state_dict(), **kwargs}
        content["detector_weights"] = getattr(self.model, "detector_weights", "")
        content.update({key: obj.state_dict() for key, obj in self.checkpointables.items()})
        path = Path(self.save_dir) / f"{name}.pth"
        self.logger.info("Saving checkpoint to %s", path)
        with atomic_write(path) as file:
            torch.save(content, file)
        self.tag_last_checkpoint(path.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Record the name of the last checkpoint for `resume_or_load`, atomically too."""
        with atomic_write(Path(self.save_dir) / "last_checkpoint") as file:
            file.write(last_filename_basename.encode())


def load_weights(cfg: CfgNode, model: nn.Module) -> None:
    """Load `MODEL.WEIGHTS` and, unless `MODEL.VLNMS.CHECK_WEIGHTS` is False, check them.

    Raises:
        ValueError: the file is damaged or asks to run code; or weights that the model answers with
            are not in it, have other shapes, or are not finite.
    """
    path = cfg.MODEL.WEIGHTS
    checkpointer = SafeCheckpointer(model)
    try:
        checkpointer.load(path)
    except (OSError, ValueError):
        raise
    except Exception as error:  # torch raises all kinds of errors for damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path}: not weights that can be read without running code ({reason}). Fetch or make "
            "the file again."
        ) from error
    if cfg.MODEL.VLNMS.CHECK_WEIGHTS:
        _check(path, model, checkpointer.incompatible)


def _check(path: str, model: nn.Module, incompatible: Any) -> None:
    needed = [key for key, _ in model.named_parameters()]
    needed += [key for key, _ in model.named_buffers() if "running_" in key]
    absent = set(needed if incompatible is None else incompatible.missing_keys)
    missing = [key for key in needed if key in absent]
    if wrong := getattr(incompatible, "incorrect_shapes", []):
        key, found, expected = wrong[0]
        problem = (
            f"{key} has the shape {list(found)}, the config's model {list(expected)} (as have "
            f"{len(wrong) - 1} others). Use the config that the weights were trained with"
        )
    elif missing:
        problem = (
            f"lacks {len(missing)} of the weights that the model answers with, as {missing[0]}. "
            "Give the weights of a whole model"
        )
        if all(".vlnms." in key for key in missing):
            problem += "; these are a detector's: train the relatedness branch (tools/train_net.py)"
    else:
        values = ((k, v) for k, v in model.state_dict().items() if v.is_floating_point())
        key = next((key for key, value in values if not value.isfinite().all()), None)
        if key is None:
            return
        problem = f"{key} has values that are NaN or infinite. Give weights of finite numbers"
    raise ValueError(
        f"{path or 'MODEL.WEIGHTS, which is empty,'}: {problem}. MODEL.VLNMS.CHECK_WEIGHTS False "
        "uses them nevertheless."
    )
