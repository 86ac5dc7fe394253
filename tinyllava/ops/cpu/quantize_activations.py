"""Activations become integers: x is about s * p, with p of 8 or 16 bits and one float32 scale s for some columns.

Two forms, for the two kinds of products:

    quantize_token         one token for gemv.py: int8 with a scale for 32 columns, in the format's layout
    pack_panel, pack_row   many tokens for gemm.py: packed blocks as microkernel.py has them, of NR tokens each

For each scale of 32 columns four candidates are tried, and the one with the least squared rounding error is
taken: those by which the number of largest magnitude becomes -128, -127, -126 or -125. Which is best is chance;
on normally distributed numbers the best of four has 8 % less error than any one alone. (The sign is that of -128
because 8 bits have no 128.) Where 128 columns share a scale two are tried. Definition: ops/quantized.py.
"""

from __future__ import annotations

import numpy as np

from tinyllava.ops.cpu.compile import kernel, task
from tinyllava.ops.cpu.microkernel import BLOCK, INT16, LAYOUTS, MINIMA_4, NR, OFFSET, SIGNED
from tinyllava.ops.cpu.simd import intrinsics as simd
from tinyllava.ops.cpu.simd import reduce, rounding
from tinyllava.ops.cpu.thread_pool import arguments_at, int64_at

# ---- 16 blocks of 32 columns

BLOCKS = 16  # blocks of 32 columns that are quantized together, a lane of a vector for each
# Scratch of a thread: scales, their inverses (a vector each), sums (two), then two vectors for each block.
SCALES_AT, INVERSES_AT, SUMS_AT, PARTS_AT = 0, 64, 128, 256
QUANTIZE_SCRATCH = PARTS_AT + 2 * 64 * BLOCKS
TOPS = tuple(np.float32(top) for top in (-128, -127, -126, -125))  # what the largest number may become


@kernel
def best_scales(x: int, count: int, together: bool, scratch: int) -> None:
    """The best scale of each of ``count`` blocks of 32 at x, and its inverse -> SCALES_AT, INVERSES_AT of scratch.

    ``together``: four blocks share a scale. For so many numbers one is nearly as good as another: two are tried.
    """
    parts = scratch + PARTS_AT
    for b in range(count):
        rounding.store_extremes(x + 128 * b, parts + 64 * b)
    for b in range(count, BLOCKS):
        simd.store_f32x16(parts + 64 * b, simd.zeros())
        simd.store_f32x16(parts + 64 * b + rounding.SECOND_AT, simd.zeros())
    ends = rounding.extreme_of_each(parts)
    ends = rounding.extreme_of_four(ends) if together else ends
    inverse = rounding.inverse(ends)
    best, least = simd.zeros(), simd.broadcast(np.float32(np.inf))
    for i in range(2 if together else 4):
        top = TOPS[i]
        scale = ends * simd.broadcast(np.float32(1.0) / top)
        simd.store_f32x16(scratch + INVERSES_AT, inverse * simd.broadcast(top))
        for b in range(count):
            inverse_b = simd.load_f32(scratch + INVERSES_AT + 4 * b)
            simd.store_f32x16(parts + 64 * b, rounding.rounding_errors(x + 128 * b, inverse_b))
        error = reduce.sum_each(parts) * simd.broadcast(np.float32(1.0) / (top * top))  # times ends^2
        error = rounding.sum_of_four(error) if together else error
        best = rounding.select_less(error, least, scale, best)
        least = rounding.select_less(error, least, error, least)
    best = best + least * simd.broadcast(np.float32(0.0))  # NaN where no error was finite
    simd.store_f32x16(scratch + SCALES_AT, best)
    simd.store_f32x16(scratch + INVERSES_AT, rounding.inverse(best))


# ---- one token

# The layouts of a token. For each 256 columns: 256 int8 p, and their scales s and sums
#     SCALES_32    columns in order; | 8 scales | 8 sums |
#     NIBBLES_32   the same scales; of each 128 columns, first the first 16 of four blocks of 32, then the last 16
#     NIBBLES_K    of each 128 columns, blocks 0, 2, 1, 3; the scales of blocks 1 and 3 divided by 16
#     SCALES_16    columns in order; | 16 scales | 16 sums |, for each 16 columns
# where a sum is s * sum(p), times -c in the formats with a constant c. FLOAT32 is the token as it is.
SCALES_32, NIBBLES_32, NIBBLES_K, SCALES_16, FLOAT32 = range(5)
TOKEN_CHUNK = BLOCKS * BLOCK  # columns of a chunk


@task
def quantize_token(args: int, chunk: int, thread_id: int) -> None:
    """TOKEN_CHUNK columns of a token x (d,) -> int8 at q, scales and sums at ``scales``."""
    x, d, layout, c, q, scales, scratch = arguments_at(args, 7)
    first, scratch = TOKEN_CHUNK * chunk, scratch + thread_id * QUANTIZE_SCRATCH
    x, q, count = x + 4 * first, q + first, min(TOKEN_CHUNK, d - first) // BLOCK
    best_scales(x, count, False, scratch)
    parts, inverses = scratch + PARTS_AT, scratch + INVERSES_AT
    for b in range(count):
        slot = b ^ 3 if layout == NIBBLES_K and b % 4 in (1, 2) else b  # blocks 0, 2, 1, 3
        rounding.quantize_int8(x + 128 * b, simd.load_f32(inverses + 4 * b), q + BLOCK * slot, parts + 64 * b)
    if layout == NIBBLES_32:  # of whole 256 columns: gemv.rest_of_blocks unpacks the rest in order
        for i in range(0, count // 8 * 256, 128):
            simd.split_halves(q + i)
    factor = simd.broadcast(np.float32(-c) if c else np.float32(1.0))
    factors = simd.load_f32x16(scratch + SCALES_AT) * factor
    # The sums of the first 16 columns of each block, and of the others.
    simd.store_f32x16(scratch + SUMS_AT, factors * reduce.sum_each(parts))
    simd.store_f32x16(scratch + SUMS_AT + 64, factors * reduce.sum_each(parts + rounding.SECOND_AT))
    bytes_of_32 = 16 if layout == SCALES_16 else 8  # of scales and sums
    put_token_scales(scratch, count, layout, scales + bytes_of_32 * BLOCKS * chunk)


@kernel
def put_token_scales(scratch: int, count: int, layout: int, to: int) -> None:
    """The scales and sums of ``count`` blocks in the scratch -> where a layout has them."""
    for b in range(count):
        scale = simd.load_f32(scratch + SCALES_AT + 4 * b)
        first, second = simd.load_f32(scratch + SUMS_AT + 4 * b), simd.load_f32(scratch + SUMS_AT + 64 + 4 * b)
        if layout == SCALES_16:
            at = to + 128 * (b // 8) + 8 * (b % 8)
            simd.store_f32(at, scale)
            simd.store_f32(at + 4, scale)
            simd.store_f32(at + 64, first)
            simd.store_f32(at + 68, second)
        else:
            at = to + 64 * (b // 8) + 4 * (b % 8)
            simd.store_f32(at, scale * np.float32(0.0625) if layout == NIBBLES_K and b % 2 else scale)
            simd.store_f32(at + 32, first + second)
    if count % 2:  # gemv_odd reads the block that an odd last one is paired with, and 0 * NaN would be NaN
        at = to + 128 * (count // 8) + 8 * (count % 8)
        for i in (0, 4, 64, 68):
            simd.store_f32(at + i, np.float32(0.0))


# ---- many tokens

KC = 1024  # columns that GEMM multiplies at a time: of MR rows they are 36 to 46 KB, about the L1 cache
# By layout (microkernel.py): columns of a packed block, its bytes, where its scales and sums begin.
COLUMNS = tuple(layout.columns for layout in LAYOUTS)
X_SIZE = tuple(layout.x_size for layout in LAYOUTS)
X_SCALES = tuple(layout.x_scales for layout in LAYOUTS)
X_SUMS = tuple(layout.x_sums for layout in LAYOUTS)


@kernel
def packed_block(panel: int, b: int, n_panels: int, n_blocks: int, kc_blocks: int) -> int:
    """The number of a panel's b-th block among all packed blocks: KC columns of all panels, then the next KC."""
    first = b // kc_blocks * kc_blocks
    return first * n_panels + panel * min(kc_blocks, n_blocks - first) + b - first


@task
def pack_panel(args: int, chunk: int, thread_id: int) -> None:
    """Panel ``chunk`` of x (n, d): NR tokens, zeros for those from n on."""
    x, n, d, layout, c, packed, n_panels, scratch = arguments_at(args, 8)
    for token in range(NR * chunk, NR * (chunk + 1)):
        at = x + 4 * token * d if token < n else 0
        pack_token(at, token, d, layout, c, packed, n_panels, scratch + thread_id * QUANTIZE_SCRATCH)


@task
def pack_row(args: int, chunk: int, thread_id: int) -> None:
    """Row ``chunk`` of x (n, d) over what pack_panel packed for the token whose number stands in ``places``."""
    x, places, d, layout, c, packed, n_panels, scratch = arguments_at(args, 8)
    token = int64_at(places + 8 * chunk)
    pack_token(x + 4 * chunk * d, token, d, layout, c, packed, n_panels, scratch + thread_id * QUANTIZE_SCRATCH)


@kernel
def pack_token(
    x: int, token: int, d: int, layout: int, c: int, packed: int, n_panels: int, scratch: int
) -> None:
    """One token's d numbers at x, or zeros if x is 0, into its packed blocks; c is the format's constant."""
    panel, t, columns, size = token // NR, token % NR, COLUMNS[layout], X_SIZE[layout]
    for start in range(0, d, KC):
        at = packed + packed_block(panel, start // columns, n_panels, d // columns, KC // columns) * size
        count = min(KC, d - start) // columns
        if x == 0:
            for b in range(count):
                clear_token(at + b * size, layout, t)
        elif layout == INT16:
            for b in range(count):
                pack_int16(x + 4 * (start + columns * b), at + b * size, t)
        else:
            for b in range(0, count * columns // BLOCK, BLOCKS):
                few, block = min(BLOCKS, count * columns // BLOCK - b), at + b * BLOCK // columns * size
                pack_int8(x + 4 * (start + BLOCK * b), few, block, layout, c, t, scratch)


@kernel
def clear_token(block: int, layout: int, t: int) -> None:
    """Token t of a packed block: zeros."""
    size, more = X_SCALES[layout] // NR, (X_SIZE[layout] - X_SUMS[layout]) // NR
    for i in range(0, size, 4):
        simd.store_i32(block + t * size + i, 0)
    simd.store_i32(block + X_SCALES[layout] + 4 * t, 0)
    for i in range(0, more, 4):
        simd.store_i32(block + X_SUMS[layout] + t * more + i, 0)


@kernel
def pack_int8(x: int, count: int, block: int, layout: int, c: int, t: int, scratch: int) -> None:
    """``count`` <= 16 blocks of 32 floats at x -> token t's int8, scales and sums in their packed blocks."""
    each = COLUMNS[layout] // BLOCK  # blocks of 32 in a packed block
    best_scales(x, count, each > 1, scratch)
    parts, size = scratch + PARTS_AT, X_SIZE[layout]
    for b in range(count):
        q = block + b // each * size + (t * each + b % each) * BLOCK
        rounding.quantize_int8(x + 128 * b, simd.load_f32(scratch + INVERSES_AT + 4 * b), q, parts + 64 * b)
        if layout == SIGNED:
            rounding.add_128_at(q)
    for b in range(0, count, each):
        scale = simd.load_f32(scratch + SCALES_AT + 4 * b)
        simd.store_f32(block + b // each * size + X_SCALES[layout] + 4 * t, scale)
    if layout < MINIMA_4:
        totals = reduce.sum_each(parts) + reduce.sum_each(parts + rounding.SECOND_AT)
        if layout == OFFSET:
            rounding.store_as_i32(scratch + SUMS_AT, totals * simd.broadcast(np.float32(-c)))
        else:
            simd.store_f32x16(scratch + SUMS_AT, totals * simd.load_f32x16(scratch + SCALES_AT))
        for b in range(count):
            simd.store_i32(block + b * size + X_SUMS[layout] + 4 * t, simd.load_u32(scratch + SUMS_AT + 4 * b))
    elif layout != SIGNED:
        put_group_sums(count, block + X_SUMS[layout], layout, t, scratch)


@kernel
def put_group_sums(count: int, to: int, layout: int, t: int, scratch: int) -> None:
    """The sums of token t's groups of 32 or 16 int8, as int16; ``to`` is where the first block's sums begin."""
    first, second = reduce.sum_each(scratch + PARTS_AT), reduce.sum_each(scratch + PARTS_AT + rounding.SECOND_AT)
    by_32 = layout == MINIMA_4
    rounding.store_as_i32(scratch + SUMS_AT, first + second if by_32 else first)
    rounding.store_as_i32(scratch + SUMS_AT + 64, second)
    for b in range(count):
        at = to + b // 4 * X_SIZE[layout] + (8 * t + 2 * (b % 4) if by_32 else 16 * t + 4 * (b % 4))
        simd.store_i16(at, simd.load_u32(scratch + SUMS_AT + 4 * b))
        if not by_32:
            simd.store_i16(at + 2, simd.load_u32(scratch + SUMS_AT + 64 + 4 * b))


@kernel
def pack_int16(x: int, block: int, t: int) -> None:
    """64 floats at x -> token t's int16 and scale."""
    d = rounding.extreme(x) / np.float32(-rounding.X_INT16)
    second = rounding.extreme(x + 128) / np.float32(-rounding.X_INT16)
    d = d if abs(d) > abs(second) else second + np.float32(0.0) * d  # NaN if either is
    inverse = np.float32(1.0) / d if d != np.float32(0.0) else np.float32(0.0)
    rounding.quantize_int16(x, inverse, block + t * 128)
    rounding.quantize_int16(x + 128, inverse, block + t * 128 + 64)
    simd.store_f32(block + X_SCALES[INT16] + 4 * t, d)
