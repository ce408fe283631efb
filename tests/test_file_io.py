from __future__ import annotations

import json
import os

import pytest

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
