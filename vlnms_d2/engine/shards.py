"""Work cut into blocks, each of which leaves files of its own: the shards of the output."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ..export import ProposalFormat
from .resumable import OutputFolder, sha256_of


@dataclass(frozen=True)
class Shards:
    """The files of all blocks.

    Attributes:
        folder: of the files.
        num_blocks: how many there are.
    """

    folder: Path
    num_blocks: int

    def path(self, number: int, suffix: str) -> Path:
        """The file of a kind of a block."""
        return shard_path(self.folder, number, suffix)

    def paths(self, suffix: str) -> Iterator[Path]:
        """The files of a kind, in the order of the blocks."""
        return (self.path(number, suffix) for number in range(self.num_blocks))

    def missing(self, suffix: str) -> list[int]:
        """The blocks that have no file of a kind yet."""
        return [n for n in range(self.num_blocks) if not self.path(n, suffix).is_file()]


def shard_path(folder: Path, number: int, suffix: str) -> Path:
    """The file of a kind of a block, in a folder of shards."""
    return folder / f"{number:06d}.{suffix}"


def sum_counts(paths: Iterable[Path]) -> Counter[str]:
    """The sum of what blocks counted; each file is a JSON object of numbers."""
    counts: Counter[str] = Counter()
    for path in paths:
        counts.update(json.loads(path.read_bytes()))
    return counts


def merge_format(one: ProposalFormat, shards: Shards, output: OutputFolder) -> str:
    """Make the file or folder of a format of its shards and publish it; returns its sha256."""
    path = output.work / one.output
    one.merge(shards.paths(one.name), path)
    digest = sha256_of(path, "*")
    output.publish(one.output)
    return digest


def progress(what: str, total: int) -> AbstractContextManager[tqdm]:
    """A progress bar, where there is a terminal to show it."""
    return tqdm(total=total, desc=what, disable=None)
