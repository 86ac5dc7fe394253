"""Every block format by name and by number, and :func:`dequantize`.

The formats themselves stand in plain.py (a number times a scale) and codebook.py (an index into a grid of
points); block_type.py says what a format is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllava.errors import FileError
from tinyllava.quant import codebook, plain
from tinyllava.quant.block_type import REGISTRY, BlockType

__all__ = ["TYPES", "BlockType", "by_id", "dequantize", "swap_bytes"]

# In order of their number; the modules named here filled the registry when they were imported.
TYPES: dict[str, BlockType] = dict(sorted(REGISTRY.items(), key=lambda item: item[1].id))
BY_ID: dict[int, BlockType] = {kind.id: kind for kind in TYPES.values()}
DECLARED_IN = (plain, codebook)

# Numbers that ggml.h once gave away and took back: name, and what replaces it.
REMOVED = {
    4: ("Q4_2", "Q4_0"), 5: ("Q4_3", "Q4_1"),
    31: ("Q4_0_4_4", "Q4_0"), 32: ("Q4_0_4_8", "Q4_0"), 33: ("Q4_0_8_8", "Q4_0"),
    36: ("IQ4_NL_4_4", "IQ4_NL"), 37: ("IQ4_NL_4_8", "IQ4_NL"), 38: ("IQ4_NL_8_8", "IQ4_NL"),
}  # fmt: skip

CHUNK = 1 << 16  # weights dequantized at a time: the temporaries (about 10 times 4 bytes each) stay in cache


def by_id(number: int, where: object = "block type") -> BlockType:
    """The format with this number in a GGUF file. FileError, speaking of ``where``, if there is none.

    >>> by_id(2).name
    'Q4_0'
    """
    kind = BY_ID.get(number)
    if kind is not None:
        return kind
    if number in REMOVED:
        name, successor = REMOVED[number]
        found = f"block type {number} is {name}, which GGUF has dropped"
        hint = f"Quantize the model again, as {successor}"
    else:
        found, hint = f"unknown block type {number}", "The file is damaged, or newer than this tinyllava"
    raise FileError(where, found, wanted="a type of today's ggml.h, such as F16 or Q4_K", hint=hint)


def dequantize(
    type_name: str, raw: npt.NDArray[np.uint8], dtype: npt.DTypeLike = np.float32
) -> npt.NDArray[Any]:
    """Weights (n_rows, n_cols) of little-endian blocks (n_rows, row_bytes).

    The float32 value is the weight, by definition of the formats, and equals that of gguf and ggml bit for
    bit; dtype=float64 holds the same values (formats of plain numbers convert directly, so F64 keeps all its
    digits). Works through the blocks in pieces of at most ``CHUNK`` weights, so that it needs little memory
    beyond its result. ValueError if ``row_bytes`` is not a whole number of blocks, FileError for a format
    that is never stored.
    """
    kind = TYPES[type_name]
    if kind.dequantize is None:
        raise FileError(type_name, "a format for ggml's intermediate results", wanted="a format for weights")
    n_rows, row_bytes = raw.shape
    if row_bytes % kind.nbytes:
        raise ValueError(f"{type_name}: rows of {row_bytes} bytes, but a block has {kind.nbytes}")
    blocks = np.ascontiguousarray(raw).reshape(-1).view(kind.dtype)  # (n_blocks,)
    weights = np.empty((len(blocks), kind.block_size), dtype)
    step = max(1, CHUNK // kind.block_size)
    # Damaged files hold infinities and NaN, and products with them are no news: gguf gives the same ones.
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(blocks), step):
            weights[start : start + step] = kind.dequantize(blocks[start : start + step])
    return weights.reshape(n_rows, row_bytes // kind.nbytes * kind.block_size)  # (n_rows, n_cols)


def swap_bytes(kind: BlockType, raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """A copy of blocks in which every number of more than one byte, as declared, has its bytes reversed."""
    return raw.reshape(-1).view(kind.dtype).byteswap().view(np.uint8).reshape(raw.shape)
