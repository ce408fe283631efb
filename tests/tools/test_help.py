"""Tools parse their arguments before they import anything heavy, and end in one line; the command
line of train_net.py is that of Detectron2's own."""

import argparse
import logging
import signal
import subprocess
import sys

import pytest
from conftest import REPO
from detectron2.engine import default_argument_parser

import train_net

TOOLS = [
    "benchmark",
    "calibrate_words",
    "cross_validate_category",
    "export_weights",
    "extract_second_stage",
    "make_refshapes",
    "make_refshapes_captions",
    "prepare_data",
    "recall_table",
    "run_ablations",
    "score_pairs",
    "second_stage_masks",
    "second_stage_table",
    "train_net",
    "train_second_stage",
    "train_tagger",
]
COMMAND_LINES = [
    [],
    ["--config-file", "a.yaml", "--resume"],
    ["--config-file", "a.yaml", "--eval-only", "MODEL.WEIGHTS", "b.pth", "--not-an-option", "1"],
    ["--num-gpus", "2", "--num-machines", "3", "--machine-rank", "1", "--dist-url", "auto"],
]
HEAVY = {"cv2", "detectron2", "matplotlib", "numpy", "pandas", "spacy", "torch", "transformers"}


@pytest.mark.parametrize("tool", TOOLS)
def test_help_imports_nothing_heavy(tool):
    command = [sys.executable, "-X", "importtime", str(REPO / "tools" / f"{tool}.py"), "--help"]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert process.stdout.startswith(f"usage: {tool}.py")
    imported = {line.rpartition("|")[2].strip() for line in process.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {*HEAVY, "vlnms_d2"}


INTERRUPTED = """
import os, runpy, signal, sys
class Finder:  # Ctrl-C while the tool imports what it needs
    def find_spec(self, name, path=None, target=None):
        if name in {heavy!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
sys.path.insert(0, {folder!r})
sys.argv = [{path!r}, *{arguments!r}]
runpy.run_path({path!r}, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("demo", ""),
        ("export_proposals", "--config-file a --dataset b --out c"),
        ("export_pairs", "--config-file a --dataset b --out c"),
        ("export_weights", "setup.py b"),
        ("score_pairs", "--pairs a --sim b:c --out d"),
        ("rerank", "--detections a --annotations b --queries c --out d"),
        ("train_net", ""),
        ("recall_table", "a.json"),
        ("benchmark", "nms"),
    ],
)
def test_ctrl_c_is_one_line_and_status_130(tool, arguments):
    path = str(REPO / "tools" / f"{tool}.py")
    code = INTERRUPTED.format(
        heavy=HEAVY, folder=str(REPO / "tools"), path=path, arguments=arguments.split()
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.returncode == 130, process.stderr
    assert process.stderr.strip() == f"{tool}: interrupted"


@pytest.mark.parametrize("words", COMMAND_LINES, ids=" ".join)
def test_a_command_line_means_what_it_means_to_detectron2(words):
    assert train_net.parse_args(words) == default_argument_parser().parse_args(words)


def test_errors_in_training_are_logged_without_traceback(monkeypatch, caplog):
    logger = logging.getLogger("test_train_net")
    logger.addFilter(train_net.without_traceback)
    try:
        raise ValueError("damaged image")
    except ValueError:
        logger.exception("Exception during training:")
    assert "Exception during training" in caplog.text and "Traceback" not in caplog.text
    monkeypatch.setenv("VLNMS_TRACEBACK", "1")
    logger.error("again", exc_info=ValueError("damaged image"))
    assert "damaged image" in caplog.text


def test_the_options_are_those_of_detectron2_and_import(monkeypatch):
    parsers = []
    monkeypatch.setattr(
        argparse.ArgumentParser, "parse_args", lambda parser, argv: parsers.append(parser)
    )
    train_net.parse_args([])
    ours, theirs = (
        [
            (type(a), a.option_strings, a.dest, a.nargs, a.const, a.default, a.type, a.choices)
            for a in parser._actions
        ]
        for parser in (*parsers, default_argument_parser())
    )
    # Of our own is --import, which changes no argument.
    assert [option for option in ours if "--import" not in option[1]] == theirs
