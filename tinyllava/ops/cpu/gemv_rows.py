"""One row of blocks times one quantized token: blocks come apart in registers and meet the token's bytes there.

``x`` is the address of the token's bytes, ``scales`` that of its scales and sums, in the form that numba_dot.py
prepares for the format. Memory sets the pace, so each loop asks for what it will need AHEAD bytes later.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinyllava.ops.cpu.compile import kernel
from tinyllava.ops.cpu.simd import intrinsics as simd
from tinyllava.ops.cpu.simd import lanes
from tinyllava.ops.cpu.simd.intrinsics import (
    bits_by_half,
    dot4,
    float_at,
    fused,
    half_at,
    load_bytes,
    load_floats,
    masked,
    no_floats,
    no_ints,
    prefetch,
    quarters_apart,
    to_floats,
)
from tinyllava.ops.cpu.simd.lanes import by_half, halves_apart, lower_and_upper
from tinyllava.ops.cpu.simd.reduce import total, total_of_upper_half
from tinyllava.ops.cpu.unpack import (
    minima_q2_k,
    pair_q4_0,
    pair_q4_1,
    pair_q5_0,
    pair_q5_1,
    pair_q8_0,
    quarter_q2_k,
    quarter_q3_k,
    quarter_q5_k,
    quarter_q6_k,
    scales_q2_k,
    scales_q3_k,
    scales_q4_k,
    scales_q6_k,
)

AHEAD = 2048  # bytes


@kernel
def read_ahead(block: int, size: int) -> None:
    """Ask for the cache lines of a block further on."""
    for i in range(0, size, 64):
        prefetch(block + AHEAD + i)


# ---- 256 numbers times 256 of x


@kernel
def four_dots_by_32(q0: Any, q1: Any, q2: Any, q3: Any, x: int, factors: Any, sums: Any) -> Any:
    """sums + 4 x 64 levels times 256 of x, each 32 scaled by one of 8 factors."""
    sums = fused(to_floats(dot4(no_ints(), q0, load_bytes(x))), lanes.scales_01(factors), sums)
    sums = fused(to_floats(dot4(no_ints(), q1, load_bytes(x + 64))), lanes.scales_23(factors), sums)
    sums = fused(to_floats(dot4(no_ints(), q2, load_bytes(x + 128))), lanes.scales_45(factors), sums)
    return fused(to_floats(dot4(no_ints(), q3, load_bytes(x + 192))), lanes.scales_67(factors), sums)


@kernel
def four_dots_by_16(q0: Any, q1: Any, q2: Any, q3: Any, x: int, factors: Any, sums: Any) -> Any:
    """sums + 4 x 64 levels times 256 of x, each 16 scaled by one of 16 factors."""
    sums = fused(to_floats(dot4(no_ints(), q0, load_bytes(x))), lanes.scales_0123(factors), sums)
    sums = fused(to_floats(dot4(no_ints(), q1, load_bytes(x + 64))), lanes.scales_4567(factors), sums)
    sums = fused(to_floats(dot4(no_ints(), q2, load_bytes(x + 128))), lanes.scales_89ab(factors), sums)
    return fused(to_floats(dot4(no_ints(), q3, load_bytes(x + 192))), lanes.scales_cdef(factors), sums)


# ---- blocks of 32, eight at a time; what is left, two at a time


@kernel
def last_pair(q: Any, x: int, scales: int, p: int, d: float, d2: float, sums: Any) -> Any:
    """sums + (64 levels q times the p-th 64 of x), scaled: the first 32 by d, the others by d2."""
    at = scales + 64 * (p // 4) + 8 * (p % 4)
    factors = by_half(d * float_at(at), d2 * float_at(at + 4))
    return fused(to_floats(dot4(no_ints(), q, load_bytes(x + 64 * p))), factors, sums)


@kernel
def last_minima(scales: int, p: int, m: float, m2: float) -> float:
    """What the minima of two blocks contribute."""
    at = scales + 64 * (p // 4) + 8 * (p % 4) + 32
    return m * float_at(at) + m2 * float_at(at + 4)


@kernel
def four_blocks_q4_0(a: int, x: int, factors: Any, sums: Any) -> Any:
    """sums + four blocks times 128 of x ("halves"), each block scaled by one of four lanes of factors."""
    nibbles = quarters_apart(a + 2, 18)
    dots = dot4(no_ints(), bits_by_half(nibbles, 0, 0, 15), load_bytes(x))
    dots = dot4(dots, bits_by_half(nibbles, 4, 4, 15), load_bytes(x + 64))
    return fused(to_floats(dots), factors, sums)


@kernel
def row_q4_0(row: int, x: int, scales: int, n_pairs: int) -> float:
    """One row of Q4_0: 18 bytes a block."""
    sums, low, rest = no_floats(), no_floats(), np.float32(0.0)
    for b in range(n_pairs // 4):
        a = row + 144 * b
        read_ahead(a, 144)
        factors = simd.times(halves_apart(a, 18), load_floats(scales + 64 * b))
        low = simd.add(low, factors)  # its upper half: scales times sums
        sums = four_blocks_q4_0(a, x + 256 * b, lanes.scales_0123(factors), sums)
        sums = four_blocks_q4_0(a + 72, x + 256 * b + 128, lanes.scales_4567(factors), sums)
    for p in range(n_pairs // 4 * 4, n_pairs):
        a, c = row + 36 * p, row + 36 * p + 18
        sums = last_pair(pair_q4_0(a, c), x, scales, p, half_at(a), half_at(c), sums)
        rest += last_minima(scales, p, half_at(a), half_at(c))
    return total(sums) + total_of_upper_half(low) + rest


@kernel
def row_q4_1(row: int, x: int, scales: int, n_pairs: int) -> float:
    """One row of Q4_1: 20 bytes a block."""
    sums, low, rest = no_floats(), no_floats(), np.float32(0.0)
    for b in range(n_pairs // 4):
        a = row + 160 * b
        read_ahead(a, 160)
        own = lower_and_upper(halves_apart(a, 20), halves_apart(a + 2, 20))
        factors = simd.times(own, load_floats(scales + 64 * b))
        low = simd.add(low, factors)  # its upper half: minima times sums
        q0, q1 = pair_q4_1(a, a + 20), pair_q4_1(a + 40, a + 60)
        q2, q3 = pair_q4_1(a + 80, a + 100), pair_q4_1(a + 120, a + 140)
        sums = four_dots_by_32(q0, q1, q2, q3, x + 256 * b, factors, sums)
    for p in range(n_pairs // 4 * 4, n_pairs):
        a, c = row + 40 * p, row + 40 * p + 20
        sums = last_pair(pair_q4_1(a, c), x, scales, p, half_at(a), half_at(c), sums)
        rest += last_minima(scales, p, half_at(a + 2), half_at(c + 2))
    return total(sums) + total_of_upper_half(low) + rest


@kernel
def row_q5_0(row: int, x: int, scales: int, n_pairs: int) -> float:
    """One row of Q5_0: 22 bytes a block."""
    sums, low, rest = no_floats(), no_floats(), np.float32(0.0)
    for b in range(n_pairs // 4):
        a = row + 176 * b
        read_ahead(a, 176)
        factors = simd.times(halves_apart(a, 22), load_floats(scales + 64 * b))
        low = simd.add(low, factors)  # its upper half: scales times sums
        q0, q1 = pair_q5_0(a, a + 22), pair_q5_0(a + 44, a + 66)
        q2, q3 = pair_q5_0(a + 88, a + 110), pair_q5_0(a + 132, a + 154)
        sums = four_dots_by_32(q0, q1, q2, q3, x + 256 * b, factors, sums)
    for p in range(n_pairs // 4 * 4, n_pairs):
        a, c = row + 44 * p, row + 44 * p + 22
        sums = last_pair(pair_q5_0(a, c), x, scales, p, half_at(a), half_at(c), sums)
        rest += last_minima(scales, p, half_at(a), half_at(c))
    return total(sums) + total_of_upper_half(low) + rest


@kernel
def row_q5_1(row: int, x: int, scales: int, n_pairs: int) -> float:
    """One row of Q5_1: 24 bytes a block."""
    sums, low, rest = no_floats(), no_floats(), np.float32(0.0)
    for b in range(n_pairs // 4):
        a = row + 192 * b
        read_ahead(a, 192)
        own = lower_and_upper(halves_apart(a, 24), halves_apart(a + 2, 24))
        factors = simd.times(own, load_floats(scales + 64 * b))
        low = simd.add(low, factors)  # its upper half: minima times sums
        q0, q1 = pair_q5_1(a, a + 24), pair_q5_1(a + 48, a + 72)
        q2, q3 = pair_q5_1(a + 96, a + 120), pair_q5_1(a + 144, a + 168)
        sums = four_dots_by_32(q0, q1, q2, q3, x + 256 * b, factors, sums)
    for p in range(n_pairs // 4 * 4, n_pairs):
        a, c = row + 48 * p, row + 48 * p + 24
        sums = last_pair(pair_q5_1(a, c), x, scales, p, half_at(a), half_at(c), sums)
        rest += last_minima(scales, p, half_at(a + 2), half_at(c + 2))
    return total(sums) + total_of_upper_half(low) + rest


@kernel
def row_q8_0(row: int, x: int, scales: int, n_pairs: int) -> float:
    """One row of Q8_0: 34 bytes a block."""
    sums, low, rest = no_floats(), no_floats(), np.float32(0.0)
    for b in range(n_pairs // 4):
        a = row + 272 * b
        read_ahead(a, 272)
        factors = simd.times(halves_apart(a, 34), load_floats(scales + 64 * b))
        low = simd.add(low, factors)  # its upper half: scales times sums
        q0, q1 = pair_q8_0(a, a + 34), pair_q8_0(a + 68, a + 102)
        q2, q3 = pair_q8_0(a + 136, a + 170), pair_q8_0(a + 204, a + 238)
        sums = four_dots_by_32(q0, q1, q2, q3, x + 256 * b, factors, sums)
    for p in range(n_pairs // 4 * 4, n_pairs):
        a, c = row + 68 * p, row + 68 * p + 34
        sums = last_pair(pair_q8_0(a, c), x, scales, p, half_at(a), half_at(c), sums)
        rest += last_minima(scales, p, half_at(a), half_at(c))
    return total(sums) + total_of_upper_half(low) + rest


# ---- super-blocks of 256


@kernel
def row_q4_k(row: int, x: int, scales: int, n_blocks: int) -> float:
    """One row of Q4_K, with x in "planes"."""
    sums, low = no_floats(), no_floats()
    for b in range(n_blocks):
        block, at = row + 144 * b, x + 256 * b
        read_ahead(block, 144)
        factors = simd.times(scales_q4_k(block), load_floats(scales + 64 * b))
        low = simd.add(low, factors)  # its upper half: minima times sums
        first, second = load_bytes(block + 16), load_bytes(block + 80)
        dots = dot4(no_ints(), masked(first, 15), load_bytes(at))
        sums = fused(to_floats(dots), lanes.scales_02(factors), sums)
        dots = dot4(no_ints(), masked(first, 240), load_bytes(at + 64))
        sums = fused(to_floats(dots), lanes.scales_13(factors), sums)
        dots = dot4(no_ints(), masked(second, 15), load_bytes(at + 128))
        sums = fused(to_floats(dots), lanes.scales_46(factors), sums)
        dots = dot4(no_ints(), masked(second, 240), load_bytes(at + 192))
        sums = fused(to_floats(dots), lanes.scales_57(factors), sums)
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


# ---- an odd number of blocks of 32, by way of levels_row


@kernel
def row_of_levels(q: int, table: int, x: int, scales: int, n_pairs: int, has_minima: bool) -> float:
    """A row already taken apart: q, and at table + 256 b the b-th block's scale, its minimum 64 bytes on."""
    sums, low, minima = no_floats(), np.float32(0.0), 64 if has_minima else 0
    for p in range(n_pairs):
        a, b, at = table + 512 * p, table + 512 * p + 256, scales + 128 * (p // 4) + 16 * (p % 4)
        factors = by_half(float_at(a) * float_at(at), float_at(b) * float_at(at + 8))
        sums = fused(to_floats(dot4(no_ints(), load_bytes(q + 64 * p), load_bytes(x + 64 * p))), factors, sums)
        low += float_at(a + minima) * (float_at(at + 64) + float_at(at + 68))
        low += float_at(b + minima) * (float_at(at + 72) + float_at(at + 76))
    return total(sums) + low
