"""safetensors: a JSON header and the arrays' bytes behind it. Memory-mapped, and every number checked.

    u64 n (little-endian)   n bytes of JSON: {name: {"dtype", "shape", "data_offsets": [start, end]}, ...}   data

Source: the format's own description in the README of the safetensors project.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllava.errors import FileError
from tinyllava.files.gguf_write import put, replacing
from tinyllava.files.stored import AGAIN, DTYPES, StoredArray

MAX_HEADER = 100_000_000  # bytes, the bound of the safetensors library


def open_safetensors(path: str | Path) -> dict[str, StoredArray]:
    """The arrays of a file by name. FileError if it is no safetensors file, or is damaged or truncated."""
    path = Path(path)
    mapping = _map(path)
    (n,) = struct.unpack("<Q", mapping[:8]) if len(mapping) >= 8 else (0,)
    if not 2 <= n <= MAX_HEADER or 8 + n > len(mapping):
        found = f"a header of {n} bytes in a file of {len(mapping)}"
        raise FileError(path, found, wanted="a whole safetensors file", hint=AGAIN)
    header = _header(path, mapping[8 : 8 + n])
    data = np.frombuffer(mapping, np.uint8)[8 + n :]
    arrays = {}
    previous_end = 0
    for name, entry in sorted(header.items(), key=lambda item: _start(path, *item)):
        dtype, shape, start, end = _entry(path, name, entry, len(data))
        if start < previous_end:
            raise FileError(f"{path}: {name}", "overlaps another array", hint=AGAIN)
        previous_end = end
        arrays[name] = StoredArray(name, dtype, shape, f"{path}: {name}", _loader(data[start:end], dtype, shape))
    return arrays


def write_safetensors(
    path: str | Path, arrays: Mapping[str, StoredArray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write arrays as they are stored elsewhere, one after the other; the file gets its name when it is whole."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, stored in arrays.items():
        offsets = [offset, offset + stored.nbytes]
        header[name] = {"dtype": stored.dtype, "shape": list(stored.shape), "data_offsets": offsets}
        offset += stored.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    with replacing(path, needs_bytes=8 + len(text) + offset) as out:
        put(out, struct.pack("<Q", len(text)) + text, path)
        for stored in arrays.values():
            put(out, np.ascontiguousarray(stored.read()).reshape(-1).view(np.uint8).data, path)


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        reason = getattr(error, "strerror", None) or "an empty file"
        raise FileError(path, str(reason), wanted="a safetensors file") from None


def _header(path: Path, text: bytes) -> dict[str, Any]:
    """The header's entries without its metadata."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            raise ValueError("a name stands twice")
        return entries

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        found = f"the header is not JSON: {error}"
        raise FileError(path, found, wanted="a safetensors file", hint=AGAIN) from None
    if not isinstance(header, dict):
        raise FileError(path, "the header is not an object", wanted="a safetensors file", hint=AGAIN)
    header.pop("__metadata__", None)
    return header


def _start(path: Path, name: str, entry: Any) -> int:
    try:
        return int(entry["data_offsets"][0])
    except (TypeError, KeyError, IndexError, ValueError, OverflowError):
        raise FileError(f"{path}: {name}", "has no data_offsets", hint=AGAIN) from None


def _entry(path: Path, name: str, entry: Any, data_bytes: int) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype, shape, start, end) of one array. FileError unless they make sense together."""
    where = f"{path}: {name}"
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry["data_offsets"]
    if dtype not in DTYPES:
        raise FileError(where, f"type {dtype!r}", wanted=", ".join(DTYPES))
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
    if len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in numbers) or len(shape) > 32:
        raise FileError(where, f"shape {shape} at {offsets}", wanted="whole numbers", hint=AGAIN)
    start, end = offsets
    needed = prod(shape) * DTYPES[dtype].itemsize
    if end - start != needed:
        raise FileError(where, f"{end - start} bytes", wanted=f"{needed} for {dtype} {shape}", hint=AGAIN)
    if end > data_bytes:
        found = f"truncated: ends at byte {end} of {data_bytes}"
        raise FileError(where, found, wanted="a whole safetensors file", hint=AGAIN)
    return dtype, tuple(shape), start, end


def _loader(data: npt.NDArray[np.uint8], dtype: str, shape: tuple[int, ...]) -> Any:
    return lambda: data.view(DTYPES[dtype]).reshape(shape)
