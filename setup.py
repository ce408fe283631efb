"""Packaging of vlnms_d2."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent


def read_version() -> str:
    """Return ``__version__`` of the package without importing it (and torch with it)."""
    text = (HERE / "vlnms_d2" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r"^__version__\s*=\s*[\"']([^\"']+)[\"']", text, re.MULTILINE)
    if match is None:
        raise RuntimeError("vlnms_d2/__init__.py has no __version__ line")
    return match.group(1)


def read_description() -> str:
    """Return the README, or nothing where there is none."""
    readme = HERE / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


class BuildWithZoo(build_py):
    """Copies configs and weights into the package, where vlnms_d2.model_zoo finds them; an
    editable installation has those of the checkout."""

    def run(self):
        """Build the package."""
        super().run()
        if not self.editable_mode:
            for name in ("configs", "models"):
                target = Path(self.build_lib, "vlnms_d2", name)
                shutil.copytree(HERE / name, target, dirs_exist_ok=True)


setup(
    name="vlnms_d2",
    version=read_version(),
    description="VL-NMS as a Detectron2 plugin: proposals that know the query",
    long_description=read_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["vlnms_d2", "vlnms_d2.*"]),
    package_data={"": ["*.json"], "vlnms_d2.language": ["en_ud_pos/**", "*.txt"]},
    cmdclass={"build_py": BuildWithZoo},
    python_requires=">=3.10",
    # Detectron2 itself has no release on the package index: tools/install_detectron2.py
    # installs it, or you build your own.
    install_requires=[
        "torch",
        "torchvision",
        "numpy",
        "opencv-python-headless",
        "pycocotools",
        "fvcore",
        "iopath",
        "yacs",
        "tabulate",
        "tqdm",
        "ijson",
    ],
    extras_require={
        # The weights of its default model come from a second package, installed without its
        # dependencies: see docs/installing.md. spaCy finds the nouns for `Category`.
        "bert": ["transformers", "spacy"],
        # With GloVe's vectors in place of MiniLM; pyarrow reads them.
        "nlp": ["spacy", "pyarrow"],
        "web": ["gradio"],
        "dev": [
            *("pytest", "pytest-xdist", "hypothesis", "ruff", "mypy"),
            *("playwright", "nbclient", "ipykernel"),  # for tests of the web demo and the tutorial
        ],
    },
)
