#!/usr/bin/env python3
"""Install Detectron2 into the running Python, unless it is already there.

Detectron2 has no release on the Python package index.  A build that is already
installed (your own, from source) is always used as it is.  Otherwise this script fetches
one pinned wheel that carries Detectron2's Python sources, takes only those out of it,
renames their imports back to ``detectron2`` and installs the result as an ordinary
package, so that ``pip show detectron2`` and ``pip uninstall detectron2`` work.

What that copy lacks: the compiled extension ``detectron2._C`` (deformable convolution,
rotated boxes, the fast COCO evaluation).  Build Detectron2 from source for those.

Usage::

    python tools/install_detectron2.py [--constraints constraints.txt] [--wheel FILE]
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import importlib.metadata
import importlib.util
import io
import re
import subprocess
import sys
import tempfile
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

REPO_ROOT = Path(__file__).resolve().parent.parent
UPSTREAM_URL = "https://github.com/facebookresearch/detectron2"
BUILD_YOUR_OWN = f"To build Detectron2 yourself instead, see {UPSTREAM_URL}."


@dataclass(frozen=True)
class Source:
    """The pinned wheel that carries Detectron2's Python files."""

    project: str = "labgym"
    version: str = "3.1.2"
    sha256: str = "a2900cff8a3fb508e1975f19b5f9abd9f261966db87b0c332697fb4138c1cb2b"
    # Detectron2's folder inside that wheel, and the name its imports were changed to.
    folder: str = "LabGym/detectron2/"
    module: str = "LabGym.detectron2"
    # The wheel declares an older Python than the Detectron2 files in it need.
    download_python: str = "3.10"


SOURCE = Source()
DETECTRON2_VERSION = "0.6"
COPYRIGHT_LINE = "Copyright 2019, Facebook, Inc"

# What Detectron2's own setup.py asks for, with what its modules import besides
# (torch, torchvision, numpy; pkg_resources, which setuptools dropped in version 81).
REQUIREMENTS = (
    "torch>=1.8",
    "torchvision",
    "numpy",
    "Pillow>=7.1",
    "matplotlib",
    "pycocotools>=2.0.2",
    "termcolor>=1.1",
    "yacs>=0.1.8",
    "tabulate",
    "cloudpickle",
    "tqdm>4.29.0",
    "tensorboard",
    "fvcore>=0.1.5,<0.1.6",
    "iopath>=0.1.7,<0.1.11",
    "omegaconf>=2.1,<2.4",
    "hydra-core>=1.1",
    "black",
    "packaging",
    "scipy>1.5.1",
    "setuptools<81",
)

# Run in a fresh interpreter once the package is in place.
SMOKE_TEST = (
    "from detectron2 import model_zoo; import detectron2.modeling, detectron2.engine; "
    "model_zoo.get_config_file('COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml')"
)


class InstallError(Exception):
    """Something went wrong; the message says what failed and what to do about it."""


def installed_version() -> str | None:
    """Return the version of the Detectron2 that Python would import, or None without one."""
    try:
        spec = importlib.util.find_spec("detectron2")
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None:  # a bare folder called detectron2 has no origin
        return None
    try:
        return importlib.metadata.version("detectron2")
    except importlib.metadata.PackageNotFoundError:
        return version_of_source(Path(spec.origin))


def version_of_source(init_file: Path) -> str:
    """Return the version of a Detectron2 that is on the path without being installed.

    That is a checkout on PYTHONPATH, or what an installation leaves that was killed while
    its files were copied; only the first one imports.
    """
    error = import_error()
    if error is not None:
        raise InstallError(
            f"There is a Detectron2 in {init_file.parent} that pip knows nothing of and that "
            "does not import. If an installation was cut off there, delete that folder and run "
            f"this again.\n{error}"
        )
    text = init_file.read_text(encoding="utf-8", errors="replace")
    match = re.search(r"^__version__\s*=\s*[\"']([^\"']+)", text, re.MULTILINE)
    return match.group(1) if match else "of unknown version"


def import_error() -> str | None:
    """Import Detectron2 in a fresh interpreter; return the end of its error, if any."""
    done = subprocess.run(
        [sys.executable, "-c", SMOKE_TEST],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPO_ROOT,
    )
    return "\n".join(done.stdout.strip().splitlines()[-4:]) if done.returncode else None


def run_pip(arguments: list[str], failure: str) -> None:
    """Run pip of the running Python; raise InstallError with ``failure`` if it fails."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        tail = "\n".join(done.stdout.strip().splitlines()[-8:])
        raise InstallError(f"{failure}\npip said:\n{tail}")


def download_wheel(folder: Path, source: Source = SOURCE) -> Path:
    """Download the pinned wheel into ``folder`` with pip and return its path."""
    pinned = f"{source.project}=={source.version}"
    run_pip(
        [
            "download",
            pinned,
            "--no-deps",
            "--no-cache-dir",
            "--only-binary=:all:",
            f"--python-version={source.download_python}",
            f"--dest={folder}",
        ],
        f"Could not download {pinned}, the wheel that carries Detectron2's Python files. "
        "Check that pip reaches a package index, then run this again; or pass a copy of "
        f"that wheel with --wheel. {BUILD_YOUR_OWN}",
    )
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise InstallError(f"pip downloaded {len(wheels)} wheels for {pinned}, expected one.")
    return wheels[0]


def check_hash(wheel: Path, expected: str) -> None:
    """Raise InstallError unless the SHA-256 of ``wheel`` is ``expected``."""
    try:
        actual = hashlib.sha256(wheel.read_bytes()).hexdigest()
    except OSError as error:
        raise InstallError(f"Cannot read the wheel {wheel}: {error.strerror}.") from error
    if actual != expected:
        raise InstallError(
            f"{wheel.name} is not the file this script was written for, so nothing was "
            f"installed.\n  expected sha256 {expected}\n  found sha256    {actual}\n"
            f"Delete it and run this again. {BUILD_YOUR_OWN}"
        )


def read_tree(wheel: Path, source: Source = SOURCE) -> dict[str, bytes]:
    """Return Detectron2's files of ``wheel`` as ``detectron2/...`` names and contents."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if n.startswith(source.folder)]
            files = {n: archive.read(n) for n in names if not n.endswith("/")}
    except (OSError, zipfile.BadZipFile) as error:
        raise InstallError(f"{wheel.name} cannot be read as a wheel: {error}.") from error
    tree = {f"detectron2/{name[len(source.folder) :]}": data for name, data in files.items()}
    unsafe = [name for name in tree if ".." in PurePosixPath(name).parts or "\\" in name]
    if unsafe:
        raise InstallError(f"{wheel.name} holds a file with an unsafe name: {unsafe[0]!r}.")
    if "detectron2/__init__.py" not in tree:
        raise InstallError(f"{wheel.name} holds no {source.folder}__init__.py.")
    return tree


def rename_imports(tree: dict[str, bytes], source: Source = SOURCE) -> dict[str, bytes]:
    """Return ``tree`` with the carrier's module name turned back into ``detectron2``.

    Every mention counts, also those in strings (``_target_`` of a lazy config, the package
    whose data files the model zoo reads), so a name left over is an error.
    """
    old = source.module.encode()
    carrier = source.module.split(".")[0].encode()
    renamed = {name: data.replace(old, b"detectron2") for name, data in tree.items()}
    left_over = sorted(name for name, data in renamed.items() if carrier in data)
    if left_over:
        raise InstallError(
            f"{carrier.decode()} is still named in {', '.join(left_over)} after renaming, so "
            f"nothing was installed. {BUILD_YOUR_OWN}"
        )
    return renamed


def check_compiles(tree: dict[str, bytes]) -> None:
    """Raise InstallError if a Python file of ``tree`` does not compile on this Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escape sequences, reported as warnings
        for name, data in tree.items():
            if name.endswith(".py"):
                try:
                    compile(data, name, "exec", dont_inherit=True)
                except (SyntaxError, ValueError) as error:
                    raise InstallError(
                        f"{name} does not compile on Python {sys.version.split()[0]}: {error}."
                    ) from error


def license_text(apache_license: str) -> str:
    """Return the Apache License's terms followed by Detectron2's copyright line."""
    end = "END OF TERMS AND CONDITIONS"
    if end not in apache_license:
        raise InstallError("The LICENSE file of this checkout is not the Apache License 2.0.")
    terms = apache_license[: apache_license.index(end)] + end
    return (
        f"{terms}\n\n{COPYRIGHT_LINE}\n\n"
        f"This copy of Detectron2 ({UPSTREAM_URL}) is licensed under the Apache License,\n"
        "Version 2.0, the terms of which are above.\n"
    )


def package_version(source: Source = SOURCE) -> str:
    """Return Detectron2's version with a local tag naming the wheel it came from."""
    return f"{DETECTRON2_VERSION}+{source.project}.{source.version}"


def metadata_text(source: Source = SOURCE) -> str:
    """Return the METADATA file of the package that is built."""
    headers = [
        "Metadata-Version: 2.1",
        "Name: detectron2",
        f"Version: {package_version(source)}",
        f"Summary: Python files of Detectron2 {DETECTRON2_VERSION}, taken from the wheel "
        f"{source.project} {source.version}; without the compiled extension detectron2._C",
        f"Home-page: {UPSTREAM_URL}",
        "Author: FAIR",
        "License: Apache-2.0",
        "License-File: LICENSE",
        "Requires-Python: >=3.9",
        *(f"Requires-Dist: {requirement}" for requirement in REQUIREMENTS),
    ]
    description = (
        f"The Python files of Detectron2 {DETECTRON2_VERSION} ({UPSTREAM_URL}, Apache-2.0), as\n"
        f"carried under {source.folder} by the wheel {source.project} {source.version}.  Changed\n"
        f"here: the module name {source.module} is detectron2 again.  Nothing else of that\n"
        "wheel is in this package.\n\n"
        "It lacks the compiled extension detectron2._C: no deformable convolution, no rotated\n"
        "boxes, and COCO evaluation runs on pycocotools.  For those, uninstall this package\n"
        "and build Detectron2 from source.\n"
    )
    return "\n".join(headers) + "\n\n" + description


def record_line(name: str, data: bytes) -> tuple[str, str, str]:
    """Return the RECORD row (path, hash, size) of one file."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return name, f"sha256={digest}", str(len(data))


def build_wheel(
    tree: dict[str, bytes], folder: Path, license_file: str, source: Source = SOURCE
) -> Path:
    """Write ``tree`` as an installable ``detectron2`` wheel in ``folder``."""
    version = package_version(source)
    info = f"detectron2-{version}.dist-info"
    files = dict(sorted(tree.items()))
    files[f"{info}/METADATA"] = metadata_text(source).encode()
    files[f"{info}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: install_detectron2\n"
        b"Root-Is-Purelib: true\nTag: py3-none-any\n"
    )
    files[f"{info}/top_level.txt"] = b"detectron2\n"
    files[f"{info}/licenses/LICENSE"] = license_file.encode()

    record = io.StringIO()
    rows = csv.writer(record, lineterminator="\n")
    rows.writerows(record_line(name, data) for name, data in files.items())
    rows.writerow((f"{info}/RECORD", "", ""))
    files[f"{info}/RECORD"] = record.getvalue().encode()

    path = folder / f"detectron2-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name)  # a fixed date: the same input gives the same wheel
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED)
    return path


def make_wheel(wheel: Path, folder: Path, source: Source = SOURCE) -> Path:
    """Turn the pinned carrier wheel into a ``detectron2`` wheel in ``folder``."""
    check_hash(wheel, source.sha256)
    tree = rename_imports(read_tree(wheel, source), source)
    check_compiles(tree)
    apache = (REPO_ROOT / "LICENSE").read_text(encoding="utf-8")
    return build_wheel(tree, folder, license_text(apache), source)


def pip_install(wheel: Path, constraints: Path | None) -> None:
    """Install ``wheel`` and what it requires into the running Python."""
    arguments = ["install", "--no-cache-dir", str(wheel)]
    if constraints is not None:
        arguments += ["--constraint", str(constraints)]
    run_pip(arguments, f"pip could not install {wheel.name}. {BUILD_YOUR_OWN}")


def check_import() -> None:
    """Import the new package; uninstall it again if that fails."""
    error = import_error()
    if error is not None:
        run_pip(["uninstall", "--yes", "detectron2"], "pip could not uninstall detectron2.")
        raise InstallError(
            "Detectron2 was installed but does not import, so it was uninstalled again; it was "
            f"tested with the versions in constraints.txt. {BUILD_YOUR_OWN}\n{error}"
        )


def install(constraints: Path | None = None, wheel: Path | None = None) -> str:
    """Make sure that Detectron2 is installed; return a sentence that says what was done."""
    found = installed_version()
    if found is not None:
        return f"Detectron2 {found} is already installed; using it as it is."
    with tempfile.TemporaryDirectory(prefix="install_detectron2_") as temporary:
        folder = Path(temporary)
        carrier = wheel if wheel is not None else download_wheel(folder)
        built = folder / "built"
        built.mkdir()
        pip_install(make_wheel(carrier, built), constraints)
    check_import()
    return f"Installed Detectron2 {package_version()} (without its compiled extension _C)."


def main(argv: list[str] | None = None) -> int:
    """Command line entry point."""
    parser = argparse.ArgumentParser(
        description="Install Detectron2 into this Python unless it is already there."
    )
    parser.add_argument("--constraints", type=Path, help="constraints file for pip")
    parser.add_argument("--wheel", type=Path, help="a downloaded copy of the pinned wheel")
    options = parser.parse_args(argv)
    try:
        print(install(options.constraints, options.wheel))
    except InstallError as error:
        print(f"install_detectron2: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("install_detectron2: interrupted; run it again to finish.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
