"""tools/train_net.py has the command line of Detectron2's own train_net.py."""

import argparse
import logging

import pytest
from detectron2.engine import default_argument_parser

import train_net

COMMAND_LINES = [
    [],
    ["--config-file", "a.yaml", "--resume"],
    ["--config-file", "a.yaml", "--eval-only", "MODEL.WEIGHTS", "b.pth", "--not-an-option", "1"],
    ["--num-gpus", "2", "--num-machines", "3", "--machine-rank", "1", "--dist-url", "auto"],
]


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
