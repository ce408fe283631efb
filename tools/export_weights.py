#!/usr/bin/env python
"""Keep of a checkpoint what is needed to run the model: the weights, in half precision.

    python tools/export_weights.py output/refshapes/vlnms_fc/model_final.pth models/vlnms_fc.pth
    python tools/export_weights.py --detector-only models/vlnms_fc.pth output/detector.pth

The result loads like any checkpoint (the stock DetectionCheckpointer copies the values into the
model's own float32 parameters) and takes a sixth of the space: no optimizer state, half the bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from vlnms_d2.file_io import atomic_write


def to_half(value: Tensor) -> Tensor:
    """Floating-point values as float16, all others as they are.

    Raises:
        ValueError: a finite value is too large for float16.
    """
    if not value.is_floating_point():
        return value.clone()
    half = value.half()
    if not torch.equal(half.isfinite(), value.isfinite()):
        raise ValueError("a weight is beyond 65504, the largest number of half precision")
    return half


def export(checkpoint: Path, destination: Path, detector_only: bool = False) -> int:
    """Write the weights of `checkpoint` to `destination`; returns the number of bytes written.

    Args:
        detector_only: leave out the weights of the relatedness branch.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: the file holds no weights, or weights that half precision cannot hold.
    """
    if not checkpoint.is_file():
        raise FileNotFoundError(f"no checkpoint {checkpoint}; tools/train_net.py writes them")
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if "model" not in content:
        raise ValueError(f'{checkpoint} has no entry "model"; expected a checkpoint of Detectron2')
    weights = {
        name: to_half(value)
        for name, value in content["model"].items()
        if not (detector_only and ".vlnms." in name)
    }
    destination.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(destination) as file:
        torch.save({"model": weights}, file)
    return destination.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="a .pth file of tools/train_net.py")
    parser.add_argument("destination", type=Path, help="the file to write")
    parser.add_argument(
        "--detector-only", action="store_true", help="leave out the relatedness branch"
    )
    args = parser.parse_args()
    size = export(args.checkpoint, args.destination, args.detector_only)
    print(f"{args.destination}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
