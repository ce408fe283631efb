#!/usr/bin/env python
"""The demonstration in a browser: type queries, and see what they keep beside the detector alone.

    python tools/web_demo.py
    python tools/web_demo.py --config-file my_config.yaml --opts MODEL.WEIGHTS my.pth

Without --config-file, VL-NMS FC and Trans answer, as trained on RefShapes. The page is served to
this machine alone, at http://127.0.0.1:7860; with --host 0.0.0.0 to the network as well. Nothing
is sent anywhere, and uploads are deleted after an hour.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))  # if other code runs this file

from demo import setup
from import_option import add_import_option

CONFIGS = Path(__file__).parents[1] / "configs" / "refshapes"
DEFAULT_CONFIGS = [CONFIGS / f"vlnms_{name}_trained.yaml" for name in ("fc", "trans")]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config-file", type=Path, metavar="FILE", help="default: the committed FC and Trans")
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="default: %(default)s")
    add("--port", type=int, default=7860, metavar="PORT", help="default: %(default)s")
    rest = argparse.REMAINDER
    add("--opts", nargs=rest, default=[], metavar="KEY VALUE", help="to change the config; last")
    add_import_option(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if find_spec("gradio") is None:
        parser.error(
            "the web demo needs gradio: pip install 'vlnms_d2[web]', or pip install gradio"
        )
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    # It warns about how Detectron2 asks whether it is being traced.
    logging.getLogger("torch.fx").setLevel(logging.ERROR)

    from web_app.page import build_page, launch
    from web_app.scenes import Models

    files = DEFAULT_CONFIGS if args.config_file is None else [args.config_file]
    try:
        models = Models([setup(file, args.opts) for file in files])
        launch(build_page(models), args.host, args.port)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    from interrupts import exit_with

    exit_with(main)
