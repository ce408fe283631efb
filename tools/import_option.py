"""The option `--import` of the tools. Imports nothing heavy, so that --help is quick."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path


def add_import_option(parser: argparse.ArgumentParser) -> None:
    """Add `--import MODULE`, which may be given several times and leaves no trace in the arguments.

    The modules are imported with vlnms_d2, in this process and in those that it starts; see
    `vlnms_d2.import_modules`.
    """
    parser.add_argument(
        "--import",
        action=_Import,
        dest=argparse.SUPPRESS,
        metavar="MODULE",
        help="module or .py file that registers your own data sets and components; repeatable",
    )


class _Import(argparse.Action):
    def __call__(self, parser, namespace, value, option_string=None) -> None:
        if value.endswith(".py"):
            if not Path(value).is_file():
                parser.error(f"--import {value}: no such file, expected a Python file or a module")
            value = str(Path(value).resolve())
        elif os.sep in value or not _exists(value.partition(".")[0]):
            parser.error(f"--import {value}: no such module; give its name, or the path of a file")
        before = os.environ.get("VLNMS_D2_IMPORT", "").split(os.pathsep)
        names = [*filter(None, before), value]
        os.environ["VLNMS_D2_IMPORT"] = os.pathsep.join(dict.fromkeys(names))
        if "vlnms_d2" in sys.modules:
            sys.modules["vlnms_d2"].import_modules()


def _exists(name: str) -> bool:
    path = Path(name)
    return path.is_dir() or path.with_suffix(".py").is_file() or find_spec(name) is not None
