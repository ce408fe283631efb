#!/usr/bin/env python
"""Reduce a checkpoint to what is needed to run the model: the weights, in half precision.

    python tools/export_weights.py output/refshapes/vlnms_fc/model_final.pth models/vlnms_fc.pth
    python tools/export_weights.py --detector-only models/vlnms_fc.pth output/detector.pth

The result loads like any checkpoint (the stock DetectionCheckpointer copies the values into the
model's float32 parameters) and is a sixth of the size: no optimizer state, half the bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def to_half(value: Tensor) -> Tensor:
    """Floating-point values as float16, all others unchanged.

    Raises:
        ValueError: a finite value is too large for float16.
    """
    if not value.is_floating_point():
        return value.clone()
    half = value.half()
    if not half.isfinite().equal(value.isfinite()):
        raise ValueError("a weight is beyond 65504, the largest number of half precision")
    return half


def export(checkpoint: Path, destination: Path, detector_only: bool = False) -> int:
    """Write the weights of `checkpoint` to `destination`; returns the number of bytes written.

    Args:
        detector_only: leave out the weights of the relatedness branch.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: the file holds no weights, or weights that half precision cannot hold; or
            another file is where they go.
    """
    import torch

    from vlnms_d2.file_io import atomic_write, claim, refuse_foreign

    if not checkpoint.is_file():
        raise FileNotFoundError(f"no checkpoint {checkpoint}; tools/train_net.py writes them")
    refuse_foreign(destination, inputs=[checkpoint])
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises all kinds of errors for files of another kind
        raise ValueError(
            f"{checkpoint}: no weights that can be read without running code"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError(f'{checkpoint} has no entry "model"; expected a checkpoint of Detectron2')
    weights = {
        name: to_half(value)
        for name, value in content["model"].items()
        if not (detector_only and ".vlnms." in name)
    }
    exported = {"model": weights}
    if content.get("detector_weights"):
        exported["detector_weights"] = content["detector_weights"]
    claim(destination)
    with atomic_write(destination) as file:
        torch.save(exported, file)
    return destination.stat().st_size


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="a .pth file of tools/train_net.py")
    parser.add_argument("destination", type=Path, help="the file to write")
    parser.add_argument(
        "--detector-only", action="store_true", help="leave out the relatedness branch"
    )
    args = parser.parse_args(argv)
    size = export(args.checkpoint, args.destination, args.detector_only)
    print(f"{args.destination}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    from interrupts import exit_with

    exit_with(main)
