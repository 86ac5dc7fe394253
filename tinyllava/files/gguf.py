"""GGUF: bytes to metadata and memory-mapped tensors. Nothing in the file is believed before it is checked.

A GGUF file, version 2 or 3 (docs/gguf.md of the ggml project):

    "GGUF"  u32 version  u64 n_tensors  u64 n_keys
    n_keys    times   string key, u32 value type, value          (metadata)
    n_tensors times   string name, u32 n_dims, u64 dims[n_dims], u32 type, u64 offset
    zeros up to a multiple of the alignment
    tensor data, each tensor at its offset from here, offsets multiples of the alignment

A string is a u64 length and UTF-8 bytes; an array is a u32 value type, a u64 count and the values. ``dims``
run from the fastest-varying one to the slowest, so NumPy's shape is their reverse. Version 3 differs from 2
in that a file may be big-endian throughout: its version word then reads as 0x03000000.
"""

from __future__ import annotations

import mmap
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllava.errors import FileError
from tinyllava.files.metadata import AGAIN, Cursor
from tinyllava.files.sniff import HEAD, looks_like
from tinyllava.quant.blocks import TYPES, by_id, dequantize, swap_bytes

MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 16  # the largest models have a few thousand
MAX_DIMS = 4  # GGML_MAX_DIMS
MAX_ELEMENTS = 1 << 60  # a tensor without elements must not claim a row count that NumPy cannot hold
DEFAULT_ALIGNMENT = 32  # bytes, where general.alignment is absent


@dataclass(frozen=True, eq=False)
class Tensor:
    """A named array in the file, still in blocks. ``shape`` is in NumPy's order: the slowest axis first."""

    name: str
    type: str
    shape: tuple[int, ...]
    start: int  # first byte, from the start of the file
    file: GGUFFile = field(repr=False)

    @property
    def n_elements(self) -> int:
        return prod(self.shape)

    @property
    def n_rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        return TYPES[self.type].row_bytes(self.shape[-1] if self.shape else 1)

    @property
    def nbytes(self) -> int:
        return self.n_rows * self.row_bytes

    @property
    def stored(self) -> npt.NDArray[np.uint8]:
        """The bytes as they stand in the file (n_rows, row_bytes): a read-only view of the mapping."""
        return self.file.bytes_at(self.start, self.nbytes).reshape(self.n_rows, self.row_bytes)

    @property
    def raw(self) -> npt.NDArray[np.uint8]:
        """Little-endian blocks (n_rows, row_bytes): ``stored``, or of a big-endian file a copy."""
        return self._little_endian(self.stored)

    def as_matrix(self) -> Tensor:
        """The same tensor seen as a matrix (shape[0], all the rest), as of a patch convolution."""
        return replace(self, shape=(self.shape[0], prod(self.shape[1:])))

    def dequantize(self, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
        """The weights as an array of ``shape``: 4 (or 8) bytes a weight, whatever the file takes for it."""
        return dequantize(self.type, self.raw, dtype).reshape(self.shape)

    def rows(
        self, ids: Iterable[int] | npt.NDArray[Any], dtype: npt.DTypeLike = np.float32
    ) -> npt.NDArray[Any]:
        """Weights of some rows of a matrix, (len(ids), n_cols). IndexError for a row that is not there."""
        index = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64)
        if len(index) and not 0 <= index.min() <= index.max() < self.n_rows:
            raise IndexError(f"{self.name}: row {index.min()}..{index.max()} of {self.n_rows}")
        return dequantize(self.type, self._little_endian(self.stored[index]), dtype)

    def _little_endian(self, stored: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        return stored if self.file.byte_order == "little" else swap_bytes(TYPES[self.type], stored)


@dataclass(eq=False)
class GGUFFile:
    """An open GGUF file. Metadata is in memory; tensors are views of the mapped file, read when touched.

    ``metadata`` holds Python scalars and strings; arrays of numbers as NumPy arrays, of strings as lists.
    After :meth:`close` the file gives out no more tensors; arrays that it gave out stay valid. Who shortens the
    file on the disk meanwhile kills the process (SIGBUS), as with every mapped file.
    """

    path: Path
    version: int
    byte_order: str  # "little" or "big"
    alignment: int  # bytes
    metadata: dict[str, Any]
    size: int  # bytes of the whole file
    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _bytes: npt.NDArray[np.uint8] | None = field(default=None, repr=False)

    def bytes_at(self, start: int, n: int) -> npt.NDArray[np.uint8]:
        """A read-only view of ``n`` bytes of the mapping. ValueError once the file is closed."""
        if self._bytes is None:
            raise ValueError(f"{self.path}: the file is closed")
        return self._bytes[start : start + n]

    def close(self) -> None:
        """Let go of the mapping. The system unmaps the file when the last array over it is gone."""
        self._bytes = None

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def n_parameters(file: GGUFFile) -> int:
    """How many weights the file's tensors hold together."""
    return sum(tensor.n_elements for tensor in file.tensors.values())


def open_gguf(path: str | Path) -> GGUFFile:
    """Open a GGUF file of version 2 or 3. FileError if it is anything else, or says what cannot be.

    Time and memory are proportional to the metadata, of which metadata.py reads ``MAX_HEADER`` bytes at most.
    """
    path = Path(path)
    mapping = _map(path)
    version, byte_order = _version(path, mapping)
    cursor = Cursor(path, mapping, byte_order, position=8)
    n_tensors = cursor.count("tensors", at_least=8 + 4 + 4 + 8, at_most=MAX_TENSORS)
    n_keys = cursor.count("metadata keys", at_least=8 + 4 + 1, at_most=MAX_KEYS)
    metadata: dict[str, Any] = {}
    for _ in range(n_keys):
        key, value = cursor.key_value()
        if key in metadata:
            raise FileError(path, f"metadata key {key!r} stands twice", hint=AGAIN)
        metadata[key] = value
    file = GGUFFile(path, version, byte_order, _alignment(path, metadata), metadata, size=len(mapping))
    _read_tensors(cursor, file, n_tensors)
    file._bytes = np.frombuffer(mapping, np.uint8)
    return file


def _map(path: Path) -> mmap.mmap:
    """The whole file, mapped read-only. FileError if there is no such file, or it is nothing to be mapped."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise FileError(path, "a directory", wanted="a GGUF file", hint="Name the file in it")
        if not stat.S_ISREG(mode):  # opening a pipe would wait for its writer
            raise FileError(path, "a device or a pipe", wanted="a GGUF file on a disk")
        with path.open("rb") as opened:
            head = opened.read(HEAD)
            if head[:4] != b"GGUF":
                found, hint = looks_like(head)
                raise FileError(path, f"this is {found}", wanted="a GGUF file", hint=hint)
            return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise FileError(path, "no such file", hint="Check the path") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise FileError(path, f"cannot be read: {reason}") from None


def _version(path: Path, mapping: mmap.mmap) -> tuple[int, str]:
    """Version 2 or 3, and the byte order, of which the version word itself tells."""
    word = mapping[4:8]
    if len(word) < 4:
        raise FileError(path, f"truncated: {len(mapping)} bytes", wanted="a whole GGUF file", hint=AGAIN)
    # A version is a small number: if the low half of the word is empty, the number is in the other half.
    byte_order = "big" if word[:2] == b"\0\0" else "little"
    version = int.from_bytes(word, "big" if byte_order == "big" else "little")
    if version == 1:
        hint = "Convert the original model again; version 1 was in use for a few weeks of August 2023"
        raise FileError(path, "GGUF version 1", wanted="version 2 or 3", hint=hint)
    if version not in (2, 3):
        raise FileError(path, f"GGUF version {version}", wanted="version 2 or 3")
    return version, byte_order


def _alignment(path: Path, metadata: dict[str, Any]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(value) is not int or value < 1 or value & (value - 1):
        raise FileError(path, f"general.alignment is {value!r}", wanted="a power of two", hint=AGAIN)
    return value


def _read_tensors(cursor: Cursor, file: GGUFFile, n_tensors: int) -> None:
    infos = [_tensor_info(cursor, file) for _ in range(n_tensors)]
    data_start = -(-cursor.position // file.alignment) * file.alignment  # rounded up
    for name, kind, shape, offset in infos:
        if name in file.tensors:
            raise FileError(file.path, f"tensor {name!r} stands twice", hint=AGAIN)
        tensor = Tensor(name, kind, shape, data_start + offset, file)
        if offset % file.alignment:
            wanted = f"a multiple of the alignment {file.alignment}"
            raise FileError(f"{file.path}: {name}", f"starts at offset {offset}", wanted=wanted, hint=AGAIN)
        if tensor.start + tensor.nbytes > file.size:
            found = f"truncated: ends at byte {tensor.start + tensor.nbytes} of a file of {file.size} bytes"
            raise FileError(f"{file.path}: {name}", found, wanted="a whole GGUF file", hint=AGAIN)
        file.tensors[name] = tensor


def _tensor_info(cursor: Cursor, file: GGUFFile) -> tuple[str, str, tuple[int, ...], int]:
    """(name, block type, shape, offset) of one tensor. FileError if its rows are not whole blocks."""
    name = cursor.string("tensor name")
    where = f"{file.path}: {name}"
    n_dims = cursor.number("u4")
    if n_dims > MAX_DIMS:
        raise FileError(where, f"{n_dims} dimensions", wanted=f"at most {MAX_DIMS}", hint=AGAIN)
    shape = tuple(cursor.number("u8") for _ in range(n_dims))[::-1]
    kind = by_id(cursor.number("u4"), where)
    offset = cursor.number("u8")
    if prod(max(n, 1) for n in shape) > MAX_ELEMENTS:
        raise FileError(where, f"shape {shape}", wanted="one that fits in memory", hint=AGAIN)
    if shape and shape[-1] % kind.block_size:
        wanted = f"a multiple of {kind.block_size} for {kind.name}"
        raise FileError(where, f"rows of {shape[-1]} weights", wanted=wanted, hint=AGAIN)
    if not shape and not kind.is_scalar:
        raise FileError(where, f"one number of type {kind.name}", wanted="a plain type", hint=AGAIN)
    return name, kind.name, shape, offset
