"""The pages of the documentation link to what exists, and the tutorial runs from top to bottom."""

import re

import nbformat
import pytest
from conftest import REPO
from nbclient import NotebookClient

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
