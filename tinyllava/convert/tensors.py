"""One array of a checkpoint on its way into a GGUF file: row by row, never whole in memory.

A 7B model's arrays have up to 32,000 rows of 4,096 numbers. A chunk of them is read from the mapped shard, put in
order, converted and written; then the shard's pages are handed back, since the system counts what a process has
mapped and touched as its memory.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllava.convert.requantize import n_cores, ordered_map, quantize_rows
from tinyllava.errors import ModelError
from tinyllava.files.gguf_write import NewTensor
from tinyllava.files.stored import StoredArray
from tinyllava.quant.blocks import TYPES

FLOATS = ("F32", "F16", "BF16", "F64")
CHUNK = 1 << 20  # weights converted and written at a time: 4 MiB as float32
MAX_THREADS = 16  # each has a few chunks in memory
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Source:
    """An array to be converted: GGUF's name for it, where it lies, and in which order its rows are to stand."""

    name: str
    stored: StoredArray
    n_head: int = 0  # heads whose rows are reordered for RoPE; 0: rows stay as they are

    @property
    def shape(self) -> tuple[int, ...]:
        """Without axes of length 1, as the original scripts write 1x1 convolutions and class_embedding."""
        shape = self.stored.shape
        return tuple(n for n in shape if n != 1) if len(shape) > 1 else shape

    @property
    def is_matrix(self) -> bool:
        """Whether it may be stored in a type other than F32."""
        return len(self.shape) > 1


def permuted_rows(n_rows: int, n_head: int) -> npt.NDArray[np.intp]:
    """Which row of the checkpoint stands at each row in GGUF's architecture "llama", for q and k.

    RoPE rotates features (0, d/2), (1, d/2 + 1), ... of a head of d in the checkpoint, and (0, 1), (2, 3), ...
    in GGUF (``permute`` in convert_legacy_llama.py).

    >>> permuted_rows(8, 2).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    rows = np.arange(n_rows).reshape(n_head, 2, -1)  # (head, half, feature)
    return rows.swapaxes(1, 2).reshape(-1)


def new_tensor(source: Source, type_name: str, legacy: bool = False) -> NewTensor:
    """The tensor to write. ``legacy``: Q8_0 as the old script rounds it.

    ModelError for an array of integers; when it is written, for numbers that the type cannot hold.
    """
    stored = source.stored
    if stored.dtype not in FLOATS:
        hint = "A checkpoint that was quantized for PyTorch cannot be converted: take the one it was made from"
        raise ModelError(stored.where, f"type {stored.dtype}", wanted=", ".join(FLOATS), hint=hint)
    if source.n_head and (stored.shape[0] % (2 * source.n_head) or len(stored.shape) > 2):
        raise ModelError(stored.where, f"shape {stored.shape}", wanted=f"rows for {source.n_head} heads")
    return NewTensor(source.name, source.shape, type_name, lambda: _chunks(source, type_name, legacy))


def one_vector(name: str, values: npt.NDArray[np.float32]) -> NewTensor:
    """A tensor that no checkpoint holds."""
    return NewTensor(name, values.shape, "F32", lambda: [values])


def _chunks(source: Source, type_name: str, legacy: bool) -> Iterator[Array]:
    """The rows in GGUF's order and type, CHUNK weights at a time; converted by several threads, given in order."""
    stored = source.stored
    if stored.dtype == type_name:
        yield from map(np.ascontiguousarray, stored_rows(source))
        return

    def write(rows: Array) -> Array:
        return convert_rows(stored.where, rows, stored.dtype, type_name, legacy)

    with ThreadPoolExecutor(min(n_cores(), MAX_THREADS)) as pool:
        yield from ordered_map(pool, write, stored_rows(source))


def stored_rows(source: Source) -> Iterator[Array]:
    """The rows as they are stored, in GGUF's order, CHUNK weights at a time; a vector is one row."""
    values = source.stored.read()
    n_cols = source.shape[-1] if source.is_matrix else values.size
    rows = values.reshape(-1, n_cols)  # (n_rows, n_cols)
    order = None
    if source.n_head:  # of a bias, each number is a row
        rows = values.reshape(len(values), -1)  # (n_rows, n_cols)
        order = permuted_rows(len(rows), source.n_head)
    step = max(1, CHUNK // max(n_cols, 1))
    for start in range(0, len(rows), step):
        yield rows[start : start + step] if order is None else rows[order[start : start + step]]
        release(values)


def convert_rows(where: str, rows: Array, from_type: str, to_type: str, legacy: bool = False) -> Array:
    """Rows from a checkpoint's type to GGUF's. ModelError, naming the array, for numbers that it cannot hold."""
    weights = as_float32(rows, from_type)
    if to_type == "F32":
        return weights
    if to_type == "Q8_0" and legacy and np.isfinite(weights).all():
        return legacy_q8_0(weights)
    return quantize_rows(where, to_type, weights)


def as_float32(rows: Array, dtype: str) -> npt.NDArray[np.float32]:
    """Stored numbers as float32; BF16 is the upper half of one."""
    if dtype == "BF16":
        return (rows.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return rows.astype(np.float32)


def legacy_q8_0(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Q8_0 as convert_legacy_llama.py rounds it: by division, ties to even.

    llama-quantize multiplies by 1/d and rounds ties away from zero, which moves one in some thousand weights by a
    step. This is the more exact of the two, and what the script's files hold.
    """
    x = rows.reshape(-1, 32)  # (n_blocks, 32)
    d = np.abs(x).max(axis=1) / np.float32(127)
    blocks = np.zeros(len(x), TYPES["Q8_0"].dtype)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        codes = np.round(x / d[:, None])
        codes[d == 0] = 0
        blocks["d"], blocks["qs"] = d, codes
    return blocks.view(np.uint8).reshape(len(rows), -1)  # (n_rows, row_bytes)


def release(values: Array) -> None:
    """Give the pages of a mapped array back to the system; they are read again if they are asked for."""
    base: Any = values
    while base is not None and not isinstance(base, mmap.mmap):
        base = base.obj if isinstance(base, memoryview) else getattr(base, "base", None)
    if base is not None and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)
