"""The pages of the documentation link to what exists, the tutorial runs from top to bottom, and the
commands of docs/paper_tables.md are commands of the tools and name what there is.

tests/test_configs_run.py runs its training commands.
"""

import re
from functools import cache

import nbformat
import pytest
from conftest import REPO
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from documented import commands
from nbclient import NotebookClient

import benchmark
import export_pairs
import export_proposals
import prepare_data
import train_net
from vlnms_d2.config import load_config

DOCS = REPO / "docs"
TUTORIAL = DOCS / "tutorial.ipynb"
FOLDERS = (".", "configs", "datasets", "docs", "projects/*")
PAGES = [*sorted(page for folder in FOLDERS for page in REPO.glob(f"{folder}/*.md")), TUTORIAL]
SIZES, SMALL = "= 40, 12, 40", "= 2, 1, 2"  # images to train on, to evaluate on, iterations


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing


def test_the_index_has_every_page():
    index = (DOCS / "README.md").read_text()
    pages = {path.name for path in PAGES if path.parent == DOCS} - {"README.md"}
    assert {name for name in pages if f"]({name})" not in index} == set()


def test_every_cell_of_the_tutorial_runs(tmp_path, monkeypatch):
    for name in ("TMPDIR", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    notebook = nbformat.read(TUTORIAL, 4)
    [sizes] = [cell for cell in notebook.cells if SIZES in cell.source]
    sizes.source = sizes.source.replace(SIZES, SMALL)
    resources = {"metadata": {"path": str(DOCS)}}
    NotebookClient(notebook, timeout=None, kernel_name="python3", resources=resources).execute()


def test_the_tutorial_is_committed_as_it_runs():
    assert TUTORIAL.stat().st_size < 400_000
    cells = [cell for cell in nbformat.read(TUTORIAL, 4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert sum("image/jpeg" in output.get("data", {}) for output in outputs) >= 3


# --- the tables of the paper -----------------------------------------------------------------

PAPER_TABLES = DOCS / "paper_tables.md"
COMMANDS = commands(PAPER_TABLES)
PARSERS = {
    "tools/train_net.py": train_net.parse_args,
    "tools/export_proposals.py": export_proposals.parse_args,
    "tools/export_pairs.py": export_pairs.parse_args,
    "tools/prepare_data.py": lambda words: prepare_data.make_parser().parse_args(words),
    "tools/benchmark.py": lambda words: benchmark.build_parser().parse_args(words),
}


@cache
def config_of(*words: str) -> CfgNode:
    """The config of a training command."""
    args = train_net.parse_args(words)
    return load_config(args.config_file, args.opts)


@pytest.fixture
def root_of_the_repository(monkeypatch):
    monkeypatch.chdir(REPO)


def test_every_table_has_its_section():
    titles = [
        line for line in PAPER_TABLES.read_text().splitlines() if line.startswith("## Table ")
    ]
    assert [title[9] for title in titles] == list("123456789")


@pytest.mark.usefixtures("root_of_the_repository")
def test_every_command_is_one_of_the_tools():
    assert len(COMMANDS) > 30
    for tool, *words in COMMANDS:
        assert (REPO / tool).is_file()
        if tool != "tools/recall_table.py":  # takes the files that trainings write
            args = PARSERS[tool](words)
            names = getattr(args, "datasets", None) or getattr(args, "dataset", [])
            names = [names] if isinstance(names, str) else names
            assert set(names) <= set(DatasetCatalog.list())


@pytest.mark.usefixtures("root_of_the_repository")
def test_no_training_writes_to_the_folder_of_another_and_exports_read_one_of_them():
    folders = [config_of(*w).OUTPUT_DIR for tool, *w in COMMANDS if tool == "tools/train_net.py"]
    assert len(folders) == len(set(folders)) > 20
    exported = 0
    for tool, *words in COMMANDS:
        if tool.startswith("tools/export_"):
            args = PARSERS[tool](words)
            run = str(args.config_file).removesuffix("/config.yaml")
            assert run in folders
            assert args.opts[:2] == ["MODEL.WEIGHTS", f"{run}/model_final.pth"]
            # The rest must be keys of a config.
            load_config(REPO / "configs" / "refcoco" / "vlnms_fc.yaml", args.opts)
            exported += 1
    assert exported == 3 + 3 + 2 + 1 + 3


@pytest.mark.usefixtures("root_of_the_repository")
def test_data_sets_that_are_trained_on_are_prepared_before():
    prepared = set()
    for tool, *words in COMMANDS:
        if tool == "tools/prepare_data.py":
            prepared |= set(PARSERS[tool](words).datasets)
        elif tool == "tools/train_net.py":
            names = set(config_of(*words).DATASETS.TRAIN)
            assert names <= prepared or all(n.startswith("flickr30k_entities_") for n in names)
