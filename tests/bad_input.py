"""Bad input of every kind, generated from a seed, for tests/tools/test_bad_input.py.

A file is damaged as bytes (`damaged`), or as what it says: a value in it is replaced by one that
does not fit (`with_bad_values`).
"""

from __future__ import annotations

import copy
import gzip
import json
import math
import random
from collections.abc import Iterator
from typing import Any

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
