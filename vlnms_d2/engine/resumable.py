"""A folder in which a long run leaves what is done, so that it can go on after a kill."""

from __future__ import annotations

import fcntl
import hashlib
import json
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..file_io import write_json

MANIFEST = "manifest.json"
WORK = ".work"
_READ = 1 << 20


class OutputFolder:
    """The output of one run: finished files and a manifest, or a folder of unfinished work.

    Args:
        out: made if it is not there.
        identity: all that the output depends on, as JSON has it. What was begun with another one
            is not gone on with.

    Attributes:
        work: folder for unfinished work.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any]):
        self.out = out
        self.work = out / WORK
        self.identity = json.loads(json.dumps(identity))
        self._published: list[str] = []

    @contextmanager
    def begin(self, overwrite: bool = False) -> Iterator[dict[str, Any] | None]:
        """Yields the manifest of a finished run of this identity, else None with `work` ready.

        Raises:
            ValueError: the folder is of another identity and `overwrite` is not set, or another
                process is at work in it.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        with (self.work / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ValueError(
                    f"{self.out}: another process is at work in this folder. Wait for it, or give "
                    "another one."
                ) from error
            manifest = self._read(self.out / MANIFEST)
            begun = self._read(self.work / "identity.json")
            old = manifest.get("identity") if manifest else begun
            if old is not None and old != self.identity:
                if not overwrite:
                    raise ValueError(
                        f"{self.out}: holds a run of other input or settings "
                        f"({_difference(old, self.identity)}). Give another folder, or "
                        "--overwrite."
                    )
                self._clear(manifest or {})
                manifest = None
            if manifest is None:
                write_json(self.work / "identity.json", self.identity)
            yield manifest
        # Only after a run that ended well: an exception leaves the work to go on with.
        shutil.rmtree(self.work, ignore_errors=True)

    def discard(self) -> None:
        """Remove the unfinished work: of input that is no good there is nothing to go on with."""
        shutil.rmtree(self.work, ignore_errors=True)
        if not any(self.out.iterdir()):
            self.out.rmdir()

    def publish(self, name: str) -> None:
        """Move a finished file or folder from `work` to its place, replacing what is there."""
        target = self.out / name
        if target.is_dir():
            shutil.rmtree(target)
        (self.work / name).replace(target)
        self._published.append(name)

    def finish(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Write the manifest, with which the run is finished.

        Returns:
            The manifest with "identity" and, as "published", the names of the other files.
        """
        own = {"identity": self.identity, "published": list(self._published)}
        whole = json.loads(json.dumps({**manifest, **own}, sort_keys=True))
        write_json(self.work / MANIFEST, whole)
        self.publish(MANIFEST)
        return whole

    @staticmethod
    def _read(path: Path) -> dict[str, Any] | None:
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(
                f"{path}: not valid JSON ({error}). Remove it, or give another folder."
            ) from error
        return content if isinstance(content, dict) else None

    def _clear(self, manifest: Mapping[str, Any]) -> None:
        """Remove the work and the output of another run, and nothing else."""
        for path in self.work.iterdir():
            if path.name != "lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in [*manifest.get("published", []), MANIFEST]:
            path = self.out / Path(name).name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def sha256_of(path: Path, pattern: str = "*.txt") -> str:
    """Of a file's content; of a folder that of the names and contents of its files of a pattern."""
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(file for file in path.rglob(pattern) if file.is_file()):
            digest.update(f"{file.relative_to(path)}\0{sha256_of(file)}\n".encode())
        return digest.hexdigest()
    with path.open("rb") as file:
        while chunk := file.read(_READ):
            digest.update(chunk)
    return digest.hexdigest()


def identity_of_files(files: Mapping[str, Path]) -> dict[str, dict[str, str]]:
    """Name and sha256 of files, by their role, for an identity."""
    return {role: {"name": path.name, "sha256": sha256_of(path)} for role, path in files.items()}


def versions() -> dict[str, str]:
    """Of the program and of what computes for it, for an identity."""
    from .. import __version__

    found = {"vlnms_d2": __version__, "python": platform.python_version()}
    return found | {"numpy": np.__version__, "torch": torch.__version__}


def _difference(old: Any, new: Any, name: str = "") -> str:
    """The first thing that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *old]:
            if old.get(key) != new.get(key):
                return _difference(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
    return f"{name} is {old!r} there, {new!r} now"
