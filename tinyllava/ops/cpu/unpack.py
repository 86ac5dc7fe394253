"""Block formats taken apart in registers: unsigned bytes q, for each 16 or 32 of them a scale, perhaps a minimum.

    "offset"   w = d * (q - c)    with a constant c
    "minimum"  w = d * q + m      with an m for each group
    ""         16-bit floats

``pair_*`` gives the 64 numbers of two blocks of 32, ``quarter_*`` the j-th 64 of a super-block of 256. Decoding
multiplies them on the spot (numba_dot.py); for a prompt, ``levels_*`` writes a row of them, with its scales
(numba_linear.py). Reference of each: its dequantizer in quant/plain.py. The layouts are ggml-common.h's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tinyllava.ops.cpu.compile import kernel
from tinyllava.ops.cpu.simd.intrinsics import (
    bits_by_half,
    bits_by_quarter,
    either,
    fifth_bits,
    flip_sign,
    four_quarters,
    fused,
    half_at,
    join_bits,
    load_bytes,
    put_bytes,
    put_float,
    put_floats,
    times,
    two_halves,
    word_at,
)
from tinyllava.ops.cpu.simd.lanes import by_half, floats_of_bytes, floats_of_signed_bytes_at, two_halves_at

FIRST_SUPER = 7  # the first Format.number with super-blocks


class Format(NamedTuple):
    """How a block format is multiplied."""

    number: int  # what kernels know it by: its place in FORMATS
    sums: str  # "offset", "minimum" or ""
    groups: int  # scales for each 32 weights
    offset: int  # c

    @property
    def has_super_blocks(self) -> bool:
        """Whether its blocks are of 256, with a scale for each 16 or 32."""
        return self.number >= FIRST_SUPER


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


# ---- two blocks of 32, at addresses a and b. Low nibbles are weights 0..15, high nibbles 16..31


@kernel
def pair_q4_0(a: int, b: int) -> Any:
    """18 bytes: d, nibbles."""
    return bits_by_quarter(four_quarters(a + 2, b + 2), 0, 4, 15)


@kernel
def pair_q4_1(a: int, b: int) -> Any:
    """20 bytes: d, m, nibbles."""
    return bits_by_quarter(four_quarters(a + 4, b + 4), 0, 4, 15)


@kernel
def pair_q5_0(a: int, b: int) -> Any:
    """22 bytes: d, 32 fifth bits, nibbles."""
    return either(bits_by_quarter(four_quarters(a + 6, b + 6), 0, 4, 15), fifth_bits(a + 2, b + 2))


@kernel
def pair_q5_1(a: int, b: int) -> Any:
    """24 bytes: d, m, 32 fifth bits, nibbles."""
    return either(bits_by_quarter(four_quarters(a + 8, b + 8), 0, 4, 15), fifth_bits(a + 4, b + 4))


@kernel
def pair_q8_0(a: int, b: int) -> Any:
    """34 bytes: d, signed bytes; with 128 added they are unsigned."""
    return flip_sign(two_halves(a + 2, b + 2))


# ---- the j-th 64 of a super-block of 256: planes of bits over the same 32 bytes


@kernel
def quarter_q2_k(block: int, j: int) -> Any:
    """84 bytes: 16 scales (low nibble) and minima (high), 64 of bit pairs, d, dmin."""
    low = block + 16 + 32 * (j // 2)
    return bits_by_half(two_halves(low, low), 4 * (j % 2), 4 * (j % 2) + 2, 3)


@kernel
def quarter_q3_k(block: int, j: int) -> Any:
    """110 bytes: 32 of third bits, 64 of bit pairs, 12 of 6-bit scales, d."""
    low = block + 32 + 32 * (j // 2)
    pairs = bits_by_half(two_halves(low, low), 4 * (j % 2), 4 * (j % 2) + 2, 3)
    return join_bits(pairs, bits_by_half(two_halves(block, block), 2 * j, 2 * j + 1, 1), 2)


@kernel
def quarter_q4_k(block: int, j: int) -> Any:
    """144 bytes: d, dmin, 12 of scales and minima, 128 of nibbles."""
    low = block + 16 + 32 * j
    return bits_by_half(two_halves(low, low), 0, 4, 15)


@kernel
def quarter_q5_k(block: int, j: int) -> Any:
    """176 bytes: as Q4_K, with 32 of fifth bits before the nibbles."""
    low, high = block + 48 + 32 * j, block + 16
    nibbles = bits_by_half(two_halves(low, low), 0, 4, 15)
    return join_bits(nibbles, bits_by_half(two_halves(high, high), 2 * j, 2 * j + 1, 1), 4)


@kernel
def quarter_q6_k(block: int, j: int) -> Any:
    """210 bytes: 128 of lower nibbles, 64 of upper bit pairs, 16 scales, d; both halves of 128 weights alike."""
    low, high, shift = block + 64 * (j // 2), block + 128 + 32 * (j // 2), 4 * (j % 2)
    nibbles = bits_by_half(load_bytes(low), shift, shift, 15)
    return join_bits(nibbles, bits_by_half(two_halves(high, high), shift, shift + 2, 3), 4)


# ---- their scales


@kernel
def scales_q4_k(block: int) -> Any:
    """| 8 scales | 8 minima | of Q4_K and Q5_K: eight pairs of 6 bits in 12 bytes, four at a time."""
    a, c, rest = word_at(block + 4), word_at(block + 8), word_at(block + 12)
    upper = rest & 0x0F0F0F0F | a >> 2 & 0x30303030
    lower = rest >> 4 & 0x0F0F0F0F | c >> 2 & 0x30303030
    numbers = floats_of_bytes(a & 0x3F3F3F3F, upper, c & 0x3F3F3F3F, lower)
    return times(numbers, two_halves_at(block))


@kernel
def scales_q6_k(block: int) -> Any:
    """16 scales."""
    d = half_at(block + 208)
    return times(floats_of_signed_bytes_at(block + 192), by_half(d, d))


@kernel
def scales_q3_k(block: int) -> Any:
    """16 scales: lower 4 bits of each are the nibbles of 8 bytes, upper 2 bits the bit pairs of 4; less 32."""
    a, c, rest = word_at(block + 96), word_at(block + 100), word_at(block + 104)
    w0 = a & 0x0F0F0F0F | rest << 4 & 0x30303030
    w1 = c & 0x0F0F0F0F | rest << 2 & 0x30303030
    w2 = a >> 4 & 0x0F0F0F0F | rest & 0x30303030
    w3 = c >> 4 & 0x0F0F0F0F | rest >> 2 & 0x30303030
    d = half_at(block + 108)
    less = np.float32(-32.0) * d
    return fused(floats_of_bytes(w0, w1, w2, w3), by_half(d, d), by_half(less, less))


@kernel
def scales_q2_k(block: int) -> Any:
    """16 scales: the low nibbles."""
    a, b, c, e = word_at(block), word_at(block + 4), word_at(block + 8), word_at(block + 12)
    mask, d = 0x0F0F0F0F, half_at(block + 80)
    return times(floats_of_bytes(a & mask, b & mask, c & mask, e & mask), by_half(d, d))


@kernel
def minima_q2_k(block: int) -> Any:
    """16 minima: the high nibbles."""
    a, b, c, e = word_at(block), word_at(block + 4), word_at(block + 8), word_at(block + 12)
    mask, m = 0x0F0F0F0F, -half_at(block + 82)
    return times(floats_of_bytes(a >> 4 & mask, b >> 4 & mask, c >> 4 & mask, e >> 4 & mask), by_half(m, m))


# ---- a row of blocks of 32: numbers and scales
#      raw: the row's first block; q: where 32 bytes for each record go; to: where the first record's scale goes,
#      others ``step`` bytes on, minima 64 bytes after the scales


PAIR_BYTES = (2, 2, 18, 20, 22, 24, 34)  # of a block, by Format.number


@kernel
def levels_row(number: int, raw: int, n_records: int, q: int, to: int, step: int) -> None:
    """An odd last block is its own partner; room for it is there."""
    size = PAIR_BYTES[number]
    for b in range(0, n_records, 2):
        first = raw + size * b
        second = first + size if b + 1 < n_records else first
        if number == 2:
            put_bytes(q + 32 * b, pair_q4_0(first, second))
        elif number == 3:
            put_bytes(q + 32 * b, pair_q4_1(first, second))
        elif number == 4:
            put_bytes(q + 32 * b, pair_q5_0(first, second))
        elif number == 5:
            put_bytes(q + 32 * b, pair_q5_1(first, second))
        else:
            put_bytes(q + 32 * b, pair_q8_0(first, second))
    for b in range(n_records):
        put_float(to + step * b, half_at(raw + size * b))
    if number == 3 or number == 5:
        for b in range(n_records):
            put_float(to + step * b + 64, half_at(raw + size * b + 2))


# ---- a super-block: numbers and scales


SUPER_BYTES = (84, 110, 144, 176, 210)  # of one, from FIRST_SUPER on


@kernel
def put_quarters(number: int, block: int, q: int) -> None:
    """The 256 numbers of a super-block."""
    for j in range(4):
        if number == 7:
            put_bytes(q + 64 * j, quarter_q2_k(block, j))
        elif number == 8:
            put_bytes(q + 64 * j, quarter_q3_k(block, j))
        elif number == 9:
            put_bytes(q + 64 * j, quarter_q4_k(block, j))
        elif number == 10:
            put_bytes(q + 64 * j, quarter_q5_k(block, j))
        else:
            put_bytes(q + 64 * j, quarter_q6_k(block, j))


@kernel
def put_scales(number: int, block: int, to: int) -> None:
    """A super-block's 16 scales, or | 8 scales | 8 minima |; of Q2_K the 16 minima 1024 bytes on."""
    if number == 7:
        put_floats(to, scales_q2_k(block))
        put_floats(to + 1024, minima_q2_k(block))
    elif number == 8:
        put_floats(to, scales_q3_k(block))
    elif number == 11:
        put_floats(to, scales_q6_k(block))
    else:
        put_floats(to, scales_q4_k(block))
