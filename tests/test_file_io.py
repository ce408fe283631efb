from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vlnms_d2 import file_io
from vlnms_d2.file_io import atomic_write, shown, write_json


def test_atomic_write_leaves_only_the_finished_file(tmp_path):
    path = tmp_path / "a.bin"
    with atomic_write(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_atomic_write_keeps_the_earlier_file_when_the_block_raises(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="stop"), atomic_write(path) as file:
        file.write(b"half")
        raise RuntimeError("stop")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


# The module alone: the package would take most of the test's time to import.
WRITE = f"""
import os, signal, sys
sys.path.append({str(Path(file_io.__file__).parent)!r})
from file_io import atomic_write
with atomic_write(sys.argv[1]) as file:
    file.write(b"half")
    print("begun", flush=True)
    sys.stdin.read() if sys.argv[2] == "wait" else os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_killed_processes_left_is_removed_by_the_next(tmp_path):
    subprocess.run([sys.executable, "-c", WRITE, tmp_path / "a", "die"], capture_output=True)
    [left] = os.listdir(tmp_path)
    assert left.startswith(".a.") and left.endswith(".vlnms_d2.tmp")
    foreign = (".b.tmp", ".diary", "x.vlnms_d2.tmp")
    for name in foreign:
        (tmp_path / name).touch()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", WRITE, tmp_path / "c", "wait"], **pipes) as other:
        other.stdout.readline()
        [used] = {*os.listdir(tmp_path)} - {*foreign}  # the other process has removed it
        (tmp_path / ".d.0.vlnms_d2.tmp").touch()
        with atomic_write(tmp_path / "a") as file:
            file.write(b"new")
            assert len({*os.listdir(tmp_path)} - {*foreign, used}) == 1
        other.stdin.close()
        assert other.wait() == 0
    assert set(os.listdir(tmp_path)) == {*foreign, "a", "c"}
    assert (tmp_path / "c").read_bytes() == b"half"


class FullDisk(io.RawIOBase):
    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


SAVES = {
    "at once": lambda file: file.write(b"x" * 10**6),
    "at the end": lambda file: file.write(b"x"),
    "torch": lambda file: torch.save(torch.zeros(10**6), file),
    "numpy": lambda file: np.save(file, np.zeros(10**6)),
}


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
def test_a_full_disk_is_told_with_the_path(tmp_path, monkeypatch, save):
    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(file_io, "_locked_temporary", lambda path: (full, path / "no"))
    full = io.BufferedWriter(FullDisk())
    message = r"the disk is full\. Free some space.*run again: '.*/a'$"
    with pytest.raises(OSError, match=message) as e, atomic_write(tmp_path / "a") as file:
        save(file)
    assert e.value.errno == errno.ENOSPC and e.value.filename == str(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"old"
    with pytest.raises(OSError, match=r"'.*/a'$"), file_io.explained_full_disk(tmp_path):
        raise e.value  # keeps the inner path
    with pytest.raises(OSError, match="No such file"), file_io.explained_full_disk(tmp_path):
        (tmp_path / "none").open()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_atomic_write_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "a"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_write_json_does_not_depend_on_the_order_of_keys(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1, 2], "a": "é"})
    write_json(tmp_path / "b.json", {"a": "é", "b": [1, 2]})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": "é", "b": [1, 2]}


def test_what_messages_show_is_short_whatever_its_size():
    nested = [0]
    for _ in range(9):
        nested = [nested] * 10
    deep = []
    for _ in range(100_000):
        deep = [deep]
    cases = [
        nested,
        deep,
        [1.5] * 3_000_000,
        "x" * 10**6,
        10**5000,
        -(10**5000),
        {i: i for i in range(10**5)},
    ]
    for value in (*cases, b"x" * 10**6, [10**5000], "\ud800"):
        text = shown(value)
        assert len(text) < 1000 and text.encode()
    assert shown([1, 2.5, "cup", None]) == "[1, 2.5, 'cup', None]"
