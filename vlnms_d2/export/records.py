"""Shards of formats that are folders: named pieces of bytes, one behind the other."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np


def write_record(shard: BinaryIO, header: Mapping[str, Any], body: bytes) -> None:
    """Append a record: a line of JSON, then the bytes."""
    shard.write(json.dumps({**header, "size": len(body)}).encode() + b"\n")
    shard.write(body)


def read_records(
    shards: Iterable[Path], with_body: bool = True
) -> Iterator[tuple[dict[str, Any], bytes]]:
    """The records of all shards, in their order: header and bytes (none without `with_body`)."""
    for shard in shards:
        with shard.open("rb") as file:
            while line := file.readline():
                header = json.loads(line)
                if with_body:
                    yield header, file.read(header["size"])
                else:
                    file.seek(header["size"], io.SEEK_CUR)
                    yield header, b""


def npz_bytes(arrays: Mapping[str, np.ndarray]) -> bytes:
    """An `.npz` file, as `np.load` reads it, whose bytes depend on the arrays alone."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            # An entry of its own, which has the date 1980-01-01 where others have that of today.
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)
    return buffer.getvalue()
