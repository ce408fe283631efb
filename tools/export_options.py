"""What the command lines of the exports share. Imports nothing heavy, so that --help is quick."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# As in vlnms_d2.export and vlnms_d2.modeling, which take seconds to import.
FORMATS = ("jsonl", "coco", "per-expression", "mattnet", "nmtree", "albef")
FEATURE_FORMATS = ("ddpn", "bottom-up", "scan", "imram")
DDPN_NAMES = ("auto", "coco", "plain")
TSV_COLUMNS = ("bottom-up", "lxmert")
LAYERS = ("detector", "relatedness")


def make_parser(doc: str) -> argparse.ArgumentParser:
    """A parser that shows the first paragraph of a docstring before the options, the rest after."""
    description, _, epilog = doc.partition("\n\n")
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=formatter
    )


def add_cut_options(
    parser: argparse.ArgumentParser, top_n: str = "kept per query", mean: str = ""
) -> None:
    """Add the three ways to say how many proposals a query keeps.

    Args:
        top_n: help for `--top-n`.
        mean: more help for `--mean-proposals`.
    """
    add = parser.add_mutually_exclusive_group().add_argument
    add("--top-n", type=int, metavar="N", help=top_n)
    add("--score-thresh", type=float, metavar="T", help="keep s above it, and the best")
    mean = f"keep s above the threshold that leaves this many per query on average{mean}"
    add("--mean-proposals", type=float, metavar="M", help=mean)


def add_test_split_option(parser: argparse.ArgumentParser) -> None:
    """Add the consent to files that SCAN and IMRAM would test in another protocol."""
    text = "in scan and imram, which compare all captions with the boxes of an image's first one"
    parser.add_argument("--allow-test-split", action="store_true", help=text)


def add_model_options(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Add the model, the data set (or several), the output folder and the processes."""
    add = parser.add_argument
    add("--config-file", type=Path, required=True, metavar="FILE")
    about = "registered, with expressions or captions"
    if several:
        about += "; several go into one output"
    nargs = "+" if several else 1
    add("--dataset", nargs=nargs, required=True, metavar="NAME", dest="datasets", help=about)
    add("--out", type=Path, required=True, metavar="DIR", help="which all machines see")
    add("--num-gpus", type=int, metavar="G", help="per machine; default: 1 if there is one")
    add("--processes", type=int, default=1, metavar="P", help="on the CPU; default: %(default)s")
    add("--num-machines", type=int, default=1, metavar="M", help="default: %(default)s")
    add("--machine-rank", type=int, default=0, metavar="R", help="of this one, from 0")
    add("--dist-url", default="auto", metavar="URL", help="tcp://<machine of rank 0>:<port>")
    add("--skip-bad-images", action="store_true", help="leave out images that cannot be read")
    add("--overwrite", action="store_true", help="replace the output of other settings in DIR")
    rest = argparse.REMAINDER
    add("--opts", nargs=rest, default=[], metavar="KEY VALUE", help="override the config; last")


def take_model_options(args: dict[str, Any]) -> tuple[Any, Any]:
    """Remove the options of the model and of the processes from `args`; returns `ModelSettings`
    and `Processes`.

    Raises:
        ValueError: see `Processes`.
    """
    import logging

    import torch

    from vlnms_d2.export.model import ModelSettings
    from vlnms_d2.export.workers import Processes

    # Detectron2 asks whether it is being traced in a way that recent versions of torch warn about.
    logging.getLogger("torch.fx").setLevel(logging.ERROR)
    names = ("num_gpus", "processes", "num_machines", "machine_rank", "dist_url")
    given = {name: args.pop(name) for name in names}
    if given["num_gpus"] is None:
        given["num_gpus"] = int(torch.cuda.is_available() and given["processes"] == 1)
    opts = tuple(args.pop("opts"))
    dataset, *more = args.pop("datasets")
    config_file, skip = args.pop("config_file"), args.pop("skip_bad_images")
    model = ModelSettings(config_file, dataset, opts, tuple(more), skip)
    return model, Processes(**given)


def show(manifest: Mapping[str, Any], out: Path, table: str = "") -> None:
    """Print what a manifest counts, a table if there is one, and the output files."""
    for key, value in manifest["counts"].items():
        shown = f"{value:.2f}" if isinstance(value, float) else f"{value:,}"
        print(f"{key.replace('_', ' ')}: {shown}")
    if manifest.get("threshold") is not None:
        print(f"threshold: {manifest['threshold']:.6g}")
    if table:
        print(f"\n{table}\n")
    print(", ".join(str(out / name) for name in manifest["published"]))
