"""GGUF files put together byte by byte, right or wrong on purpose: gguf's writer refuses to write wrong ones."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

U8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10  # value types


def string(text: str | bytes, order: str = "<") -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack(order + "Q", len(data)) + data


def key(name: str, kind: int, payload: bytes, order: str = "<") -> bytes:
    return string(name, order) + struct.pack(order + "I", kind) + payload


def array(kind: int, n: int, payload: bytes, order: str = "<") -> bytes:
    return struct.pack(order + "IQ", kind, n) + payload


@dataclass
class Info:
    """One tensor's entry: ``dims`` as in the file, fastest-varying first."""

    name: str = "x"
    dims: Sequence[int] = (2,)
    type: int = 0  # F32
    offset: int = 0

    def pack(self, order: str) -> bytes:
        dims = struct.pack(f"{order}I{len(self.dims)}Q", len(self.dims), *self.dims)
        return string(self.name, order) + dims + struct.pack(order + "IQ", self.type, self.offset)


def gguf_bytes(
    keys: Sequence[bytes] = (),
    tensors: Sequence[Info] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    order: str = "<",
    alignment: int = 32,
    n_keys: int | None = None,
    n_tensors: int | None = None,
) -> bytes:
    """A file of these parts. ``alignment`` only sets where ``data`` starts; the counts may lie."""
    counts = len(tensors) if n_tensors is None else n_tensors, len(keys) if n_keys is None else n_keys
    header = b"GGUF" + struct.pack(order + "IQQ", version, *counts)
    header += b"".join(keys) + b"".join(info.pack(order) for info in tensors)
    return header + bytes(-len(header) % alignment) + data
