"""Block formats unpacked in vector registers: one row of FORMATS each, all that the CPU needs for a new one.

A group of 32 weights (of 16 in Q2_K, Q3_K and Q6_K) are small unsigned integers q with a common scale d:

    "offset"   w = d * (q - c)    with a constant c of the format
    "minimum"  w = d * q + m      with a minimum m for each group
    "float"    w                  floating-point numbers of 16 or 32 bits

d and m are multiplied out here: of Q4_K, whose file has w = (d * s) * q - dmin * m, they are d * s and -dmin * m.

A row's functions take the addresses of blocks and return vectors:

    unpack(a, b)      blocks of 32: the q of the block at a, then of the one at b, as 64 bytes
    unpack(block, j)  super-blocks of 256: the q of its weights 64 j ... 64 j + 63
    scales(block)     the scales of 256 weights: | 8 d | 8 m |, | 8 d | the same 8 d |, or 16 d
    minima(block)     only where there are 16 of them: 16 m

The fields of a block are declared in quant/plain.py, and so is the formula that defines its weights. For one token
the vectors are multiplied as they come (gemv.py); for a prompt they are written to memory, and packed
(pack_weights.py). ops/quantized.py, the definition, has a branch for each format.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tinyllava.ops.cpu.compile import kernel, placeholder, specialize
from tinyllava.ops.cpu.simd import intrinsics as simd
from tinyllava.ops.cpu.simd import lanes
from tinyllava.quant.blocks import TYPES, BlockType

SUPER_MINIMA = 1024  # bytes from the 16 scales of a row to its 16 minima, in memory: 16 rows' scales lie between

# Placeholders (compile.specialize): bytes of a block, and where its fields begin in it; a format's functions.
BYTES = D = M = DMIN = QS = QL = QH = HMASK = SCALES = 0
UNPACK = SCALES_OF = MINIMA_OF = placeholder
HAS_MINIMA = False  # apart from what ``scales`` returns


@dataclass(frozen=True)
class Format:
    """How a block format is multiplied."""

    block: BlockType
    kind: Literal["offset", "minimum", "float"]
    c: int = 0
    scales_per_32: int = 1
    unpack: Any = None
    scales: Any = None
    minima: Any = None
    unpack_to_memory: Any = None  # unpack_row or unpack_super_block

    @property
    def has_super_blocks(self) -> bool:
        """Whether its blocks are of 256 weights, with a scale for each group of 16 or 32."""
        return self.block.block_size == 256

    def specialize(self, function: Callable[..., Any], **names: Any) -> Any:
        """A function's copy for this format, in which the fields' names are their offsets."""
        fields = {field.upper(): self.block.offset(field) for field, *_ in self.block.fields}
        fields |= {"BYTES": self.block.nbytes, "BYTES_256": self.block.nbytes * 256 // self.block.block_size}
        return specialize(function, f"{function.__name__}_{self.block.name.lower()}", **{**fields, **names})


# ---- blocks of 32, two at a time. Low nibbles are weights 0..15, high nibbles 16..31


def unpack_4_bits(a: int, b: int) -> Any:
    """Nibbles."""
    return simd.bits_4x16(simd.load_2x16_twice(a + QS, b + QS), 0, 4, 15)


def unpack_5_bits(a: int, b: int) -> Any:
    """Nibbles, and the fifth bits of all 32 in one 32-bit number."""
    return simd.bits_4x16(simd.load_2x16_twice(a + QS, b + QS), 0, 4, 15) | simd.fifth_bits(a + QH, b + QH)


def unpack_8_bits(a: int, b: int) -> Any:
    """Signed bytes; with 128 added they are unsigned."""
    return simd.add_128(simd.load_2x32(a + QS, b + QS))


def scales_d(block: int) -> Any:
    """The scales of 8 blocks, twice: lanes 8 to 15 are multiplied by sums of x that hold the factor -c."""
    return lanes.load_8_f16(block + D, BYTES)


def scales_d_m(block: int) -> Any:
    """The scales and the minima of 8 blocks."""
    return lanes.lower_upper(lanes.load_8_f16(block + D, BYTES), lanes.load_8_f16(block + M, BYTES))


def unpack_row(row: int, n_blocks: int, q: int, scales: int, stride: int) -> None:
    """A row written to memory: 32 bytes of q a block, and every ``stride`` bytes its d, with its m 64 bytes on.

    Blocks are unpacked in pairs, an odd last one with itself, so q needs the space of one block more.
    """
    for b in range(0, n_blocks, 2):
        first = row + BYTES * b
        second = first + BYTES if b + 1 < n_blocks else first
        simd.store_i8x64(q + 32 * b, UNPACK(first, second))
    for b in range(n_blocks):
        simd.store_f32(scales + stride * b, simd.load_f16(row + BYTES * b + D))
    if HAS_MINIMA:
        for b in range(n_blocks):
            simd.store_f32(scales + stride * b + 64, simd.load_f16(row + BYTES * b + M))


def unpack_super_block(block: int, q: int, scales: int) -> None:
    """A super-block written to memory: 256 q, what ``scales`` returns, and 16 minima SUPER_MINIMA bytes on."""
    for j in range(4):
        simd.store_i8x64(q + 64 * j, UNPACK(block, j))
    simd.store_f32x16(scales, SCALES_OF(block))
    if HAS_MINIMA:
        simd.store_f32x16(scales + SUPER_MINIMA, MINIMA_OF(block))


# ---- the j-th 64 weights of a super-block of 256. A number's bits are spread over fields, in planes: the same
#      byte holds bits of weights that are 32 (or 64) apart


def unpack_q2_k(block: int, j: int) -> Any:
    """Four planes of two bits over 32 bytes."""
    low = block + QS + 32 * (j // 2)
    return simd.bits_2x32(simd.load_2x32(low, low), 4 * (j % 2), 4 * (j % 2) + 2, 3)


def unpack_q3_k(block: int, j: int) -> Any:
    """The same, and eight planes of the third bit over 32 bytes."""
    low, high = block + QS + 32 * (j // 2), block + HMASK
    pairs = simd.bits_2x32(simd.load_2x32(low, low), 4 * (j % 2), 4 * (j % 2) + 2, 3)
    return simd.or_shifted(pairs, simd.bits_2x32(simd.load_2x32(high, high), 2 * j, 2 * j + 1, 1), 2)


def unpack_q4_k(block: int, j: int) -> Any:
    """Two planes of nibbles over 32 bytes."""
    low = block + QS + 32 * j
    return simd.bits_2x32(simd.load_2x32(low, low), 0, 4, 15)


def unpack_q5_k(block: int, j: int) -> Any:
    """The same, and eight planes of the fifth bit over 32 bytes."""
    low, high = block + QS + 32 * j, block + QH
    nibbles = simd.bits_2x32(simd.load_2x32(low, low), 0, 4, 15)
    return simd.or_shifted(nibbles, simd.bits_2x32(simd.load_2x32(high, high), 2 * j, 2 * j + 1, 1), 4)


def unpack_q6_k(block: int, j: int) -> Any:
    """For each 128 weights, two planes of nibbles over 64 bytes, and four of the upper two bits over 32 bytes."""
    low, high, shift = block + QL + 64 * (j // 2), block + QH + 32 * (j // 2), 4 * (j % 2)
    nibbles = simd.bits_2x32(simd.load_i8x64(low), shift, shift, 15)
    return simd.or_shifted(nibbles, simd.bits_2x32(simd.load_2x32(high, high), shift, shift + 2, 3), 4)


def scales_k(block: int) -> Any:
    """| 8 d | 8 m | of Q4_K and Q5_K: 16 numbers of 6 bits in 12 bytes (k_scales in quant/plain.py)."""
    at = block + SCALES
    a, c, rest = simd.load_u32(at), simd.load_u32(at + 4), simd.load_u32(at + 8)
    s_4567 = rest & 0x0F0F0F0F | a >> 2 & 0x30303030
    m_4567 = rest >> 4 & 0x0F0F0F0F | c >> 2 & 0x30303030
    numbers = lanes.bytes_to_f32(a & 0x3F3F3F3F, s_4567, c & 0x3F3F3F3F, m_4567)
    return numbers * lanes.load_d_minus_dmin(block + D)


def scales_q6_k(block: int) -> Any:
    """16 signed bytes times d."""
    d = simd.load_f16(block + D)
    return lanes.load_16_i8(block + SCALES) * lanes.two_values(d, d)


def scales_q3_k(block: int) -> Any:
    """16 numbers of 6 bits, less 32: the lower 4 are the nibbles of 8 bytes, the upper 2 the bit pairs of 4."""
    at = block + SCALES
    a, c, rest = simd.load_u32(at), simd.load_u32(at + 4), simd.load_u32(at + 8)
    w0 = a & 0x0F0F0F0F | rest << 4 & 0x30303030
    w1 = c & 0x0F0F0F0F | rest << 2 & 0x30303030
    w2 = a >> 4 & 0x0F0F0F0F | rest & 0x30303030
    w3 = c >> 4 & 0x0F0F0F0F | rest >> 2 & 0x30303030
    d = simd.load_f16(block + D)
    less = np.float32(-32.0) * d
    return simd.fma(lanes.bytes_to_f32(w0, w1, w2, w3), lanes.two_values(d, d), lanes.two_values(less, less))


def scales_q2_k(block: int) -> Any:
    """The low nibbles of 16 bytes, times d."""
    at, mask, d = block + SCALES, 0x0F0F0F0F, simd.load_f16(block + D)
    a, b, c, e = simd.load_u32(at), simd.load_u32(at + 4), simd.load_u32(at + 8), simd.load_u32(at + 12)
    return lanes.bytes_to_f32(a & mask, b & mask, c & mask, e & mask) * lanes.two_values(d, d)


def minima_q2_k(block: int) -> Any:
    """The high nibbles, times -dmin."""
    at, mask, m = block + SCALES, 0x0F0F0F0F, -simd.load_f16(block + DMIN)
    a, b, c, e = simd.load_u32(at), simd.load_u32(at + 4), simd.load_u32(at + 8), simd.load_u32(at + 12)
    return lanes.bytes_to_f32(a >> 4 & mask, b >> 4 & mask, c >> 4 & mask, e >> 4 & mask) * lanes.two_values(m, m)


# ---- the table

# How floating-point weights are loaded as float32: 16 of them, or one.
FLOAT_LOADS = {
    "F32": (simd.load_f32x16, simd.load_f32),
    "F16": (simd.load_f16x16, simd.load_f16),
    "BF16": (simd.load_bf16x16, simd.load_bf16),
}


def _format(
    name: str, unpack: Any, scales: Any, minima: Any = None, *, c: int | None = None, scales_per_32: int = 1
) -> Format:
    """A row: with a constant c it is "offset", else "minimum"."""
    bare = Format(TYPES[name], "minimum" if c is None else "offset", c or 0, scales_per_32)
    functions = [f and kernel(bare.specialize(f)) for f in (unpack, scales, minima)]
    names = dict(zip(("UNPACK", "SCALES_OF", "MINIMA_OF"), functions, strict=True))
    to_memory: Any = unpack_super_block if bare.has_super_blocks else unpack_row
    has_minima = minima is not None if bare.has_super_blocks else c is None
    functions.append(kernel(bare.specialize(to_memory, **names, HAS_MINIMA=has_minima)))
    return Format(bare.block, bare.kind, bare.c, scales_per_32, *functions)


_ROWS = (
    Format(TYPES["F32"], "float"),
    Format(TYPES["F16"], "float"),
    Format(TYPES["BF16"], "float"),
    _format("Q4_0", unpack_4_bits, scales_d, c=8),
    _format("Q4_1", unpack_4_bits, scales_d_m),
    _format("Q5_0", unpack_5_bits, scales_d, c=16),
    _format("Q5_1", unpack_5_bits, scales_d_m),
    _format("Q8_0", unpack_8_bits, scales_d, c=128),
    _format("Q2_K", unpack_q2_k, scales_q2_k, minima_q2_k, scales_per_32=2),
    _format("Q3_K", unpack_q3_k, scales_q3_k, c=4, scales_per_32=2),
    _format("Q4_K", unpack_q4_k, scales_k),
    _format("Q5_K", unpack_q5_k, scales_k),
    _format("Q6_K", unpack_q6_k, scales_q6_k, c=32, scales_per_32=2),
)
FORMATS = {row.block.name: row for row in _ROWS}
