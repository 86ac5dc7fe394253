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
from tinyllava.ops.formats import (
    levels_row,
    minima_q2_k,
    pair_q4_0,
    pair_q4_1,
    pair_q5_0,
    pair_q5_1,
    pair_q8_0,
    quarter_q2_k,
    quarter_q3_k,
    quarter_q4_k,
    quarter_q5_k,
    quarter_q6_k,
    scales_q2_k,
    scales_q3_k,
    scales_q4_k,
    scales_q6_k,
)
from tinyllava.ops.instructions import (
    bfloat_at,
    by_half,
    by_quarter,
    clear_bytes,
    dot4,
    extreme,
    float_at,
    fused,
    half_at,
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
)
from tinyllava.ops.team import job, kernel, numbers_at

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


@kernel
def read_ahead(block: int, size: int) -> None:
    """Ask for the cache lines of a block further on."""
    for i in range(0, size, 64):
        prefetch(block + AHEAD + i)


# ---- blocks of 32, two at a time: 64 bytes are one register


@kernel
def scaled_pair(q: Any, x: int, scales: int, p: int, d: float, d2: float, sums: Any) -> Any:
    """sums + (64 levels q times the p-th 64 of x), scaled: the first 32 by d, the others by d2."""
    factors = by_half(d * float_at(scales + 16 * p), d2 * float_at(scales + 16 * p + 8))
    return fused(to_floats(dot4(no_ints(), q, load_bytes(x + 64 * p))), factors, sums)


@kernel
def pair_sums(scales: int, p: int, m: float, m2: float) -> float:
    """What two minima contribute."""
    return m * float_at(scales + 16 * p + 4) + m2 * float_at(scales + 16 * p + 12)


@kernel
def row_q4_0(row: int, x: int, scales: int, n_pairs: int) -> float:
    """One row of Q4_0."""
    sums, low = no_floats(), np.float32(0.0)
    for p in range(n_pairs):
        a, b = row + 36 * p, row + 36 * p + 18
        prefetch(a + AHEAD)
        sums = scaled_pair(pair_q4_0(a, b), x, scales, p, half_at(a), half_at(b), sums)
        low += pair_sums(scales, p, half_at(a), half_at(b))
    return total(sums) + low


@kernel
def row_q4_1(row: int, x: int, scales: int, n_pairs: int) -> float:
    """One row of Q4_1."""
    sums, low = no_floats(), np.float32(0.0)
    for p in range(n_pairs):
        a, b = row + 40 * p, row + 40 * p + 20
        prefetch(a + AHEAD)
        sums = scaled_pair(pair_q4_1(a, b), x, scales, p, half_at(a), half_at(b), sums)
        low += pair_sums(scales, p, half_at(a + 2), half_at(b + 2))
    return total(sums) + low


@kernel
def row_q5_0(row: int, x: int, scales: int, n_pairs: int) -> float:
    """One row of Q5_0."""
    sums, low = no_floats(), np.float32(0.0)
    for p in range(n_pairs):
        a, b = row + 44 * p, row + 44 * p + 22
        prefetch(a + AHEAD)
        sums = scaled_pair(pair_q5_0(a, b), x, scales, p, half_at(a), half_at(b), sums)
        low += pair_sums(scales, p, half_at(a), half_at(b))
    return total(sums) + low


@kernel
def row_q5_1(row: int, x: int, scales: int, n_pairs: int) -> float:
    """One row of Q5_1."""
    sums, low = no_floats(), np.float32(0.0)
    for p in range(n_pairs):
        a, b = row + 48 * p, row + 48 * p + 24
        prefetch(a + AHEAD)
        sums = scaled_pair(pair_q5_1(a, b), x, scales, p, half_at(a), half_at(b), sums)
        low += pair_sums(scales, p, half_at(a + 2), half_at(b + 2))
    return total(sums) + low


@kernel
def row_q8_0(row: int, x: int, scales: int, n_pairs: int) -> float:
    """One row of Q8_0."""
    sums, low = no_floats(), np.float32(0.0)
    for p in range(n_pairs):
        a, b = row + 68 * p, row + 68 * p + 34
        prefetch(a + AHEAD)
        sums = scaled_pair(pair_q8_0(a, b), x, scales, p, half_at(a), half_at(b), sums)
        low += pair_sums(scales, p, half_at(a), half_at(b))
    return total(sums) + low


# ---- super-blocks of 256


@kernel
def four_dots_by_32(q0: Any, q1: Any, q2: Any, q3: Any, x: int, factors: Any, sums: Any) -> Any:
    """sums + 4 x 64 levels times 256 of x, each 32 scaled by one of 8 factors."""
    sums = fused(to_floats(dot4(no_ints(), q0, load_bytes(x))), simd.scales_01(factors), sums)
    sums = fused(to_floats(dot4(no_ints(), q1, load_bytes(x + 64))), simd.scales_23(factors), sums)
    sums = fused(to_floats(dot4(no_ints(), q2, load_bytes(x + 128))), simd.scales_45(factors), sums)
    return fused(to_floats(dot4(no_ints(), q3, load_bytes(x + 192))), simd.scales_67(factors), sums)


@kernel
def four_dots_by_16(q0: Any, q1: Any, q2: Any, q3: Any, x: int, factors: Any, sums: Any) -> Any:
    """sums + 4 x 64 levels times 256 of x, each 16 scaled by one of 16 factors."""
    sums = fused(to_floats(dot4(no_ints(), q0, load_bytes(x))), simd.scales_0123(factors), sums)
    sums = fused(to_floats(dot4(no_ints(), q1, load_bytes(x + 64))), simd.scales_4567(factors), sums)
    sums = fused(to_floats(dot4(no_ints(), q2, load_bytes(x + 128))), simd.scales_89ab(factors), sums)
    return fused(to_floats(dot4(no_ints(), q3, load_bytes(x + 192))), simd.scales_cdef(factors), sums)


@kernel
def row_q4_k(row: int, x: int, scales: int, n_blocks: int) -> float:
    """One row of Q4_K."""
    sums, low = no_floats(), no_floats()
    for b in range(n_blocks):
        block = row + 144 * b
        read_ahead(block, 144)
        factors = simd.times(scales_q4_k(block), load_floats(scales + 64 * b))
        low = simd.add(low, factors)  # its upper half: minima times sums
        q0, q1, q2, q3 = (
            quarter_q4_k(block, 0), quarter_q4_k(block, 1), quarter_q4_k(block, 2), quarter_q4_k(block, 3),
        )  # fmt: skip
        sums = four_dots_by_32(q0, q1, q2, q3, x + 256 * b, factors, sums)
    return total(sums) + total_of_upper_half(low)


@kernel
def row_q5_k(row: int, x: int, scales: int, n_blocks: int) -> float:
    """One row of Q5_K."""
    sums, low = no_floats(), no_floats()
    for b in range(n_blocks):
        block = row + 176 * b
        read_ahead(block, 176)
        factors = simd.times(scales_q4_k(block), load_floats(scales + 64 * b))
        low = simd.add(low, factors)  # its upper half: minima times sums
        q0, q1, q2, q3 = (
            quarter_q5_k(block, 0), quarter_q5_k(block, 1), quarter_q5_k(block, 2), quarter_q5_k(block, 3),
        )  # fmt: skip
        sums = four_dots_by_32(q0, q1, q2, q3, x + 256 * b, factors, sums)
    return total(sums) + total_of_upper_half(low)


@kernel
def row_q2_k(row: int, x: int, scales: int, n_blocks: int) -> float:
    """One row of Q2_K."""
    sums, low = no_floats(), no_floats()
    for b in range(n_blocks):
        block = row + 84 * b
        read_ahead(block, 84)
        own = scales_q2_k(block)
        low = fused(minima_q2_k(block), load_floats(scales + 128 * b + 64), low)
        q0, q1, q2, q3 = (
            quarter_q2_k(block, 0), quarter_q2_k(block, 1), quarter_q2_k(block, 2), quarter_q2_k(block, 3),
        )  # fmt: skip
        factors = simd.times(own, load_floats(scales + 128 * b))
        sums = four_dots_by_16(q0, q1, q2, q3, x + 256 * b, factors, sums)
    return total(sums) + total(low)


@kernel
def row_q3_k(row: int, x: int, scales: int, n_blocks: int) -> float:
    """One row of Q3_K."""
    sums, low = no_floats(), no_floats()
    for b in range(n_blocks):
        block = row + 110 * b
        read_ahead(block, 110)
        own = scales_q3_k(block)
        low = fused(own, load_floats(scales + 128 * b + 64), low)
        q0, q1, q2, q3 = (
            quarter_q3_k(block, 0), quarter_q3_k(block, 1), quarter_q3_k(block, 2), quarter_q3_k(block, 3),
        )  # fmt: skip
        factors = simd.times(own, load_floats(scales + 128 * b))
        sums = four_dots_by_16(q0, q1, q2, q3, x + 256 * b, factors, sums)
    return total(sums) + total(low)


@kernel
def row_q6_k(row: int, x: int, scales: int, n_blocks: int) -> float:
    """One row of Q6_K."""
    sums, low = no_floats(), no_floats()
    for b in range(n_blocks):
        block = row + 210 * b
        read_ahead(block, 210)
        own = scales_q6_k(block)
        low = fused(own, load_floats(scales + 128 * b + 64), low)
        q0, q1, q2, q3 = (
            quarter_q6_k(block, 0), quarter_q6_k(block, 1), quarter_q6_k(block, 2), quarter_q6_k(block, 3),
        )  # fmt: skip
        factors = simd.times(own, load_floats(scales + 128 * b))
        sums = four_dots_by_16(q0, q1, q2, q3, x + 256 * b, factors, sums)
    return total(sums) + total(low)


# ---- any format, by way of levels_row; and 16-bit and 32-bit floats


@kernel
def row_of_levels(q: int, table: int, x: int, scales: int, n_pairs: int, groups: int, has_minima: bool) -> float:
    """A row already taken apart: q, and at table + 256 b the scales and minima of the b-th 32, 64 bytes apart."""
    sums, low = no_floats(), np.float32(0.0)
    second, minima = 64 * (groups - 1), 64 * groups if has_minima else 0
    for p in range(n_pairs):
        a, b, at = table + 512 * p, table + 512 * p + 256, scales + 128 * (p // 4) + 16 * (p % 4)
        s0, s2 = float_at(at), float_at(at + 8)
        factors = by_quarter(
            float_at(a) * s0, float_at(a + second) * s0, float_at(b) * s2, float_at(b + second) * s2
        )
        sums = fused(to_floats(dot4(no_ints(), load_bytes(q + 64 * p), load_bytes(x + 64 * p))), factors, sums)
        low += float_at(a + minima) * float_at(at + 64) + float_at(a + minima + second) * float_at(at + 68)
        low += float_at(b + minima) * float_at(at + 72) + float_at(b + minima + second) * float_at(at + 76)
    return total(sums) + low


@job
def dot_levels(args: int, item: int, who: int) -> None:
    """Rows of any quantized format. More arguments: format, groups, has minima, scratch, its size."""
    a = numbers_at(args)
    n_records, table = a[3] // 32, a[11] + who * a[12]
    n_pairs = (n_records + 1) // 2
    q, room = table + 512 * n_pairs, table + 576 * n_pairs
    for i in range(512 * n_pairs - 256, 576 * n_pairs, 64):  # an odd row's last half pair stays zero
        clear_bytes(table + i)
    for r in range(item * a[7], min(a[2], (item + 1) * a[7])):
        levels_row(a[8], a[0] + r * a[1], n_records, q, table, 256, room)
        put_float(a[6] + 4 * r, row_of_levels(q, table, a[4], a[5], n_pairs, a[9], a[10] != 0))


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


@job
def dot_q2_k(args: int, item: int, _who: int) -> None:
    """Rows of Q2_K."""
    a = numbers_at(args)
    for r in range(item * a[7], min(a[2], (item + 1) * a[7])):
        put_float(a[6] + 4 * r, row_q2_k(a[0] + r * a[1], a[4], a[5], a[3] // 256))


@job
def dot_q3_k(args: int, item: int, _who: int) -> None:
    """Rows of Q3_K."""
    a = numbers_at(args)
    for r in range(item * a[7], min(a[2], (item + 1) * a[7])):
        put_float(a[6] + 4 * r, row_q3_k(a[0] + r * a[1], a[4], a[5], a[3] // 256))


JOBS = {
    "Q4_0": (dot_q4_0, PAIRS),
    "Q4_1": (dot_q4_1, PAIRS),
    "Q5_0": (dot_q5_0, PAIRS),
    "Q5_1": (dot_q5_1, PAIRS),
    "Q8_0": (dot_q8_0, PAIRS),
    "Q2_K": (dot_q2_k, SIXTEENS),
    "Q3_K": (dot_q3_k, SIXTEENS),
    "Q4_K": (dot_q4_k, EIGHTS),
    "Q5_K": (dot_q5_k, EIGHTS),
    "Q6_K": (dot_q6_k, SIXTEENS),
}
