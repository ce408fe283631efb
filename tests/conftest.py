"""What all tests share. It imports little: the process that hands out tests reads it too."""

from __future__ import annotations

import gc
import multiprocessing.forkserver
import os
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# The same examples on every machine, and as much time for each as a busy one takes.
settings.register_profile(
    "any machine", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")

REPO = Path(__file__).resolve().parents[1]

HEADS = {
    "VLNMSHead": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml",
    "VLNMSRes5Head": "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_3x.yaml",
    "VLNMSCascadeHead": "Misc/cascade_mask_rcnn_R_50_FPN_3x.yaml",
}

# These take longest. They come first, so that the processes of `make test` end at the same time.
SLOW_FILES = {
    "test_bad_input.py",
    "test_benchmark.py",
    "test_configs_run.py",
    "test_cuda.py",
    "test_docs.py",
    "test_import_option.py",
    "test_run_ablations.py",
    "test_trainer.py",
    "test_web_demo.py",
}


# What imports make stays: to look for garbage among it takes a third of their time.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items) -> None:
    items.sort(key=lambda item: item.path.name not in SLOW_FILES)


def find_chromium() -> str | None:
    """The browser that shows the web demo to its tests; None if there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


def pytest_terminal_summary(terminalreporter) -> None:
    if find_chromium() is None:
        terminalreporter.write_line("No Chromium: the web demo was not tested in a browser.")
    for report in terminalreporter.getreports("passed"):
        for name, measured in report.user_properties:
            terminalreporter.write_line(f"{name}: {measured}")


@pytest.fixture(scope="session", autouse=True)
def server_of_processes() -> None:
    """What the processes of tests need is imported once for all of them."""
    packages = ["vlnms_d2.engine.trainer", "vlnms_d2.evaluation", "vlnms_d2.export.model"]
    multiprocessing.set_forkserver_preload(packages)
    multiprocessing.forkserver.ensure_running()


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Random numbers do not depend on the tests that ran before."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def vocabulary_file(tmp_path_factory) -> str:
    from small_models import WORDS

    from vlnms_d2.modeling.text import Vocabulary

    path = tmp_path_factory.mktemp("vocabulary") / "vocab.json"
    Vocabulary(WORDS).save(path)
    return str(path)


@pytest.fixture
def config(vocabulary_file):
    """`config(head, relatedness)`: a `small_config` with a vocabulary."""
    from small_models import small_config

    def make(head: str = "VLNMSHead", relatedness: str = "FC"):
        return small_config(head, relatedness, vocabulary_file)

    return make


@pytest.fixture(params=list(HEADS))
def head(request) -> str:
    return request.param


@pytest.fixture
def model(config, head):
    from small_models import build

    return build(config(head))


@pytest.fixture(scope="session")
def tiny_refshapes(tmp_path_factory) -> str:
    """A RefShapes of a few images, registered; returns the first part of its names.

    `$TINY_REFSHAPES` is its folder, for processes that a test starts.
    """
    import make_refshapes
    from vlnms_d2.data import register_refshapes

    root = tmp_path_factory.mktemp("datasets") / "refshapes"
    counts = ["--train", "5", "--val", "2", "--testA", "1", "--testB", "2", "--workers", "1"]
    assert make_refshapes.main(["--out", str(root), "--seed", "7", *counts]) == 0
    register_refshapes(root, name="tiny")
    os.environ["TINY_REFSHAPES"] = str(root)
    return "tiny"
