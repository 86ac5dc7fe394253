"""GEMV: a matrix times one token, which decoding is. Every weight is used once, so memory sets the pace.

Each chunk of a task multiplies some rows of the matrix by the quantized token. A row is read from front to back
straight out of the mapped file; its blocks are unpacked in registers (by unpack.py; the nibbles of Q4_0 and Q4_K
here, see REORDERED) and multiplied there. The token is s * p, with int8 p and a scale s for 32 columns, and the
sums of p are known (quantize_activations.py), so that what a format subtracts (its constant c, or the minima of
its groups) costs one multiplication a group and not one a weight:

    sum over a group of d * (q - c) * s * p   =   d * s * sum(q * p)  +  d * (-c * s * sum(p))
    sum over a group of (d * q + m) * s * p   =   d * s * sum(q * p)  +  m * (s * sum(p))

The last terms are the correction. Definition of all: ops/quantized.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinyllava.ops.cpu.compile import Task, kernel, placeholder, task
from tinyllava.ops.cpu.microkernel import BLOCK
from tinyllava.ops.cpu.quantize_activations import FLOAT32, NIBBLES_32, NIBBLES_K, SCALES_16, SCALES_32
from tinyllava.ops.cpu.simd import intrinsics as simd
from tinyllava.ops.cpu.simd import lanes, reduce
from tinyllava.ops.cpu.thread_pool import arguments_at
from tinyllava.ops.cpu.unpack import FLOAT_LOADS, FORMATS, Format

AHEAD = 2048  # bytes: how far ahead of its use a block is prefetched
ODD_BYTES = 576  # of scratch for each two blocks of a row of gemv_odd

# Placeholders: each format's copy of the functions below has its own values for these names (compile.specialize).
# Functions without a decorator are templates of such copies, and never compiled as they stand.
BYTES = BYTES_256 = D = QS = 0  # of a block, of 256 columns; offsets of fields
M_OR_D = 0  # the offset of m, or of d where the format has none
M_DISTANCE = 0  # bytes from d to m in an unpacked row, 0 where there is no m
UNPACK = SCALES_OF = MINIMA_OF = UNPACK_ROW = placeholder  # functions of unpack.Format
DOT_ROW = DOT_256 = REST = placeholder  # functions below
LOAD_16 = LOAD_1 = placeholder  # unpack.FLOAT_LOADS


# ---- one task for all formats


def gemv(args: int, chunk: int, _thread_id: int) -> None:
    """y (d_out,) = W x: ``per_chunk`` rows of W."""
    w, row_bytes, d_out, d_in, x, scales, y, per_chunk = arguments_at(args, 8)
    for r in range(chunk * per_chunk, min(d_out, (chunk + 1) * per_chunk)):
        simd.store_f32(y + 4 * r, DOT_ROW(w + r * row_bytes, x, scales, d_in))


# ---- 256 columns of a row


@kernel
def prefetch_ahead(block: int, size: int) -> None:
    """Prefetch the cache lines of a block further on. (Beyond the mapping it does nothing.)"""
    for i in range(0, size, 64):
        simd.prefetch(block + AHEAD + i)


@kernel
def dot_64(q: Any, x: int, scale: Any, sums: Any) -> Any:
    """sums + 64 unpacked weights times 64 of x, the 16 partial sums each with its scale."""
    return simd.fma(simd.to_f32(simd.dot4(simd.zeros_i32(), q, simd.load_i8x64(x))), scale, sums)


@kernel
def dot_4x64_by_32(q0: Any, q1: Any, q2: Any, q3: Any, x: int, factors: Any, sums: Any) -> Any:
    """sums + 4 x 64 unpacked weights times 256 of x, each 32 scaled by one of 8 factors."""
    sums = dot_64(q0, x, lanes.scales_01(factors), sums)
    sums = dot_64(q1, x + 64, lanes.scales_23(factors), sums)
    sums = dot_64(q2, x + 128, lanes.scales_45(factors), sums)
    return dot_64(q3, x + 192, lanes.scales_67(factors), sums)


def dot_256_blocks(block: int, x: int, factors: Any, sums: Any) -> Any:
    """Eight blocks of 32."""
    q0, q1 = UNPACK(block, block + BYTES), UNPACK(block + 2 * BYTES, block + 3 * BYTES)
    q2, q3 = UNPACK(block + 4 * BYTES, block + 5 * BYTES), UNPACK(block + 6 * BYTES, block + 7 * BYTES)
    return dot_4x64_by_32(q0, q1, q2, q3, x, factors, sums)


def dot_256_super(block: int, x: int, factors: Any, sums: Any) -> Any:
    """A super-block with 8 scales."""
    q0, q1, q2, q3 = UNPACK(block, 0), UNPACK(block, 1), UNPACK(block, 2), UNPACK(block, 3)
    return dot_4x64_by_32(q0, q1, q2, q3, x, factors, sums)


def dot_256_q4_0(block: int, x: int, factors: Any, sums: Any) -> Any:
    """Eight blocks of Q4_0, x in NIBBLES_32: the low nibbles of four blocks are their four first halves."""
    for i in range(2):
        nibbles, at = simd.load_4x16(block + 4 * BYTES * i + QS, BYTES), x + 128 * i
        dots = simd.dot4(simd.zeros_i32(), simd.bits_2x32(nibbles, 0, 0, 15), simd.load_i8x64(at))
        dots = simd.dot4(dots, simd.bits_2x32(nibbles, 4, 4, 15), simd.load_i8x64(at + 64))
        block_factors = lanes.scales_0123(factors) if i == 0 else lanes.scales_4567(factors)
        sums = simd.fma(simd.to_f32(dots), block_factors, sums)
    return sums


def dot_256_q4_k(block: int, x: int, factors: Any, sums: Any) -> Any:
    """A super-block of Q4_K, x in NIBBLES_K: the high nibbles are not shifted down.

    They are 16 times too large; the scales of the blocks of x that they are multiplied by are divided by 16.
    """
    first, second = simd.load_i8x64(block + QS), simd.load_i8x64(block + QS + 64)
    sums = dot_64(simd.and_mask(first, 15), x, lanes.scales_02(factors), sums)
    sums = dot_64(simd.and_mask(first, 240), x + 64, lanes.scales_13(factors), sums)
    sums = dot_64(simd.and_mask(second, 15), x + 128, lanes.scales_46(factors), sums)
    return dot_64(simd.and_mask(second, 240), x + 192, lanes.scales_57(factors), sums)


# ---- a row


def dot_row_32(row: int, x: int, scales: int, d_in: int) -> float:
    """One row with a scale for each 32 weights. ``scales`` of 256 columns of x: | 8 scales | 8 sums |."""
    sums, correction = simd.zeros(), simd.zeros()
    for b in range(d_in // 256):
        block = row + BYTES_256 * b
        prefetch_ahead(block, BYTES_256)
        factors = SCALES_OF(block) * simd.load_f32x16(scales + 64 * b)
        correction = correction + factors  # of which lanes 8 to 15 count: minima, or scales, times sums
        sums = DOT_256(block, x + 256 * b, factors, sums)
    return REST(row, x, scales, d_in, sums, correction)


def dot_row_16(row: int, x: int, scales: int, d_in: int) -> float:
    """One row with a scale for each 16 weights. ``scales`` of 256 columns of x: | 16 scales | 16 sums |."""
    sums, correction = simd.zeros(), simd.zeros()
    for b in range(d_in // 256):
        block, at = row + BYTES_256 * b, x + 256 * b
        prefetch_ahead(block, BYTES_256)
        correction = simd.fma(MINIMA_OF(block), simd.load_f32x16(scales + 128 * b + 64), correction)
        factors = SCALES_OF(block) * simd.load_f32x16(scales + 128 * b)
        sums = dot_64(UNPACK(block, 0), at, lanes.scales_0123(factors), sums)
        sums = dot_64(UNPACK(block, 1), at + 64, lanes.scales_4567(factors), sums)
        sums = dot_64(UNPACK(block, 2), at + 128, lanes.scales_89ab(factors), sums)
        sums = dot_64(UNPACK(block, 3), at + 192, lanes.scales_cdef(factors), sums)
    return reduce.sum_lanes(sums) + reduce.sum_lanes(correction)


@kernel
def no_rest(_row: int, _x: int, _scales: int, _d_in: int, sums: Any, correction: Any) -> float:
    """The product, once all super-blocks have been added up: a row is a whole number of them."""
    return reduce.sum_lanes(sums) + reduce.sum_upper_lanes(correction)


def rest_of_blocks(row: int, x: int, scales: int, d_in: int, sums: Any, correction: Any) -> float:
    """The product, with the blocks of 32 beyond whole 256 columns, two at a time."""
    rest = np.float32(0.0)  # of the correction
    for p in range(d_in // 256 * 4, d_in // 64):
        a, at = row + 2 * BYTES * p, scales + 64 * (p // 4) + 8 * (p % 4)
        b = a + BYTES
        first, second = simd.load_f16(a + D) * simd.load_f32(at), simd.load_f16(b + D) * simd.load_f32(at + 4)
        sums = dot_64(UNPACK(a, b), x + 64 * p, lanes.two_values(first, second), sums)
        first, second = simd.load_f16(a + M_OR_D), simd.load_f16(b + M_OR_D)
        rest += first * simd.load_f32(at + 32) + second * simd.load_f32(at + 36)
    return reduce.sum_lanes(sums) + reduce.sum_upper_lanes(correction) + rest


def dot_row_float(row: int, x: int, _scales: int, d_in: int) -> float:
    """One row of floating-point weights, x as float32."""
    sums, more = simd.zeros(), simd.zeros()  # two chains, since each product waits for the sum before it
    for i in range(0, d_in - 31, 32):
        sums = simd.fma(LOAD_16(row + BYTES * i), simd.load_f32x16(x + 4 * i), sums)
        more = simd.fma(LOAD_16(row + BYTES * (i + 16)), simd.load_f32x16(x + 4 * i + 64), more)
    rest = reduce.sum_lanes(sums + more)
    for i in range(d_in // 32 * 32, d_in):
        rest += LOAD_1(row + BYTES * i) * simd.load_f32(x + 4 * i)
    return rest


# ---- rows of an odd number of blocks of 32: unpacked into scratch first


def gemv_odd(args: int, chunk: int, thread_id: int) -> None:
    """As gemv. The scratch of a thread holds a row: 256 bytes for each block, at their start its d and, M_DISTANCE
    bytes on, its m; then the q of all. The odd last block is paired with 32 zeros, whose d and m are zeros, too.
    """
    w, row_bytes, d_out, d_in, x, scales, y, per_chunk, scratch, size = arguments_at(args, 10)
    n_pairs, table = (d_in // 32 + 1) // 2, scratch + thread_id * size
    q = table + 512 * n_pairs
    for i in range(512 * n_pairs - 256, ODD_BYTES * n_pairs, 64):
        simd.store_zeros(table + i)
    for r in range(chunk * per_chunk, min(d_out, (chunk + 1) * per_chunk)):
        UNPACK_ROW(w + r * row_bytes, d_in // 32, q, table, 256)
        simd.store_f32(y + 4 * r, dot_unpacked(q, table, x, scales, n_pairs, M_DISTANCE))


@kernel
def dot_unpacked(q: int, table: int, x: int, scales: int, n_pairs: int, m_distance: int) -> float:
    """An unpacked row times x, of whose 256 columns each ``scales`` are | 16 scales | 16 sums |."""
    sums, correction = simd.zeros(), np.float32(0.0)
    for p in range(n_pairs):
        a, b, at = table + 512 * p, table + 512 * p + 256, scales + 128 * (p // 4) + 16 * (p % 4)
        factors = lanes.two_values(simd.load_f32(a) * simd.load_f32(at), simd.load_f32(b) * simd.load_f32(at + 8))
        sums = dot_64(simd.load_i8x64(q + 64 * p), x + 64 * p, factors, sums)
        correction += simd.load_f32(a + m_distance) * (simd.load_f32(at + 64) + simd.load_f32(at + 68))
        correction += simd.load_f32(b + m_distance) * (simd.load_f32(at + 72) + simd.load_f32(at + 76))
    return reduce.sum_lanes(sums) + correction


# ---- each format's copies


def _dot_row(form: Format) -> Any:
    """One row of a format times a token."""
    if form.kind == "float":
        load_16, load_1 = FLOAT_LOADS[form.block.name]
        return form.specialize(dot_row_float, LOAD_16=load_16, LOAD_1=load_1)
    functions = {"UNPACK": form.unpack, "SCALES_OF": form.scales}
    if form.scales_per_32 == 2:  # with a constant c, the sums of x hold -c, and are multiplied by the scales
        return form.specialize(dot_row_16, **functions, MINIMA_OF=form.minima or form.scales)
    usual = dot_256_super if form.has_super_blocks else dot_256_blocks
    dot_256 = kernel(form.specialize(REORDERED.get(form.block.name, (usual,))[0], **functions))
    rest = no_rest
    if not form.has_super_blocks:
        offset = form.block.offset("m" if form.kind == "minimum" else "d")
        rest = kernel(form.specialize(rest_of_blocks, **functions, M_OR_D=offset))
    return form.specialize(dot_row_32, **functions, DOT_256=dot_256, REST=rest)


def _tasks(form: Format) -> tuple[Task, int]:
    """The task for a format, and the layout in which it wants the token."""
    usual = FLOAT32 if form.kind == "float" else SCALES_16 if form.scales_per_32 == 2 else SCALES_32
    layout = REORDERED.get(form.block.name, (None, usual))[1]
    return task(form.specialize(gemv, DOT_ROW=kernel(_dot_row(form)))), layout


def _odd_task(form: Format) -> Task:
    """The task for rows of an odd number of blocks of 32, which wants the token in SCALES_16."""
    distance = 64 if form.kind == "minimum" else 0
    return task(form.specialize(gemv_odd, UNPACK_ROW=form.unpack_to_memory, M_DISTANCE=distance))


# Formats whose nibbles are multiplied as they lie, and the layout of x that this takes.
REORDERED = {"Q4_0": (dot_256_q4_0, NIBBLES_32), "Q4_K": (dot_256_q4_k, NIBBLES_K)}
GEMV = {name: _tasks(form) for name, form in FORMATS.items()}
GEMV_ODD = {name: _odd_task(form) for name, form in FORMATS.items() if form.block.block_size == BLOCK}
