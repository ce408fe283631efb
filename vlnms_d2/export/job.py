"""A job over many images: cut into blocks, shared by processes, resumed after interruption, and
published with a manifest.

Each finished block leaves files of its own, its shards, in a hidden folder of the output folder. A
job does the blocks whose shards are missing and merges all shards in the order of the blocks, so
neither interruptions nor the number of processes change a byte of the output.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from ..file_io import explained_full_disk, file_sha256, shown, write_json
from .base import ProposalFormat
from .workers import Processes, Workers

MANIFEST = "manifest.json"
WORK = ".work"
_IDENTITY, _OURS, _PREVIOUS = "identity.json", "ours.json", "previous"
_STAY = ("lock", _OURS, _PREVIOUS)  # in the folder of the work, whichever job it is of
_READ_AHEAD = 128  # images per task on a GPU, enough for the data loader to read ahead


class Block(NamedTuple):
    """Images that are done together: what an interruption loses at most."""

    number: int
    images: Sequence[Any]


@dataclass(frozen=True)
class Shards:
    """The files of all blocks, in a folder."""

    folder: Path
    num_blocks: int

    def path(self, number: int, suffix: str) -> Path:
        """The file of a block; the suffix says what is in it."""
        return self.folder / f"{number:06d}.{suffix}"

    def paths(self, suffix: str) -> Iterator[Path]:
        """The files of all blocks, in order."""
        return (self.path(number, suffix) for number in range(self.num_blocks))

    def missing(self, suffix: str) -> list[int]:
        """The blocks that do not have this file yet."""
        return [n for n in range(self.num_blocks) if not self.path(n, suffix).is_file()]

    def sum_counts(self, suffix: str) -> Counter[str]:
        """The sum of the counts of all blocks; each file is a JSON object of numbers."""
        counts: Counter[str] = Counter()
        for path in self.paths(suffix):
            counts.update(json.loads(path.read_bytes()))
        return counts


class Job(ABC):
    """A job. A subclass says what it depends on (`identity`), what each block needs (`fill`), and
    what is made of the shards (`merge`).

    Args:
        out: the output folder, which all machines can read and write.
        images: in the order of the output.
        block_size: images per block.
        processes: that share the job.

    Attributes:
        work: folder of the unfinished work.
        shards: of the blocks.
        outputs: names of what `merge` publishes; set by a subclass.
        inputs: files and folders that the job reads; set by a subclass.
    """

    outputs: Sequence[str] = ()
    inputs: Sequence[Path] = ()

    def __init__(self, out: Path, images: Sequence[Any], block_size: int, processes: Processes):
        self.images = images
        self.block_size = block_size
        self.processes = processes
        self.output = OutputFolder(out)
        self.work = self.output.work
        self.shards = Shards(self.work / "shards", -(-len(images) // block_size))

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Everything that the output depends on, for JSON."""

    @abstractmethod
    def fill(self) -> None:
        """Write all shards, with `run`; called on every machine."""

    @abstractmethod
    def merge(self) -> dict[str, Any]:
        """Publish the output, made of all shards, and return what the manifest says about it;
        called on the main machine."""

    def finish(self, overwrite: bool = False) -> dict[str, Any]:
        """Do what is missing of the job.

        Args:
            overwrite: replace the output of other input or settings.

        Returns:
            The manifest.

        Raises:
            ValueError: the folder has other output or is in use, or the input is damaged.
            RuntimeError: a process was killed.
        """
        is_main = self.processes.is_main
        with explained_full_disk(self.output.out), self.processes.connected():
            begun: AbstractContextManager[Any] = nullcontext()
            if is_main:
                begun = self.output.begin(self.identity(), overwrite, self.outputs, self.inputs)
            with begun as manifest:
                if not self.processes.from_main(manifest is not None):
                    self.shards.folder.mkdir(exist_ok=True)
                    self.fill()
                    if is_main:
                        self.output.finish(self.merge())
            self.processes.wait()
        return json.loads((self.output.out / MANIFEST).read_bytes())

    def run(self, workers: Workers, method: str, suffix: str, label: str) -> None:
        """Have workers do the blocks that do not have a file of this suffix yet; called on every
        machine. The method takes a list of blocks and writes the file of each; the label is that
        of the progress bar."""
        all_missing = self.shards.missing(suffix) if self.processes.is_main else []
        missing = self.processes.from_main(all_missing)
        missing = missing[self.processes.machine_rank :: self.processes.num_machines]
        step = 1
        if self.processes.device != "cpu":
            share = -(-len(missing) // self.processes.count)
            step = max(1, min(_READ_AHEAD // self.block_size, share))
        parts = (missing[start : start + step] for start in range(0, len(missing), step))
        tasks = (list(map(self._block, part)) for part in parts)
        with tqdm(total=len(missing), desc=label, disable=None) as bar:
            workers.run(method, tasks, lambda blocks: bar.update(len(blocks)))
        self.processes.wait()

    def merge_formats(self, formats: Sequence[ProposalFormat]) -> dict[str, str]:
        """Merge and publish formats; returns the sha256 of each file or folder by its name."""
        digests = {}
        for each in formats:
            each.merge(self.shards.paths(each.name), self.work / each.output)
            digests[each.output] = self.publish(each.output)
        return digests

    def publish(self, name: str) -> str:
        """Move a finished file or folder from the work to the output; returns its sha256."""
        digest = sha256_of(self.work / name, "*")
        self.output.publish(name)
        return digest

    def _block(self, number: int) -> Block:
        start = number * self.block_size
        return Block(number, self.images[start : start + self.block_size])


class OutputFolder:
    """The output of one job: finished files with a manifest, or unfinished work.

    Only files that an earlier job wrote into the folder are replaced or removed: those of its
    manifest, or of the unfinished work.

    Args:
        out: created if it does not exist.

    Attributes:
        work: folder of the unfinished work.
    """

    def __init__(self, out: Path):
        self.out = out
        self.work = out / WORK
        self._identity: dict[str, Any] = {}
        self._published: list[str] = []
        self._ours: dict[str, list[str]] = {}  # name -> its files; see `_files_in`

    @contextmanager
    def begin(
        self,
        identity: Mapping[str, Any],
        overwrite: bool = False,
        outputs: Iterable[str] = (),
        inputs: Iterable[Path] = (),
    ) -> Iterator[dict[str, Any] | None]:
        """Lock the folder while the block runs. If the block raises an exception before any block
        is finished, the folder is left as it was.

        Args:
            identity: everything that the output depends on. Work that was begun with another
                identity is not resumed.
            overwrite: replace the output of another identity, once the new one is complete.
            outputs: names of the files and folders that will be published.
            inputs: files and folders that the job reads.

        Yields:
            The manifest if a job of this identity is finished; else None.

        Raises:
            ValueError: the folder is of another identity, or in use by another process; or a file
                that no job wrote, or an input, would be replaced.
        """
        self._identity = json.loads(json.dumps(identity))
        outputs, inputs = list(outputs), list(inputs)
        self._check(outputs, inputs, overwrite)
        self.work.mkdir(parents=True, exist_ok=True)
        with (self.work / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ValueError(
                    f"{self.out}: another process is at work in this folder. Wait for it, or give "
                    "another one."
                ) from error
            manifest, begun = self._check(outputs, inputs, overwrite)
            done = manifest is not None and self._is_done(manifest)
            try:
                if not done:
                    for before in (manifest and manifest["identity"], begun):
                        if before not in (None, self._identity) and not overwrite:
                            raise ValueError(
                                f"{self.out}: holds a run of other input or settings "
                                f"({_difference(before, self._identity)}). Give another folder, "
                                "or --overwrite."
                            )
                    if begun not in (None, self._identity):
                        shutil.rmtree(self.work / _PREVIOUS, ignore_errors=True)
                        (self.work / _PREVIOUS).mkdir()
                        _move(self.work, self.work / _PREVIOUS)
                    write_json(self.work / _IDENTITY, self._identity)
                yield manifest if done else None
            except Exception:
                if not any((self.work / "shards").glob("*")):
                    self._discard()
                raise
        # Not after an exception, which leaves the work to be resumed.
        if not done or begun in (None, self._identity):
            shutil.rmtree(self.work, ignore_errors=True)

    def publish(self, name: str) -> None:
        """Move a finished file or folder from `work` to its place, replacing what earlier jobs
        left there.

        Raises:
            ValueError: no job wrote what is there.
        """
        target, files = self.out / name, _files_in(self.work / name)
        self._refuse_foreign(name)
        # Before the move, so that a job that resumes knows them; both, as either may be there.
        self._ours[name] = sorted({*self._ours.get(name, ()), *files})
        write_json(self.work / _OURS, self._ours)
        if name != MANIFEST:
            (self.out / MANIFEST).unlink(missing_ok=True)
        self._remove(name)
        (self.work / name).replace(target)
        self._published.append(name)

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Write the manifest, with "identity", as "published" the names of the other files and
        folders, and as "files" those of the folders. With it the job is finished."""
        for name in {*self._ours} - {*self._published, MANIFEST}:
            self._remove(name)
        folders = [name for name in self._published if (self.out / name).is_dir()]
        more = {
            "identity": self._identity,
            "published": list(self._published),
            "files": {name: _files_in(self.out / name) for name in folders},
        }
        write_json(self.work / MANIFEST, {**manifest, **more})
        self.publish(MANIFEST)

    def _check(
        self, outputs: Sequence[str], inputs: Sequence[Path], overwrite: bool
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Read the manifest and the identity of the unfinished work, and refuse to harm files that
        no job wrote, or the input."""
        manifest, begun = self._read(self.out / MANIFEST), self._read(self.work / _IDENTITY)
        known = {"identity": {}, "published": []} if manifest is None else manifest
        names, files = known.get("published"), known.get("files", {})
        is_ours = isinstance(known.get("identity"), dict) and isinstance(files, dict)
        if not is_ours or not isinstance(names, list) or not all(map(_is_name, names)):
            raise ValueError(
                f"{self.out / MANIFEST}: not a manifest of this tool, which would replace it. Move "
                "it away, or give another folder."
            )
        if begun is None and {file.split("/")[0] for file in _files_in(self.work)} - {*_STAY}:
            raise ValueError(
                f"{self.work}: not of this tool. Move it away, or give another folder."
            )
        self._ours = {name: files.get(name, ["."]) for name in names}
        if "files" not in known and (overwrite or known["identity"] != self._identity):
            # Of an earlier version, which did not list the files of folders: they count as ours.
            for name in names:
                if not (self.out / name).is_symlink():
                    self._ours[name] = _files_in(self.out / name)
        if manifest is not None:
            self._ours[MANIFEST] = ["."]
        for name, more in (self._read(self.work / _OURS) or {}).items():
            self._ours[name] = [*self._ours.get(name, ()), *more]
        if manifest is None or not self._is_done(manifest):
            for name in (*outputs, MANIFEST):
                self._refuse_foreign(name)
            places = [(self.out / name).resolve() for name in (*outputs, *self._ours, WORK)]
            for path in inputs:
                if any(place in (path.resolve(), *path.resolve().parents) for place in places):
                    raise ValueError(
                        f"{path}: is an input and would be replaced by output in {self.out}. Give "
                        "another output folder."
                    )
        return manifest, begun

    def _is_done(self, manifest: Mapping[str, Any]) -> bool:
        """Whether a job of this identity is finished and its output is still there."""
        files = manifest.get("files")
        return manifest.get("identity") == self._identity and all(
            (self.out / name).exists()
            if files is None
            else {*files.get(name, ["."])} <= {*_files_in(self.out / name)}
            for name in manifest["published"]
        )

    @staticmethod
    def _read(path: Path) -> dict[str, Any] | None:
        if not os.path.lexists(path):
            return None
        try:
            content = json.loads(path.read_bytes())
        except (OSError, RecursionError, ValueError) as error:
            raise ValueError(
                f"{path}: not valid JSON ({error}). Remove it, or give another folder."
            ) from error
        return content if isinstance(content, dict) else {}

    def _refuse_foreign(self, name: str) -> None:
        foreign = {*_files_in(self.out / name)} - {*self._ours.get(name, ())}
        if foreign:
            raise ValueError(
                f"{self.out / name / min(foreign)}: this tool did not write it, and would replace "
                "it. Move it away, or give another folder."
            )

    def _remove(self, name: str) -> None:
        target = self.out / name
        for file in {*_files_in(target)} & {*self._ours[name]}:
            (target / file).unlink()
        if target.is_dir() and not _files_in(target):
            shutil.rmtree(target)

    def _discard(self) -> None:
        """Remove the new work, and put the earlier one back."""
        previous = self.work / _PREVIOUS
        for path in self.work.iterdir():
            if path.name not in _STAY:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if previous.is_dir():
            _move(previous, self.work)
            previous.rmdir()
        elif not (self.work / _OURS).exists():
            shutil.rmtree(self.work, ignore_errors=True)
            if not any(self.out.iterdir()):
                self.out.rmdir()


def _move(source: Path, target: Path) -> None:
    """Move unfinished work from one folder to another."""
    for path in list(source.iterdir()):
        if path.name not in _STAY:
            path.replace(target / path.name)


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", "..", WORK) and Path(name).name == name


def _files_in(path: Path) -> list[str]:
    """The files of a folder, relative to it; "." for a file; nothing if it does not exist.

    A link is named so that it is never taken for one of ours.
    """
    if path.is_symlink():
        return ["(a link)"]
    if path.is_dir():
        files = (each for each in path.rglob("*") if each.is_symlink() or not each.is_dir())
        return sorted(str(each.relative_to(path)) for each in files)
    return ["."] if path.exists() else []


def sha256_of(path: Path, pattern: str = "*.txt") -> str:
    """Of the content of a file; of a folder, of the names and contents of its files that match a
    pattern."""
    if path.is_dir():
        digest = hashlib.sha256()
        for file in sorted(file for file in path.rglob(pattern) if file.is_file()):
            digest.update(f"{file.relative_to(path)}\0{sha256_of(file)}\n".encode())
        return digest.hexdigest()
    return file_sha256(path)


def identity_of_files(files: Mapping[str, Path]) -> dict[str, dict[str, str]]:
    """Name and sha256 of files by their role, for an identity."""
    return {role: {"name": path.name, "sha256": sha256_of(path)} for role, path in files.items()}


def versions() -> dict[str, str]:
    """Of this package and of what it computes with, for an identity."""
    from .. import __version__

    ours = {"vlnms_d2": __version__, "python": platform.python_version()}
    return ours | {"numpy": np.__version__, "torch": torch.__version__}


def _difference(old: Any, new: Any, name: str = "") -> str:
    """The first difference between two identities."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *old]:
            if old.get(key) != new.get(key):
                return _difference(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
    return f"{name} is {shown(old)} there, {shown(new)} now"
