"""Options of the command line that exports of a model share."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import torch

from .processes import Processes


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which model, which data set, which folder, and on how many processes."""
    add = parser.add_argument
    add("--config-file", type=Path, required=True, metavar="FILE")
    add("--dataset", required=True, metavar="NAME", help="registered, with expressions or captions")
    add("--out", type=Path, required=True, metavar="DIR", help="which all machines see")
    add("--num-gpus", type=int, metavar="G", help="of a machine; default: 1 if there is one")
    add("--processes", type=int, default=1, metavar="P", help="on the CPU; default: %(default)s")
    add("--num-machines", type=int, default=1, metavar="M", help="default: %(default)s")
    add("--machine-rank", type=int, default=0, metavar="R", help="of this one, from 0")
    add("--dist-url", default="auto", metavar="URL", help="tcp://<machine of rank 0>:<port>")
    add("--overwrite", action="store_true", help="replace the output of other settings in DIR")
    rest = argparse.REMAINDER
    add("--opts", nargs=rest, default=[], metavar="KEY VALUE", help="to change the config; last")


def take_processes(args: dict[str, Any]) -> Processes:
    """The processes of the command line, whose options are taken out of `args`.

    Raises:
        ValueError: see `Processes`.
    """
    names = ("num_gpus", "processes", "num_machines", "machine_rank", "dist_url")
    given = {name: args.pop(name) for name in names}
    if given["num_gpus"] is None:
        given["num_gpus"] = int(torch.cuda.is_available() and given["processes"] == 1)
    return Processes(**given)


def quiet_tracing() -> None:
    """Silence a warning of how Detectron2 asks whether it is being traced."""
    logging.getLogger("torch.fx").setLevel(logging.ERROR)
