"""What a block format is: a declaration of bytes, and a formula that turns them into weights.

GGUF stores a weight matrix row by row, and each row as blocks: a block is a fixed number of weights
(``size``) in a fixed number of bytes (``nbytes``), laid out as named fields. A format is declared once,
as data, directly above its formula:

    @block("Q8_0", id=8, size=32, nbytes=34, fields=[("d", "<f2"), ("qs", "i1", 32)])
    def q8_0(b: Blocks) -> Weights:
        return b["qs"].astype(np.float32) * scale(b["d"])

``b`` is a NumPy structured array of blocks, so ``b["d"]`` is (n_blocks,) and ``b["qs"]`` (n_blocks, 32).
Everything else follows from the declaration: the bounds checks of the GGUF reader, the swapping of
big-endian files, the field offsets that the fast kernels use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Blocks = npt.NDArray[np.void]  # (n_blocks,) structured: one record a block
Weights = npt.NDArray[Any]  # (n_blocks, size), float32 unless the format stores plain numbers
Field = tuple[str, str] | tuple[str, str, int]  # (name, NumPy type, count if it is an array)
Formula = Callable[[Blocks], Weights]

REGISTRY: dict[str, BlockType] = {}  # filled by block(), in order of declaration


@dataclass(frozen=True)
class BlockType:
    """One format of GGUF weights.

    ``id`` is the number that stands in the file (``enum ggml_type`` in ggml.h), ``block_size`` the weights
    and ``nbytes`` the bytes of one block. ``fields`` lie one after another without padding, multi-byte
    numbers little-endian. ``dequantize`` maps (n_blocks,) records to (n_blocks, block_size) weights; None
    for the formats that ggml uses only inside its own products and never stores.
    """

    name: str
    id: int
    block_size: int
    nbytes: int
    fields: tuple[Field, ...]
    dequantize: Formula | None

    @cached_property
    def dtype(self) -> np.dtype[np.void]:
        """The declaration as a packed NumPy record type; ``itemsize == nbytes``."""
        return np.dtype(list(self.fields))

    def offset(self, field: str) -> int:
        """Where ``field`` starts, in bytes from the start of a block: 4 for ``qs`` of Q4_1."""
        assert self.dtype.fields is not None  # a record type always has some
        return int(self.dtype.fields[field][1])

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.block_size

    @property
    def is_scalar(self) -> bool:
        """Whether a block is one plain number (F32, F16, I8, ...): nothing is packed."""
        return self.block_size == 1

    def row_bytes(self, n_cols: int) -> int:
        """Bytes of a row of ``n_cols`` weights. ValueError unless it is a whole number of blocks."""
        n_blocks, rest = divmod(n_cols, self.block_size)
        if rest:
            raise ValueError(f"{self.name}: a row of {n_cols} weights is no multiple of {self.block_size}")
        return n_blocks * self.nbytes


def declare(
    name: str, *, id: int, size: int, nbytes: int, fields: Sequence[Field], formula: Formula | None = None
) -> BlockType:
    """Add a format to the registry. Its fields must fill ``nbytes`` exactly: checked at import."""
    kind = BlockType(name, id, size, nbytes, tuple(fields), formula)
    if kind.dtype.itemsize != nbytes or name in REGISTRY or any(t.id == id for t in REGISTRY.values()):
        raise TypeError(f"{name}: {kind.dtype.itemsize} bytes of fields, {nbytes} declared; or named twice")
    REGISTRY[name] = kind
    return kind


def block(
    name: str, *, id: int, size: int, nbytes: int, fields: Sequence[Field]
) -> Callable[[Formula], Formula]:
    """:func:`declare`, as the decorator of the format's formula."""

    def register(formula: Formula) -> Formula:
        declare(name, id=id, size=size, nbytes=nbytes, fields=fields, formula=formula)
        return formula

    return register


def scale(d: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """A float16 field (n_blocks,) as a float32 column (n_blocks, 1) that broadcasts over the weights."""
    return d.astype(np.float32)[:, None]  # (n_blocks, 1)


def planes(packed: npt.NDArray[Any], group: int, bits: int, count: int | None = None) -> npt.NDArray[Any]:
    """Unpack small unsigned numbers of ``bits`` bits: (n_blocks, n) words to (n_blocks, n * count).

    ggml packs in groups: ``group`` neighbouring words hold ``count`` planes of ``group`` numbers, plane 0 in
    the lowest bits of every word, plane 1 in the next, and the planes follow one another in the output. With
    group=16, bits=4 that is Q4_0: 16 low nibbles, then 16 high nibbles. With group=1 each word's numbers stay
    neighbours: group=1, bits=1 spreads a byte to its 8 bits, lowest first.

    ``count`` defaults to all that fit in a word.
    """
    word = packed.dtype.type
    count = packed.dtype.itemsize * 8 // bits if count is None else count
    shifts = np.arange(count, dtype=word)[:, None] * word(bits)  # (count, 1)
    groups = packed.reshape(len(packed), -1, 1, group)  # (n_blocks, n // group, 1, group)
    mask = word((1 << bits) - 1)
    numbers: npt.NDArray[Any] = groups >> shifts & mask  # (n_blocks, n // group, count, group)
    return numbers.reshape(len(packed), -1)  # (n_blocks, n * count)

