"""tools/install_detectron2.py on a tiny carrier wheel made here; nothing is downloaded."""

import base64
import csv
import dataclasses
import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "install_detectron2.py"


def load_script():
    spec = importlib.util.spec_from_file_location("install_detectron2", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


tool = load_script()

CARRIER_FILES = {
    "LabGym/__init__.py": "raise RuntimeError('the carrier itself is never installed')\n",
    "LabGym/gui.py": "import LabGym.detectron2\n",
    "LabGym/detectron2/__init__.py": '__version__ = "0.6"\n',
    "LabGym/detectron2/layers.py": (
        "import LabGym.detectron2.config\n"
        "from LabGym.detectron2.config import NAME\n"
        'TARGET = {"_target_": "LabGym.detectron2.config.NAME"}\n'
    ),
    "LabGym/detectron2/config/__init__.py": 'NAME = "caf\u00e9"\n',
    "LabGym/detectron2/model_zoo/configs/Base.yaml": "VERSION: 2\n",
    "labgym-3.1.2.dist-info/METADATA": "Name: LabGym\n",
}


def carrier(folder, **changes):
    """Write a carrier wheel and return it with the Source that pins its hash."""
    path = folder / "labgym-3.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in (CARRIER_FILES | changes).items():
            archive.writestr(name, text)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return path, dataclasses.replace(tool.SOURCE, sha256=sha256)


def built_wheel(folder, **changes):
    path, source = carrier(folder, **changes)
    out = folder / "built"
    out.mkdir()
    return tool.make_wheel(path, out, source)


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name) for name in archive.namelist()}


def dist_info(wheel, name):
    return contents(wheel)[f"detectron2-0.6+labgym.3.1.2.dist-info/{name}"]


def test_only_detectron2_is_taken_and_every_mention_is_renamed(tmp_path):
    files = contents(built_wheel(tmp_path))
    package = {name: data for name, data in files.items() if ".dist-info/" not in name}
    assert set(package) == {
        "detectron2/__init__.py",
        "detectron2/layers.py",
        "detectron2/config/__init__.py",
        "detectron2/model_zoo/configs/Base.yaml",
    }
    assert package["detectron2/layers.py"].decode() == (
        "import detectron2.config\n"
        "from detectron2.config import NAME\n"
        'TARGET = {"_target_": "detectron2.config.NAME"}\n'
    )
    assert package["detectron2/config/__init__.py"].decode() == 'NAME = "caf\u00e9"\n'
    assert not any(b"LabGym" in data for data in package.values())


def test_a_name_left_over_is_refused(tmp_path):
    with pytest.raises(tool.InstallError, match=r"still named in detectron2/odd\.py"):
        built_wheel(tmp_path, **{"LabGym/detectron2/odd.py": "import LabGym as detectron2\n"})


def test_metadata_says_what_the_package_is(tmp_path):
    text = dist_info(built_wheel(tmp_path), "METADATA").decode()
    message = Parser().parsestr(text)
    assert message["Name"] == "detectron2"
    assert message["Version"] == "0.6+labgym.3.1.2"
    assert message["License"] == "Apache-2.0"
    assert "labgym 3.1.2" in message["Summary"]
    assert "detectron2._C" in message["Summary"]
    required = message.get_all("Requires-Dist")
    assert "setuptools<81" in required
    assert "omegaconf>=2.1,<2.4" in required
    assert "build Detectron2 from source" in message.get_payload()


def test_license_is_kept_with_detectron2s_copyright_line(tmp_path):
    text = dist_info(built_wheel(tmp_path), "licenses/LICENSE").decode()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert "Copyright 2019, Facebook, Inc" in text
    assert "[yyyy]" not in text


def test_another_license_in_the_checkout_is_refused():
    with pytest.raises(tool.InstallError, match=r"not the Apache License"):
        tool.license_text("MIT License")


def test_record_lists_every_file_with_its_hash_and_size(tmp_path):
    files = contents(built_wheel(tmp_path))
    record_name = "detectron2-0.6+labgym.3.1.2.dist-info/RECORD"
    rows = {row[0]: row[1:] for row in csv.reader(files[record_name].decode().splitlines())}
    assert set(rows) == set(files)
    assert rows.pop(record_name) == ["", ""]
    for name, (digest, size) in rows.items():
        expected = base64.urlsafe_b64encode(hashlib.sha256(files[name]).digest())
        assert digest == "sha256=" + expected.decode().rstrip("=")
        assert int(size) == len(files[name])


def test_the_same_carrier_gives_the_same_wheel(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    assert built_wheel(first).read_bytes() == built_wheel(second).read_bytes()


def test_pip_installs_shows_and_finds_the_wheel(tmp_path):
    wheel = built_wheel(tmp_path)
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install"]
    subprocess.run(
        [*command, "--no-index", "--no-deps", "--quiet", "--target", str(target), str(wheel)],
        check=True,
    )
    code = (
        "import importlib.metadata as m, detectron2, detectron2.layers as layers; "
        "print(m.version('detectron2'), detectron2.__file__, layers.NAME == 'caf\\u00e9')"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(target)!r}); {code}"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [
        "0.6+labgym.3.1.2",
        str(target / "detectron2" / "__init__.py"),
        "True",
    ]
    assert (target / "detectron2" / "model_zoo" / "configs" / "Base.yaml").exists()


def test_a_wheel_with_another_hash_is_refused_and_nothing_is_written(tmp_path):
    path, _ = carrier(tmp_path)
    out = tmp_path / "built"
    out.mkdir()
    with pytest.raises(tool.InstallError, match=r"is not the file(.|\n)*expected sha256"):
        tool.make_wheel(path, out)  # the real pin
    assert list(out.iterdir()) == []


def test_a_missing_wheel_is_named(tmp_path):
    with pytest.raises(tool.InstallError, match=r"Cannot read the wheel .*none\.whl"):
        tool.make_wheel(tmp_path / "none.whl", tmp_path)


def test_a_file_that_is_no_wheel_is_refused(tmp_path):
    path = tmp_path / "labgym-3.1.2-py3-none-any.whl"
    path.write_bytes(b"not a zip")
    with pytest.raises(tool.InstallError, match=r"cannot be read as a wheel"):
        tool.read_tree(path)


def test_a_carrier_without_detectron2_is_refused(tmp_path):
    path = tmp_path / "labgym-3.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("LabGym/__init__.py", "")
    with pytest.raises(tool.InstallError, match=r"holds no LabGym/detectron2/__init__\.py"):
        tool.read_tree(path)


def test_a_name_that_leaves_the_package_is_refused(tmp_path):
    with pytest.raises(tool.InstallError, match=r"unsafe name"):
        built_wheel(tmp_path, **{"LabGym/detectron2/../../evil.py": ""})


def test_a_file_that_does_not_compile_is_named(tmp_path):
    with pytest.raises(tool.InstallError, match=r"detectron2/bad\.py does not compile"):
        built_wheel(tmp_path, **{"LabGym/detectron2/bad.py": "def :\n"})


def no_pip(*_):
    raise AssertionError("pip was called")


@pytest.fixture
def import_path(tmp_path, monkeypatch):
    """A folder that is all there is on the import path."""
    monkeypatch.delitem(sys.modules, "detectron2", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    importlib.invalidate_caches()
    return tmp_path


def fake_package(folder, version):
    (folder / "detectron2").mkdir()
    (folder / "detectron2" / "__init__.py").write_text(f'__version__ = "{version}"\n')


def test_an_installed_detectron2_is_left_alone(import_path, monkeypatch, capsys):
    fake_package(import_path, "0.6")
    info = import_path / "detectron2-0.7.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: detectron2\nVersion: 0.7\n")
    monkeypatch.setattr(tool, "run_pip", no_pip)
    monkeypatch.setattr(tool.subprocess, "run", no_pip)
    assert tool.main([]) == 0
    assert "Detectron2 0.7 is already installed" in capsys.readouterr().out


def test_a_checkout_on_the_path_is_left_alone(import_path, monkeypatch, capsys):
    fake_package(import_path, "0.6.dev1")
    monkeypatch.setattr(tool, "run_pip", no_pip)
    monkeypatch.setattr(tool, "import_error", lambda: None)
    assert tool.main([]) == 0
    assert "Detectron2 0.6.dev1 is already installed" in capsys.readouterr().out


def test_what_a_cut_off_installation_left_is_reported(import_path, monkeypatch, capsys):
    fake_package(import_path, "0.6")
    monkeypatch.setattr(tool, "run_pip", no_pip)
    monkeypatch.setattr(tool, "import_error", lambda: "ModuleNotFoundError: detectron2.config")
    assert tool.main([]) == 1
    error = capsys.readouterr().err
    assert f"{import_path / 'detectron2'} that pip knows nothing of" in error
    assert "delete that folder" in error


def test_a_bare_folder_called_detectron2_does_not_count(import_path):
    (import_path / "detectron2").mkdir()
    assert tool.installed_version() is None


def test_a_failed_download_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(tool, "installed_version", lambda: None)
    failed = subprocess.CompletedProcess([], 1, stdout="ERROR: No matching distribution found\n")
    monkeypatch.setattr(tool.subprocess, "run", lambda *_, **__: failed)
    assert tool.main([]) == 1
    error = capsys.readouterr().err
    assert "Could not download labgym==3.1.2" in error
    assert "https://github.com/facebookresearch/detectron2" in error
    assert "No matching distribution found" in error


def test_install_builds_installs_with_the_constraints_and_checks(tmp_path, monkeypatch):
    path, source = carrier(tmp_path)
    make_wheel = tool.make_wheel
    calls = []
    monkeypatch.setattr(tool, "installed_version", lambda: None)
    monkeypatch.setattr(tool, "make_wheel", lambda wheel, out: make_wheel(wheel, out, source))
    monkeypatch.setattr(tool, "run_pip", lambda arguments, failure: calls.append(arguments))
    monkeypatch.setattr(tool, "import_error", lambda: None)
    said = tool.install(constraints=Path("constraints.txt"), wheel=path)
    assert "0.6+labgym.3.1.2" in said
    (arguments,) = calls
    assert arguments[0] == "install"
    assert Path(arguments[2]).name == "detectron2-0.6+labgym.3.1.2-py3-none-any.whl"
    assert arguments[-2:] == ["--constraint", "constraints.txt"]
    assert not Path(arguments[2]).exists()  # the temporary folder is gone


def test_a_package_that_does_not_import_is_uninstalled_again(monkeypatch):
    calls = []
    monkeypatch.setattr(tool, "run_pip", lambda arguments, failure: calls.append(arguments))
    monkeypatch.setattr(tool, "import_error", lambda: "ImportError: no torch")
    with pytest.raises(tool.InstallError, match=r"uninstalled again(.|\n)*no torch"):
        tool.check_import()
    assert calls == [["uninstall", "--yes", "detectron2"]]
