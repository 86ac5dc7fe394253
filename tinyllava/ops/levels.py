"""Block formats as the kernels see them: unsigned bytes q, and for each 16 or 32 of them a scale and a minimum.

``levels_*(raw, q, table, at)`` takes one row of blocks (bytes) apart: q gets a byte for each weight, and
table[b, at], table[b, at + 16], ... the numbers of the b-th 32 weights, so that

    "offset"   w = d * (q - c)    with a constant c               table: d for each group
    "minimum"  w = d * q + m                                      table: d for each group, then m for each

A group is 32 weights, or 16 (two groups). The reference of each is the format's dequantizer in quant/plain.py,
which also tells where the layouts come from. FORMATS says which is which.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tinyllava.ops.instructions import half_to_float
from tinyllava.ops.team import kernel

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


class Format(NamedTuple):
    """How a block format is multiplied."""

    number: int  # what levels_row knows it by
    sums: str  # "offset", "minimum" or "" (floats of 16 bits)
    groups: int  # scales for each 32 weights
    offset: int  # c


FORMATS = {
    "F16": Format(0, "", 1, 0),
    "BF16": Format(1, "", 1, 0),
    "Q4_0": Format(2, "offset", 1, 8),
    "Q4_1": Format(3, "minimum", 1, 0),
    "Q5_0": Format(4, "offset", 1, 16),
    "Q5_1": Format(5, "minimum", 1, 0),
    "Q8_0": Format(6, "offset", 1, 128),
    "Q2_K": Format(7, "minimum", 2, 0),
    "Q3_K": Format(8, "offset", 2, 4),
    "Q4_K": Format(9, "minimum", 1, 0),
    "Q5_K": Format(10, "minimum", 1, 0),
    "Q6_K": Format(11, "offset", 2, 32),
}


@kernel
def half_of(raw: Bytes, i: int) -> float:
    """The half-precision number stored at byte i, little-endian."""
    return half_to_float(np.uint16(raw[i] | (raw[i + 1] << 8)))


# ---- blocks of 32 with one scale; low nibbles are weights 0..15, high nibbles 16..31


@kernel
def levels_q4_0(raw: Bytes, q: Bytes, table: Floats, at: int) -> None:
    for b in range(table.shape[0]):
        start, to = 18 * b, 32 * b
        table[b, at] = half_of(raw, start)
        for i in range(16):
            q[to + i] = raw[start + 2 + i] & 15
            q[to + 16 + i] = raw[start + 2 + i] >> 4


@kernel
def levels_q4_1(raw: Bytes, q: Bytes, table: Floats, at: int) -> None:
    for b in range(table.shape[0]):
        start, to = 20 * b, 32 * b
        table[b, at] = half_of(raw, start)
        table[b, at + 16] = half_of(raw, start + 2)
        for i in range(16):
            q[to + i] = raw[start + 4 + i] & 15
            q[to + 16 + i] = raw[start + 4 + i] >> 4


@kernel
def fifth_bits_of(raw: Bytes, start: int, q: Bytes, to: int) -> None:
    """Add 16 to q[to + i] where bit i of the 32-bit word at start is set."""
    word = np.uint32(raw[start]) | np.uint32(raw[start + 1]) << 8 | np.uint32(raw[start + 2]) << 16
    word |= np.uint32(raw[start + 3]) << 24
    for i in range(32):
        q[to + i] |= np.uint8((np.uint32(word) >> np.uint32(i)) & np.uint32(1)) << 4


@kernel
def levels_q5_0(raw: Bytes, q: Bytes, table: Floats, at: int) -> None:
    for b in range(table.shape[0]):
        start, to = 22 * b, 32 * b
        table[b, at] = half_of(raw, start)
        for i in range(16):
            q[to + i] = raw[start + 6 + i] & 15
            q[to + 16 + i] = raw[start + 6 + i] >> 4
        fifth_bits_of(raw, start + 2, q, to)


@kernel
def levels_q5_1(raw: Bytes, q: Bytes, table: Floats, at: int) -> None:
    for b in range(table.shape[0]):
        start, to = 24 * b, 32 * b
        table[b, at] = half_of(raw, start)
        table[b, at + 16] = half_of(raw, start + 2)
        for i in range(16):
            q[to + i] = raw[start + 8 + i] & 15
            q[to + 16 + i] = raw[start + 8 + i] >> 4
        fifth_bits_of(raw, start + 4, q, to)


@kernel
def levels_q8_0(raw: Bytes, q: Bytes, table: Floats, at: int) -> None:
    for b in range(table.shape[0]):
        table[b, at] = half_of(raw, 34 * b)
        for i in range(32):
            q[32 * b + i] = raw[34 * b + 2 + i] ^ 128  # signed -> unsigned


# ---- super-blocks of 256 with quantized scales (the K formats)


@kernel
def levels_q2_k(raw: Bytes, q: Bytes, table: Floats, at: int) -> None:
    for b in range(table.shape[0] // 8):
        start, to = 84 * b, 256 * b
        d, dmin = half_of(raw, start + 80), half_of(raw, start + 82)
        for group in range(16):
            scale, row = raw[start + group], 8 * b + group // 2
            table[row, at + 16 * (group % 2)] = d * np.float32(scale & 15)
            table[row, at + 32 + 16 * (group % 2)] = -dmin * np.float32(scale >> 4)
        for part in range(8):  # of 32: which half's bytes, which bits of them
            for i in range(32):
                q[to + 32 * part + i] = (raw[start + 16 + 32 * (part // 4) + i] >> (2 * (part % 4))) & 3


@kernel
def levels_q3_k(raw: Bytes, q: Bytes, table: Floats, at: int) -> None:
    for b in range(table.shape[0] // 8):
        start, to = 110 * b, 256 * b
        d = half_of(raw, start + 108)
        for group in range(16):
            low = (raw[start + 96 + group % 8] >> (4 * (group // 8))) & 15  # 6-bit scales: four low bits here,
            high = (raw[start + 104 + group % 4] >> (2 * (group // 4))) & 3  # two high bits there
            scale = np.float32(np.int32(low | (high << 4)) - 32)
            table[8 * b + group // 2, at + 16 * (group % 2)] = d * scale
        for part in range(8):
            for i in range(32):
                low = (raw[start + 32 + 32 * (part // 4) + i] >> (2 * (part % 4))) & 3
                q[to + 32 * part + i] = low | ((raw[start + i] >> part) & 1) << 2


@kernel
def scales_of(raw: Bytes, start: int, table: Floats, b: int, at: int) -> None:
    """The scales and minima of Q4_K and Q5_K: eight pairs of 6 bits, packed in the 12 bytes after d and dmin."""
    d, dmin = half_of(raw, start), half_of(raw, start + 2)
    for j in range(4):
        a, c, rest = raw[start + 4 + j], raw[start + 8 + j], raw[start + 12 + j]
        table[8 * b + j, at] = d * np.float32(a & 63)
        table[8 * b + j, at + 16] = -dmin * np.float32(c & 63)
        table[8 * b + 4 + j, at] = d * np.float32(rest & 15 | (a >> 6) << 4)
        table[8 * b + 4 + j, at + 16] = -dmin * np.float32(rest >> 4 | (c >> 6) << 4)


@kernel
def levels_q4_k(raw: Bytes, q: Bytes, table: Floats, at: int) -> None:
    for b in range(table.shape[0] // 8):
        start, to = 144 * b, 256 * b
        scales_of(raw, start, table, b, at)
        for j in range(4):
            for i in range(32):
                q[to + 64 * j + i] = raw[start + 16 + 32 * j + i] & 15
                q[to + 64 * j + 32 + i] = raw[start + 16 + 32 * j + i] >> 4


@kernel
def levels_q5_k(raw: Bytes, q: Bytes, table: Floats, at: int) -> None:
    for b in range(table.shape[0] // 8):
        start, to = 176 * b, 256 * b
        scales_of(raw, start, table, b, at)
        for j in range(4):
            for i in range(32):
                byte, high = raw[start + 48 + 32 * j + i], raw[start + 16 + i] >> (2 * j)
                q[to + 64 * j + i] = byte & 15 | (high & 1) << 4
                q[to + 64 * j + 32 + i] = byte >> 4 | (high & 2) << 3


@kernel
def levels_q6_k(raw: Bytes, q: Bytes, table: Floats, at: int) -> None:
    for b in range(table.shape[0] // 8):
        start, to = 210 * b, 256 * b
        d = half_of(raw, start + 208)
        for group in range(16):
            scale = np.float32(np.int8(raw[start + 192 + group]))
            table[8 * b + group // 2, at + 16 * (group % 2)] = d * scale
        for part in range(8):  # of 32: half, then which two bits on top
            half, pair = part // 4, part % 4
            for i in range(32):
                low = (raw[start + 64 * half + 32 * (pair % 2) + i] >> (4 * (pair // 2))) & 15
                high = (raw[start + 128 + 32 * half + i] >> (2 * pair)) & 3
                q[to + 32 * part + i] = low | high << 4


@kernel
def levels_row(number: int, raw: Bytes, q: Bytes, table: Floats, at: int) -> None:
    """One row of the format whose Format.number is ``number``."""
    if number == 2:
        levels_q4_0(raw, q, table, at)
    elif number == 3:
        levels_q4_1(raw, q, table, at)
    elif number == 4:
        levels_q5_0(raw, q, table, at)
    elif number == 5:
        levels_q5_1(raw, q, table, at)
    elif number == 6:
        levels_q8_0(raw, q, table, at)
    elif number == 7:
        levels_q2_k(raw, q, table, at)
    elif number == 8:
        levels_q3_k(raw, q, table, at)
    elif number == 9:
        levels_q4_k(raw, q, table, at)
    elif number == 10:
        levels_q5_k(raw, q, table, at)
    else:
        levels_q6_k(raw, q, table, at)
