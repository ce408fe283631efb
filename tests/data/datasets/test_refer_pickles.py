"""Plain pickles of any age load; everything else is refused with the reason."""

from __future__ import annotations

import os
import pickle
import resource
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlnms_d2.data.datasets.refer import RefusedPickle, load_plain_pickle

GIB = 1 << 30


@pytest.fixture
def limited_memory():
    """Lets allocations of gigabytes fail, which the unpickler makes before it reads the data."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + GIB, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


REFS = [{"ref_id": 7, "sent": "chaise à gauche", "box": (1.5, -2, True, None), "ids": [2**70]}]


class Payload:
    def __reduce__(self):
        return os.system, ("echo harm > harm.txt",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_of_every_protocol(tmp_path, protocol):
    (tmp_path / "refs.p").write_bytes(pickle.dumps(REFS, protocol))
    assert load_plain_pickle(tmp_path / "refs.p") == REFS
    assert load_plain_pickle(str(tmp_path / "refs.p")) == REFS


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"(lp0\n(dp1\nS'sent'\np2\nS'red cup'\np3\nsa.", [{"sent": "red cup"}]),
        (b"(lp0\nVred cup\np1\naI7\na.", ["red cup", 7]),
        (b"\x80\x02]q\x00(U\x04leftq\x01X\x05\x00\x00\x00rightq\x02e.", ["left", "right"]),
        (b"\x80\x02U\x06caf\xc3\xa9!.", "café!"),
        (b"\x80\x02U\x04caf\xe9.", "café"),
    ],
    ids=["protocol 0 str", "protocol 0 unicode", "protocol 2", "UTF-8", "Latin-1"],
)
def test_strings_of_python_2(tmp_path, content, expected):
    (tmp_path / "refs.p").write_bytes(content)
    assert load_plain_pickle(tmp_path / "refs.p") == expected


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_command_is_refused_and_not_run(tmp_path, protocol, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "refs.p").write_bytes(pickle.dumps([Payload()], protocol))
    with pytest.raises(RefusedPickle, match=r"refs\.p: refused.*(posix|nt)\.system.*plain data"):
        load_plain_pickle(tmp_path / "refs.p")
    assert not (tmp_path / "harm.txt").exists()


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (np.zeros(3), "numpy"),
        (np.float32(1.5), "numpy"),
        (eval, r"builtins\.eval|__builtin__\.eval"),
        (Payload, r"test_refer_pickles\.Payload"),
    ],
    ids=["array", "scalar", "function", "class"],
)
def test_anything_else_is_refused_by_name(tmp_path, value, name):
    (tmp_path / "refs.p").write_bytes(pickle.dumps({"value": value}, 2))
    with pytest.raises(RefusedPickle, match=rf"refs\.p: refused, as it asks for '.*({name})"):
        load_plain_pickle(tmp_path / "refs.p")


def test_a_persistent_object_is_refused(tmp_path):
    (tmp_path / "refs.p").write_bytes(b"Pelsewhere\n.")
    with pytest.raises(RefusedPickle, match="persistent object 'elsewhere'"):
        load_plain_pickle(tmp_path / "refs.p")


@pytest.mark.parametrize(
    "content",
    [
        b"Nr\xff\xff\xff\x7f.",
        b"\x80\x02U\x01ar\xff\xff\xff\x7f.",
        b"Np2000000000\n.",
        b"Np+2_000_000_000\n.",
        b"Np" + b"9" * 5000 + b"\n.",
    ],
)
def test_a_file_that_asks_for_gigabytes_is_refused(tmp_path, limited_memory, content):
    (tmp_path / "refs.p").write_bytes(content)
    with pytest.raises(RefusedPickle, match=r"refs\.p: not a complete pickle"):
        load_plain_pickle(tmp_path / "refs.p")


def test_strings_that_look_like_instructions_load(tmp_path):
    value = ["r\xff\xff\xff\x7f.", "p2000000000\n.", "c", "."]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "refs.p").write_bytes(pickle.dumps(value, protocol))
        assert load_plain_pickle(tmp_path / "refs.p") == value


def test_a_missing_an_empty_and_a_foreign_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"refs\.p: no such file"):
        load_plain_pickle(tmp_path / "refs.p")
    (tmp_path / "refs.p").write_bytes(b"")
    with pytest.raises(RefusedPickle, match=r"refs\.p: the file is empty.*Fetch it again"):
        load_plain_pickle(tmp_path / "refs.p")
    (tmp_path / "refs.p").write_bytes(b"<html>Not found</html>")
    with pytest.raises(RefusedPickle, match=r"refs\.p: not a complete pickle"):
        load_plain_pickle(tmp_path / "refs.p")


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_file_cut_short_anywhere_is_refused(tmp_path, protocol):
    whole = pickle.dumps(REFS, protocol)
    for length in range(1, len(whole)):
        (tmp_path / "refs.p").write_bytes(whole[:length])
        with pytest.raises(RefusedPickle, match=r"refs\.p: not a complete pickle.*fetch the file"):
            load_plain_pickle(tmp_path / "refs.p")


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.binary(min_size=1, max_size=60))
def test_any_bytes_load_as_plain_data_or_are_refused(tmp_path_factory, limited_memory, content):
    path = tmp_path_factory.getbasetemp() / "any.p"
    path.write_bytes(content)
    try:
        value = load_plain_pickle(path)
    except RefusedPickle as error:
        assert "any.p" in str(error)
    else:
        plain = (list, tuple, dict, set, frozenset, str, bytes, bytearray, int, float)
        assert value is None or isinstance(value, plain)
