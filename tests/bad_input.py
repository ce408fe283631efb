"""Bad input of every kind, generated from a seed, for tests/tools/test_bad_input.py.

A file is damaged as bytes (`damaged`), or as what it says: a value in it is replaced by one that
does not fit (`with_bad_values`).
"""

from __future__ import annotations

import contextlib
import copy
import gzip
import importlib.util
import io
import json
import math
import random
import struct
import sys
import zlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
from conftest import REPO
from PIL import Image

DEEP = 100_000

# What no JSON file of ours may be as a whole.
_WHOLE = {
    "empty": b"",
    "null": b"null",
    "a number": b"7",
    "a string": b'"text"',
    "deep lists": b"[" * DEEP + b"]" * DEEP,
    "deep dictionaries": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "a long number": b"9" * 5000,
    "zero bytes": b"\0" * 1000,
}

BAD_NUMBERS = [None, "7", [], {}, math.nan, math.inf, -math.inf, 10**400]


def damaged(content: bytes, seed: int) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of files that are damaged, or something else."""
    rng = random.Random(seed)
    yield from _WHOLE.items()
    for _ in range(3):
        yield "truncated", content[: rng.randrange(1, len(content) - 1)]
    yield "random bytes", rng.randbytes(500)
    yield "gzipped", gzip.compress(content, mtime=0)
    yield "UTF-16", content.decode().encode("utf-16")
    yield "twice", content + content
    yield "with an end of garbage", content + b"]}garbage"
    yield "not UTF-8", content.replace(b'"', b'"\xff\xfe', 1)


def with_bad_values(obj: Any, bad: dict[str, list[Any]], seed: int) -> Iterator[tuple[str, bytes]]:
    """(name, JSON) of a file with one value replaced, or removed where it is `...`.

    Args:
        obj: what the file says.
        bad: from the path of a value to what it cannot be. In a path such as "images.*.height", "*"
            is a random index of a list.
        seed: of the random choices.
    """
    rng = random.Random(seed)
    for path, values in bad.items():
        for value in values:
            changed = copy.deepcopy(obj)
            place, keys = changed, path.split(".")
            for i, key in enumerate(keys):
                key = rng.randrange(len(place)) if key == "*" else key
                key = int(key) if isinstance(place, list) else key
                if i < len(keys) - 1:
                    place = place[key]
                elif value is ...:
                    del place[key]
                else:
                    place[key] = value
            shown = "missing" if value is ... else repr(value)[:30]
            yield f"{path} {shown}", json.dumps(changed).encode()


def load_tool(name):
    spec = importlib.util.spec_from_file_location(f"bad_{name}", REPO / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # as data classes need it
    spec.loader.exec_module(module)
    return module


def state_of(folder):
    """All files below a folder, but logs, with their bytes and times."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".log")
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def run_tool(name, arguments):
    """Exit status and stderr of a tool, run as its file would be."""
    import interrupts

    module, printed = load_tool(name), io.StringIO()
    with (
        contextlib.redirect_stderr(printed),
        contextlib.redirect_stdout(io.StringIO()),
        mock.patch.object(sys, "argv", [f"{name}.py"]),
        pytest.raises(SystemExit) as ended,
    ):
        interrupts.exit_with(lambda: module.main([str(word) for word in arguments]))
    code = ended.value.code
    return 0 if code is None else code, printed.getvalue()


def bad_images(seed: int) -> Iterator[tuple[str, bytes]]:
    """(file name, bytes) of what no tool can show a model."""
    rng = random.Random(seed)
    pixels = np.random.default_rng(seed).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    jpg, png = _encoded("JPEG", pixels), _encoded("PNG", pixels)
    for number in range(3):
        yield f"cut{number}.jpg", jpg[: rng.randrange(1, len(jpg) - 2)]
        yield f"cut{number}.png", png[: rng.randrange(1, len(png) - 20)]
    data = png.index(b"IDAT") + rng.randrange(4, 1000)
    yield "crc.png", png[:data] + bytes([png[data] ^ 255]) + png[data + 1 :]
    yield "text.jpg", b"no image"
    yield "page.jpg", b"<!DOCTYPE html><html></html>"
    yield "empty.jpg", b""
    yield "zeros.png", bytes(1000)
    yield "noise.jpg", jpg[:2] + rng.randbytes(2000)
    yield "gray16.png", _encoded("PNG", pixels[..., 0].astype(np.uint16) * 200)
    yield "float.tif", _encoded("TIFF", pixels[..., 0].astype(np.float32))
    for name, size in (("bomb.png", 60000), ("none.png", 0)):
        header = b"IHDR" + struct.pack(">II", size, size) + b"\x08\x02\0\0\0"
        start = png.index(b"IHDR")
        crc = struct.pack(">I", zlib.crc32(header))
        yield name, png[:start] + header + crc + png[start + len(header) + 4 :]
    yield "thin.png", _encoded("PNG", np.zeros((1, 5000, 3), np.uint8))


def unusual_images(seed: int) -> Iterator[tuple[str, bytes]]:
    """(file name, bytes) of images that models can be shown."""
    pixels = np.random.default_rng(seed).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    yield "cmyk.jpg", _encoded("JPEG", image.convert("CMYK"))
    yield "palette.png", _encoded("PNG", image.convert("P"))
    yield "bits.png", _encoded("PNG", image.convert("1"))
    yield "alpha.png", _encoded("PNG", image.convert("LA"))
    yield "one.png", _encoded("PNG", pixels[:1, :1])
    yield "jpeg.png", _encoded("JPEG", pixels)


def _encoded(kind: str, pixels: np.ndarray | Image.Image) -> bytes:
    image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def bad_vectors(seed: int) -> Iterator[tuple[str, bytes]]:
    """(file name, bytes) of no word vectors."""
    rng = random.Random(seed)
    words = ("the", "dog", "cup", "person", "left", "a")
    rows = [[f"{rng.uniform(-1, 1):.4f}" for _ in range(6)] for _ in words]
    lines = [" ".join([word, *row]) for word, row in zip(words, rows, strict=True)]
    text = "\n".join(lines) + "\n"
    yield "cut.txt", text[: -len(lines[-1]) // 2].encode()
    yield "short.txt", text.replace(lines[3], lines[3].rsplit(" ", 1)[0]).encode()
    yield "long.txt", text.replace(lines[1], lines[1] + " 0.5").encode()
    for value in ("nan", "inf", "1e999", "x", "0,5", ""):
        yield f"{value or 'gap'}.txt", text.replace(rows[2][3], value).encode()
    yield "empty.txt", b""
    yield "blank.txt", b"\n\n \n"
    yield "words.txt", b"just words\nand more of them here\n"
    yield "sized.txt", b"6 6\n" + text.encode()
    yield "binary.bin", b"6 6\n" + rng.randbytes(3000)
    yield "zeros.txt", bytes(3000)
    yield "line.txt", b"word" * 100_000
    yield "list.json", json.dumps([[1, 2]]).encode()
    packed = gzip.compress(text.encode(), mtime=0)
    yield "cut.gz", packed[: rng.randrange(5, len(packed) - 9)]
    yield "damaged.gz", packed[:15] + bytes([packed[15] ^ 255]) + packed[16:]
    yield "utf32.txt", text.encode("utf-32")
