"""Writing GGUF: the header from declared sizes first, then tensors a few rows at a time, renamed when whole.

The layout is drawn in gguf.py. gguf's own GGUFWriter wants each tensor whole, in memory or in a temporary file,
and guesses the types of numbers; here a tensor of any size passes through in chunks, a number has the GGUF type
of its NumPy type (so that metadata copied from another file stays as it is), and a file that is not finished
never has the name of one that is.

    with open_gguf("in.gguf") as file:
        tensors = [NewTensor(t.name, t.shape, t.type, lambda t=t: [t.raw]) for t in file.tensors.values()]
        write_gguf("out.gguf", copy_metadata(file), tensors)
"""

from __future__ import annotations

import io
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllava.errors import FileError
from tinyllava.files.gguf import DEFAULT_ALIGNMENT, GGUFFile
from tinyllava.files.metadata import ARRAY, NUMBERS, STRING, Cursor
from tinyllava.quant.blocks import TYPES

VERSION = 3
KINDS = {np.dtype(name): kind for kind, name in NUMBERS.items()}  # NumPy type -> value type of metadata
Progress = Callable[[int, int], None]  # bytes written, bytes of the whole file


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written. ``shape`` in NumPy's order, the slowest axis first; ``type`` a name of TYPES.

    ``chunks`` is called once, when it is the tensor's turn; the arrays it yields are its rows in order, as
    blocks (uint8) or, for a plain type, as numbers of that type. Together they are ``nbytes`` long.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    chunks: Callable[[], Iterable[npt.NDArray[Any]]]

    @property
    def nbytes(self) -> int:
        n_cols = self.shape[-1] if self.shape else 1
        return prod(self.shape[:-1]) * TYPES[self.type].row_bytes(n_cols)


def write_gguf(
    path: str | Path,
    metadata: Mapping[str, Any],
    tensors: Sequence[NewTensor],
    progress: Progress | None = None,
) -> int:
    """Write a little-endian GGUF file of version 3 and return its size in bytes.

    ``metadata``: NumPy scalars keep their type; of Python's, bool is bool, float is f32, int is u32, or i32 if
    it is negative, or 64 bits if it must; str and bytes are strings; lists of those and NumPy arrays are arrays.
    Whatever goes wrong, Ctrl-C included, ``path`` is as it was before and nothing lies beside it. FileError if
    it cannot be written, as when the disk is full. ValueError if a tensor's chunks are not what it declares.
    """
    alignment = int(metadata.get("general.alignment", DEFAULT_ALIGNMENT))
    header = _header(metadata, tensors, alignment)
    total = len(header) + sum(_padded(tensor.nbytes, alignment) for tensor in tensors)
    with replacing(path, needs_bytes=total) as out:
        done = put(out, header, path)
        for tensor in tensors:
            end = done + tensor.nbytes
            for chunk in tensor.chunks():
                done += put(out, _as_bytes(tensor, chunk), path)
                if done > end:
                    break
                if progress is not None:
                    progress(done, total)
            if done != end:
                raise ValueError(f"{tensor.name}: {done - end + tensor.nbytes} bytes; declared {tensor.nbytes}")
            done += put(out, bytes(_padded(tensor.nbytes, alignment) - tensor.nbytes), path)
    if progress is not None:
        progress(total, total)
    return total


@contextmanager
def replacing(path: str | Path, needs_bytes: int = 0) -> Iterator[io.FileIO]:
    """A new file that takes the name ``path`` at the end of the block, or is gone if the block fails.

    It lies beside ``path``, on the same disk, because only there renaming is one step. It has no buffer of its
    own, which could still fail when the file is closed: give it large pieces, through :func:`put`.
    """
    path = Path(os.path.realpath(path))  # a link stays one, and the file it points to is replaced
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    out = _create(path, beside, needs_bytes)
    try:
        with out:
            yield out
        try:
            os.replace(beside, path)
        except OSError as error:
            raise _unwritable(path, error) from None
    finally:  # Ctrl-C comes this way, too; after the renaming there is nothing to remove
        with suppress(OSError):
            beside.unlink()


def _create(path: Path, beside: Path, needs_bytes: int) -> io.FileIO:
    """The empty file beside ``path``. FileError if ``path`` is none to write to, or the disk too small."""
    if path.exists() and not path.is_file():
        raise FileError(path, "a directory" if path.is_dir() else "a device", wanted="the name of a file to write")
    try:
        free = shutil.disk_usage(path.parent).free
        if free < needs_bytes:
            found = f"{needs_bytes / 2**20:.1f} MiB to write, but the disk has {free / 2**20:.1f} MiB left"
            raise FileError(path, found, hint="Free some space, or write to another disk")
        return io.FileIO(beside, "xb")
    except FileNotFoundError:
        raise FileError(path, "there is no such directory to write to", hint="Make it first") from None
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: str | Path, error: OSError) -> FileError:
    hint = "Check that the disk has room for it and that you may write there"
    return FileError(path, f"cannot be written: {error.strerror or error}", hint=hint)


def put(out: io.FileIO, data: bytes | memoryview, path: str | Path) -> int:
    """Write all of it; its length. FileError about ``path``, which is what the user knows, if that fails."""
    rest = memoryview(data)
    try:
        while len(rest):
            rest = rest[out.write(rest) or 0 :]  # a disk that fills up takes a part first
    except OSError as error:
        raise _unwritable(path, error) from None
    return len(data)


def _as_bytes(tensor: NewTensor, chunk: npt.NDArray[Any]) -> memoryview:
    """A chunk as flat bytes. ValueError if its numbers are not of the tensor's type."""
    kind = TYPES[tensor.type]
    plain = kind.dtype["x"] if kind.is_scalar else None
    if chunk.dtype != np.uint8 and chunk.dtype != plain:
        raise ValueError(f"{tensor.name}: a chunk of {chunk.dtype}, but the tensor is declared {tensor.type}")
    return np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data


def _padded(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment


# ---- the header


def _header(metadata: Mapping[str, Any], tensors: Sequence[NewTensor], alignment: int) -> bytes:
    """Everything before the tensors' data, padding included."""
    parts = [b"GGUF", struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        kind, data = encode(value, key)
        parts += [_string(key), struct.pack("<I", kind), data]
    offset = 0  # from the start of the data
    for tensor in tensors:
        parts += [_string(tensor.name), _tensor_info(tensor, offset)]
        offset += _padded(tensor.nbytes, alignment)
    header = b"".join(parts)
    return header.ljust(_padded(len(header), alignment), b"\0")


def _tensor_info(tensor: NewTensor, offset: int) -> bytes:
    n_dims = len(tensor.shape)  # GGUF counts dimensions from the fastest-varying one
    return struct.pack(f"<I{n_dims}QIQ", n_dims, *reversed(tensor.shape), TYPES[tensor.type].id, offset)


def _string(text: str | bytes) -> bytes:
    data = text if isinstance(text, bytes) else text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def encode(value: Any, key: str = "") -> tuple[int, bytes]:
    """A metadata value as GGUF's value type and bytes. TypeError for what GGUF cannot hold.

    >>> encode(np.uint16(258))
    (2, b'\\x02\\x01')
    """
    if isinstance(value, str | bytes):
        return STRING, _string(value)
    if isinstance(value, np.ndarray) and value.ndim == 1:
        return ARRAY, struct.pack("<IQ", _kind(value.dtype, key), len(value)) + _numbers(value)
    if isinstance(value, list | tuple):
        return ARRAY, _array(value, key)
    number = np.asarray(value if isinstance(value, np.generic) else _typed(value, key))
    return _kind(number.dtype, key), _numbers(number)


def _numbers(values: npt.NDArray[Any]) -> bytes:
    return values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()


def _array(values: Sequence[Any], key: str) -> bytes:
    """Elements of one type: numbers of the first one's. An empty list is one of strings."""
    if values and isinstance(values[0], bool | int | float):
        kinds = [type(_typed(v, key)) for v in values]
        widest = max(kinds, key=lambda kind: (kind is np.float32, np.dtype(kind).itemsize, kind is np.int32))
        return encode(np.array(values, widest), key)[1]
    encoded = [encode(v, key) for v in values]
    kind = encoded[0][0] if encoded else STRING
    if any(k != kind for k, _ in encoded):
        raise TypeError(f"metadata key {key!r}: an array of different types")
    return struct.pack("<IQ", kind, len(encoded)) + b"".join(data for _, data in encoded)


def _typed(value: Any, key: str) -> np.generic:
    """A Python number as the NumPy number that GGUF's writers usually make of it."""
    if isinstance(value, bool):
        return np.bool_(value)
    if isinstance(value, float):
        return np.float32(value)
    if not isinstance(value, int):
        raise TypeError(f"metadata key {key!r}: GGUF cannot hold {value!r}")
    if value < 0:
        return np.int32(value) if value >= -(1 << 31) else np.int64(value)
    return np.uint32(value) if value < 1 << 32 else np.uint64(value)


def _kind(dtype: np.dtype[Any], key: str) -> int:
    kind = KINDS.get(dtype.newbyteorder("="))
    if kind is None:
        raise TypeError(f"metadata key {key!r}: GGUF has no numbers of type {dtype}")
    return kind


# ---- metadata as it stands in another file


def copy_metadata(file: GGUFFile) -> dict[str, Any]:
    """The metadata of an open file with every number's type and every string's bytes kept, for write_gguf."""
    end = min((tensor.start for tensor in file.tensors.values()), default=file.size)
    cursor = _TypedCursor(file.path, file.bytes_at(0, end).tobytes(), file.byte_order, position=16)
    n_keys = cursor.count("metadata keys", at_least=8 + 4 + 1)
    return dict(cursor.key_value() for _ in range(n_keys))


class _TypedCursor(Cursor):
    """A cursor that gives numbers as NumPy scalars and strings as the bytes they are."""

    def value(self, kind: int, key: str, depth: int = 0) -> Any:
        value = super().value(kind, key, depth) if kind != STRING else self.text(key)
        return np.dtype(NUMBERS[kind]).type(value) if kind in NUMBERS else value

    def text(self, key: str) -> bytes:
        n = int(self.number("u8"))
        start = self.take(n, key)
        return bytes(self.data[start : start + n])

    def strings(self, n: int, key: str) -> list[Any]:
        return [self.text(key) for _ in range(n)]
