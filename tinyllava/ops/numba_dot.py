"""linear for one token, which decoding is: every weight is used once, so memory sets the pace.

Each job multiplies some rows of a matrix, read from front to back straight out of the mapped file, with one
quantized token; the blocks come apart in registers. ``quantize_token`` prepares the token:

    bytes   s8 for each column, in order
    pairs   for each 32 columns: scale d, and d * sum(bytes) times -c or 1       Q4_0 Q4_1 Q5_0 Q5_1 Q8_0
    eights  for each 256: | 8 scales | 8 sums |                                  Q4_K Q5_K
    sixteens  for each 256: | 16 scales | 16 sums |, of 16 columns each          Q6_K, and any other format

so that what is subtracted (c, or the blocks' minima) costs a multiplication per block, not one per weight.
Reference of all: NumpyOps.linear.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinyllava.ops import instructions as simd
from tinyllava.ops.instructions import (
    bfloat_at,
    bits_by_half,
    bits_by_quarter,
    by_half,
    by_quarter,
    dot4,
    extreme,
    fifth_bits,
    flip_sign,
    float_at,
    floats_of_bytes,
    floats_of_signed_bytes_at,
    four_quarters,
    fused,
    half_at,
    join_bits,
    load_bytes,
    load_floats,
    no_floats,
    no_ints,
    prefetch,
    put_float,
    quantize_bytes,
    to_floats,
    total,
    total_of_upper_half,
    two_halves,
    word_at,
)
from tinyllava.ops.levels import levels_row
from tinyllava.ops.team import bytes_at, floats_at, job, kernel, numbers_at

PAIRS, EIGHTS, SIXTEENS, FLOATS = 0, 1, 2, 3
AHEAD = 2048  # bytes by which reading ahead leads


@kernel
def quantize_token(x: int, d: int, form: int, offset: int, to: int, scales: int) -> None:
    """x (d,) float32 at an address -> bytes at ``to`` and scales and sums at ``scales``."""
    factor = np.float32(-offset) if offset else np.float32(1.0)
    for b in range(d // 32):
        step = extreme(x + 128 * b) / np.float32(-128.0)
        inverse = np.float32(1.0) / step if step != np.float32(0.0) else np.float32(0.0)
        both = quantize_bytes(x + 128 * b, inverse, to + 32 * b)
        first = step * factor * np.float32(np.int32(both & 0xFFFFFFFF))
        second = step * factor * np.float32(both >> 32)
        if form == PAIRS:
            put_float(scales + 8 * b, step)
            put_float(scales + 8 * b + 4, first + second)
        elif form == EIGHTS:
            at = scales + 64 * (b // 8) + 4 * (b % 8)
            put_float(at, step)
            put_float(at + 32, first + second)
        else:
            at = scales + 128 * (b // 8) + 8 * (b % 8)
            put_float(at, step)
            put_float(at + 4, step)
            put_float(at + 64, first)
            put_float(at + 68, second)


# ---- blocks of 32, two at a time: 64 bytes are one register


@kernel
def scaled_pair(q, x: int, scales: int, p: int, d: float, d2: float, sums):  # type: ignore[no-untyped-def]
    """sums + (64 levels q times the p-th 64 of x), scaled: the first 32 by d, the others by d2."""
    factors = by_half(d * float_at(scales + 16 * p), d2 * float_at(scales + 16 * p + 8))
    return fused(to_floats(dot4(no_ints(), q, load_bytes(x + 64 * p))), factors, sums)


@kernel
def pair_sums(scales: int, p: int, m: float, m2: float) -> float:
    """What two minima contribute."""
    return m * float_at(scales + 16 * p + 4) + m2 * float_at(scales + 16 * p + 12)


@kernel
def row_q4_0(row: int, x: int, scales: int, n_pairs: int) -> float:
    """18 bytes a block: d, 16 bytes of nibbles."""
    sums, low = no_floats(), np.float32(0.0)
    for p in range(n_pairs):
        a, b = row + 36 * p, row + 36 * p + 18
        prefetch(a + AHEAD)
        q = bits_by_quarter(four_quarters(a + 2, b + 2), 0, 4, 15)
        sums = scaled_pair(q, x, scales, p, half_at(a), half_at(b), sums)
        low += pair_sums(scales, p, half_at(a), half_at(b))
    return total(sums) + low


@kernel
def row_q4_1(row: int, x: int, scales: int, n_pairs: int) -> float:
    """20 bytes a block: d, m, 16 bytes of nibbles."""
    sums, low = no_floats(), np.float32(0.0)
    for p in range(n_pairs):
        a, b = row + 40 * p, row + 40 * p + 20
        prefetch(a + AHEAD)
        q = bits_by_quarter(four_quarters(a + 4, b + 4), 0, 4, 15)
        sums = scaled_pair(q, x, scales, p, half_at(a), half_at(b), sums)
        low += pair_sums(scales, p, half_at(a + 2), half_at(b + 2))
    return total(sums) + low


@kernel
def row_q5_0(row: int, x: int, scales: int, n_pairs: int) -> float:
    """22 bytes a block: d, 32 fifth bits, 16 bytes of nibbles."""
    sums, low = no_floats(), np.float32(0.0)
    for p in range(n_pairs):
        a, b = row + 44 * p, row + 44 * p + 22
        prefetch(a + AHEAD)
        q = bits_by_quarter(four_quarters(a + 6, b + 6), 0, 4, 15)
        q = simd.either(q, fifth_bits(a + 2, b + 2))
        sums = scaled_pair(q, x, scales, p, half_at(a), half_at(b), sums)
        low += pair_sums(scales, p, half_at(a), half_at(b))
    return total(sums) + low


@kernel
def row_q5_1(row: int, x: int, scales: int, n_pairs: int) -> float:
    """24 bytes a block: d, m, 32 fifth bits, 16 bytes of nibbles."""
    sums, low = no_floats(), np.float32(0.0)
    for p in range(n_pairs):
        a, b = row + 48 * p, row + 48 * p + 24
        prefetch(a + AHEAD)
        q = bits_by_quarter(four_quarters(a + 8, b + 8), 0, 4, 15)
        q = simd.either(q, fifth_bits(a + 4, b + 4))
        sums = scaled_pair(q, x, scales, p, half_at(a), half_at(b), sums)
        low += pair_sums(scales, p, half_at(a + 2), half_at(b + 2))
    return total(sums) + low


@kernel
def row_q8_0(row: int, x: int, scales: int, n_pairs: int) -> float:
    """34 bytes a block: d, 32 signed bytes."""
    sums, low = no_floats(), np.float32(0.0)
    for p in range(n_pairs):
        a, b = row + 68 * p, row + 68 * p + 34
        prefetch(a + AHEAD)
        q = flip_sign(two_halves(a + 2, b + 2))
        sums = scaled_pair(q, x, scales, p, half_at(a), half_at(b), sums)
        low += pair_sums(scales, p, half_at(a), half_at(b))
    return total(sums) + low


# ---- super-blocks of 256


@kernel
def scales_and_minima(block: int):  # type: ignore[no-untyped-def]
    """| 8 scales | 8 minima | of Q4_K and Q5_K, as floats: four of the twelve bytes' 6-bit numbers at a time."""
    a, c, rest = word_at(block + 4), word_at(block + 8), word_at(block + 12)
    upper = rest & 0x0F0F0F0F | a >> 2 & 0x30303030
    lower = rest >> 4 & 0x0F0F0F0F | c >> 2 & 0x30303030
    numbers = floats_of_bytes(a & 0x3F3F3F3F, upper, c & 0x3F3F3F3F, lower)
    return simd.times(numbers, by_half(half_at(block), -half_at(block + 2)))


@kernel
def row_q4_k(row: int, x: int, scales: int, n_blocks: int) -> float:
    """144 bytes a block: d, dmin, 12 bytes of scales, 128 of nibbles; 32 bytes hold two groups of 32."""
    sums, low = no_floats(), no_floats()
    for b in range(n_blocks):
        block, at = row + 144 * b, x + 256 * b
        prefetch(block + AHEAD)
        prefetch(block + AHEAD + 64)
        factors = simd.times(scales_and_minima(block), load_floats(scales + 64 * b))
        low = simd.add(low, factors)
        q0 = bits_by_half(two_halves(block + 16, block + 16), 0, 4, 15)
        q1 = bits_by_half(two_halves(block + 48, block + 48), 0, 4, 15)
        q2 = bits_by_half(two_halves(block + 80, block + 80), 0, 4, 15)
        q3 = bits_by_half(two_halves(block + 112, block + 112), 0, 4, 15)
        sums = four_dots(q0, q1, q2, q3, at, factors, sums)
    return total(sums) + total_of_upper_half(low)


@kernel
def four_dots(q0, q1, q2, q3, x: int, factors, sums):  # type: ignore[no-untyped-def]
    """sums + 4 x 64 levels times 256 of x, each 32 scaled by one of 8 factors."""
    sums = fused(to_floats(dot4(no_ints(), q0, load_bytes(x))), simd.scales_01(factors), sums)
    sums = fused(to_floats(dot4(no_ints(), q1, load_bytes(x + 64))), simd.scales_23(factors), sums)
    sums = fused(to_floats(dot4(no_ints(), q2, load_bytes(x + 128))), simd.scales_45(factors), sums)
    return fused(to_floats(dot4(no_ints(), q3, load_bytes(x + 192))), simd.scales_67(factors), sums)


@kernel
def row_q5_k(row: int, x: int, scales: int, n_blocks: int) -> float:
    """176 bytes a block: as Q4_K, with 32 bytes of fifth bits before the nibbles; group i has bit i of each."""
    sums, low = no_floats(), no_floats()
    for b in range(n_blocks):
        block, at = row + 176 * b, x + 256 * b
        prefetch(block + AHEAD)
        prefetch(block + AHEAD + 64)
        prefetch(block + AHEAD + 128)
        factors = simd.times(scales_and_minima(block), load_floats(scales + 64 * b))
        low = simd.add(low, factors)
        high = two_halves(block + 16, block + 16)
        q0 = join_bits(bits_by_half(two_halves(block + 48, block + 48), 0, 4, 15), bits_by_half(high, 0, 1, 1))
        q1 = join_bits(bits_by_half(two_halves(block + 80, block + 80), 0, 4, 15), bits_by_half(high, 2, 3, 1))
        q2 = join_bits(bits_by_half(two_halves(block + 112, block + 112), 0, 4, 15), bits_by_half(high, 4, 5, 1))
        q3 = join_bits(bits_by_half(two_halves(block + 144, block + 144), 0, 4, 15), bits_by_half(high, 6, 7, 1))
        sums = four_dots(q0, q1, q2, q3, at, factors, sums)
    return total(sums) + total_of_upper_half(low)


@kernel
def row_q6_k(row: int, x: int, scales: int, n_blocks: int) -> float:
    """210 bytes a block: 128 of lower nibbles, 64 of upper bit pairs, 16 scales, d; both halves are alike."""
    sums, low = no_floats(), no_floats()
    for b in range(n_blocks):
        block, at = row + 210 * b, x + 256 * b
        prefetch(block + AHEAD)
        prefetch(block + AHEAD + 64)
        prefetch(block + AHEAD + 128)
        own = simd.times(floats_of_signed_bytes_at(block + 192), simd.everywhere(half_at(block + 208)))
        low = fused(own, load_floats(scales + 128 * b + 64), low)
        own = simd.times(own, load_floats(scales + 128 * b))
        a, c = load_bytes(block), load_bytes(block + 64)
        high, high2 = two_halves(block + 128, block + 128), two_halves(block + 160, block + 160)
        q = join_bits(bits_by_half(a, 0, 0, 15), bits_by_half(high, 0, 2, 3))
        sums = fused(to_floats(dot4(no_ints(), q, load_bytes(at))), simd.scales_0123(own), sums)
        q = join_bits(bits_by_half(a, 4, 4, 15), bits_by_half(high, 4, 6, 3))
        sums = fused(to_floats(dot4(no_ints(), q, load_bytes(at + 64))), simd.scales_4567(own), sums)
        q = join_bits(bits_by_half(c, 0, 0, 15), bits_by_half(high2, 0, 2, 3))
        sums = fused(to_floats(dot4(no_ints(), q, load_bytes(at + 128))), simd.scales_89ab(own), sums)
        q = join_bits(bits_by_half(c, 4, 4, 15), bits_by_half(high2, 4, 6, 3))
        sums = fused(to_floats(dot4(no_ints(), q, load_bytes(at + 192))), simd.scales_cdef(own), sums)
    return total(sums) + total(low)


# ---- any format, by way of levels.py; and 16-bit and 32-bit floats


@kernel
def row_of_levels(q: int, table: Any, x: int, scales: int, groups: int, has_minima: bool) -> float:
    """A row already taken apart: q bytes, and table[b] with the numbers of the b-th 32."""
    sums, low = no_floats(), np.float32(0.0)
    second, minima = 16 * (groups - 1), 16 * groups
    for p in range(table.shape[0] // 2):
        b, at = table[2 * p], scales + 128 * (p // 4) + 16 * (p % 4)  # 4 of a super-block's 16 scales
        c, s0, s2 = table[2 * p + 1], float_at(at), float_at(at + 8)
        factors = by_quarter(b[0] * s0, b[second] * s0, c[0] * s2, c[second] * s2)
        sums = fused(to_floats(dot4(no_ints(), load_bytes(q + 64 * p), load_bytes(x + 64 * p))), factors, sums)
        m = minima if has_minima else 0
        low += b[m] * float_at(at + 64) + b[m + second] * float_at(at + 68)
        low += c[m] * float_at(at + 72) + c[m + second] * float_at(at + 76)
    return total(sums) + low


@job
def dot_levels(args: int, item: int, who: int) -> None:
    """Rows of any quantized format. More arguments: format, groups, has minima, scratch, its size."""
    a = numbers_at(args)
    n_records, scratch = a[3] // 32, a[11] + who * a[12]
    n_padded = n_records + n_records % 2
    table = floats_at(scratch, n_padded, 64)
    q = scratch + 256 * n_padded
    for i in range(64):
        table[n_padded - 1, i] = np.float32(0.0)
    simd.clear_bytes(q + 32 * (n_padded - 2))
    for r in range(item * a[7], min(a[2], (item + 1) * a[7])):
        raw = bytes_at(a[0] + r * a[1], 1, a[1])[0]
        levels_row(a[8], raw, bytes_at(q, 1, 32 * n_records)[0], table[:n_records], 0)
        put_float(a[6] + 4 * r, row_of_levels(q, table, a[4], a[5], a[9], a[10] != 0))


@job
def dot_f16(args: int, item: int, _who: int) -> None:
    """Rows of half-precision numbers."""
    a = numbers_at(args)
    for r in range(item * a[7], min(a[2], (item + 1) * a[7])):
        row, sums = a[0] + r * a[1], np.float32(0.0)
        for i in range(a[3]):
            sums += half_at(row + 2 * i) * float_at(a[4] + 4 * i)
        put_float(a[6] + 4 * r, sums)


@job
def dot_bf16(args: int, item: int, _who: int) -> None:
    """Rows of bfloat16."""
    a = numbers_at(args)
    for r in range(item * a[7], min(a[2], (item + 1) * a[7])):
        row, sums = a[0] + r * a[1], np.float32(0.0)
        for i in range(a[3]):
            sums += bfloat_at(row + 2 * i) * float_at(a[4] + 4 * i)
        put_float(a[6] + 4 * r, sums)


@job
def dot_f32(args: int, item: int, _who: int) -> None:
    """Rows of float32."""
    a = numbers_at(args)
    for r in range(item * a[7], min(a[2], (item + 1) * a[7])):
        row, sums = a[0] + r * a[1], np.float32(0.0)
        for i in range(a[3]):
            sums += float_at(row + 4 * i) * float_at(a[4] + 4 * i)
        put_float(a[6] + 4 * r, sums)


# ---- one job for each format: rows item * a[7] ... of arguments
#      raw, row_bytes, d_out, d, bytes of x, scales of x, y, rows for each item


@job
def dot_q4_0(args: int, item: int, _who: int) -> None:
    """Rows of Q4_0."""
    a = numbers_at(args)
    for r in range(item * a[7], min(a[2], (item + 1) * a[7])):
        put_float(a[6] + 4 * r, row_q4_0(a[0] + r * a[1], a[4], a[5], a[3] // 64))


@job
def dot_q4_1(args: int, item: int, _who: int) -> None:
    """Rows of Q4_1."""
    a = numbers_at(args)
    for r in range(item * a[7], min(a[2], (item + 1) * a[7])):
        put_float(a[6] + 4 * r, row_q4_1(a[0] + r * a[1], a[4], a[5], a[3] // 64))


@job
def dot_q5_0(args: int, item: int, _who: int) -> None:
    """Rows of Q5_0."""
    a = numbers_at(args)
    for r in range(item * a[7], min(a[2], (item + 1) * a[7])):
        put_float(a[6] + 4 * r, row_q5_0(a[0] + r * a[1], a[4], a[5], a[3] // 64))


@job
def dot_q5_1(args: int, item: int, _who: int) -> None:
    """Rows of Q5_1."""
    a = numbers_at(args)
    for r in range(item * a[7], min(a[2], (item + 1) * a[7])):
        put_float(a[6] + 4 * r, row_q5_1(a[0] + r * a[1], a[4], a[5], a[3] // 64))


@job
def dot_q8_0(args: int, item: int, _who: int) -> None:
    """Rows of Q8_0."""
    a = numbers_at(args)
    for r in range(item * a[7], min(a[2], (item + 1) * a[7])):
        put_float(a[6] + 4 * r, row_q8_0(a[0] + r * a[1], a[4], a[5], a[3] // 64))


@job
def dot_q4_k(args: int, item: int, _who: int) -> None:
    """Rows of Q4_K."""
    a = numbers_at(args)
    for r in range(item * a[7], min(a[2], (item + 1) * a[7])):
        put_float(a[6] + 4 * r, row_q4_k(a[0] + r * a[1], a[4], a[5], a[3] // 256))


@job
def dot_q5_k(args: int, item: int, _who: int) -> None:
    """Rows of Q5_K."""
    a = numbers_at(args)
    for r in range(item * a[7], min(a[2], (item + 1) * a[7])):
        put_float(a[6] + 4 * r, row_q5_k(a[0] + r * a[1], a[4], a[5], a[3] // 256))


@job
def dot_q6_k(args: int, item: int, _who: int) -> None:
    """Rows of Q6_K."""
    a = numbers_at(args)
    for r in range(item * a[7], min(a[2], (item + 1) * a[7])):
        put_float(a[6] + 4 * r, row_q6_k(a[0] + r * a[1], a[4], a[5], a[3] // 256))


JOBS = {
    "Q4_0": (dot_q4_0, PAIRS),
    "Q4_1": (dot_q4_1, PAIRS),
    "Q5_0": (dot_q5_0, PAIRS),
    "Q5_1": (dot_q5_1, PAIRS),
    "Q8_0": (dot_q8_0, PAIRS),
    "Q4_K": (dot_q4_k, EIGHTS),
    "Q5_K": (dot_q5_k, EIGHTS),
    "Q6_K": (dot_q6_k, SIXTEENS),
}
