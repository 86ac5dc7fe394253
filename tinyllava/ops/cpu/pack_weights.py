"""Weights become packed panels for GEMM: LANES rows are unpacked, and their numbers interleaved column by column.

    pack_blocks         blocks of 32            -> a packed block each
    pack_super_blocks   super-blocks of 256     -> two packed blocks each
    pack_float16        16-bit floating point   -> int16, packed blocks of 64 columns

A panel is packed PACK_CHUNK columns at a time, which stay in the L1 cache from unpacking to interleaving. Some
panels are packed, then multiplied by all tokens, before the next ones: a copy of the whole matrix is never made.
The packed blocks are those of microkernel.py and microkernel_k.py. Each format has copies of these functions:
PACK.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinyllava.ops.cpu.compile import kernel, placeholder
from tinyllava.ops.cpu.microkernel import (
    BLOCK,
    INT16,
    LANES,
    LAYOUTS,
    MINIMA_4,
    MINIMA_8,
    MINIMUM,
    OFFSET,
    SIGNED,
    interleave,
)
from tinyllava.ops.cpu.microkernel_k import FINISH
from tinyllava.ops.cpu.simd import intrinsics as simd
from tinyllava.ops.cpu.simd import rounding
from tinyllava.ops.cpu.unpack import FLOAT_LOADS, FORMATS, SUPER_MINIMA, Format

PACK_COLUMNS = 8192  # columns of a panel that are packed before they are multiplied
PACK_CHUNK = 512  # columns of LANES rows that are unpacked before they are interleaved
FLOAT_CHUNK = 128  # the same of 16-bit floating point
ROW_STRIDE = PACK_CHUNK + 64  # bytes of a row in scratch; a multiple of 4096 would share cache sets
TABLE_BYTES = 2 * SUPER_MINIMA  # for a super-block of LANES rows: 16 scales each, and of Q2_K 16 minima each
# In scratch: LANES rows of q; for super-blocks, the scales and minima row by row (two tables), then interleaved:
# | 8 scales, of 16 rows each | 8 more, or 8 minima | of Q2_K twice 8 minima |.
TABLE_AT = LANES * ROW_STRIDE
SORTED_AT = TABLE_AT + PACK_CHUNK // 256 * TABLE_BYTES
FLOAT_STRIDE = 4 * FLOAT_CHUNK + 64
FLOAT_SCRATCH = LANES * (FLOAT_STRIDE + 4 * LAYOUTS[INT16].columns)
PACK_SCRATCH = max(SORTED_AT + TABLE_BYTES, FLOAT_SCRATCH)

# Placeholders: each format's copy of the functions below has its own values for these names (compile.specialize).
BYTES = C = GROUPS = COLUMNS = W_SIZE = W_SCALES = 0
HAS_16_MINIMA = False
UNPACK_TO_MEMORY = placeholder  # unpack_row or unpack_super_block
PACK_BLOCKS = FINISH_BLOCK = WIDEN_ROW = placeholder  # functions below
LOAD_16 = LOAD_1 = placeholder  # unpack.FLOAT_LOADS


def layout_of(form: Format) -> int:
    """Which of LAYOUTS the packed blocks of a format have."""
    if form.kind == "float":
        return INT16
    if not form.has_super_blocks:
        return OFFSET if form.kind == "offset" else MINIMUM
    if form.kind == "offset":
        return SIGNED
    return MINIMA_4 if form.scales_per_32 == 1 else MINIMA_8


# ---- blocks


def pack_panel(w: int, row_bytes: int, n_rows: int, d: int, begin: int, panel: int, scratch: int) -> None:
    """n_rows <= LANES rows of d columns: columns ``begin`` ... of them, PACK_COLUMNS at most -> a packed panel."""
    end = min(d, begin + PACK_COLUMNS)
    for start in range(begin, end, PACK_CHUNK):
        prefetch_chunk(w, row_bytes, n_rows, d, start + PACK_CHUNK, begin, end)
        n_blocks = (min(PACK_CHUNK, end - start) + BLOCK - 1) // BLOCK
        to = panel + (start - begin) // COLUMNS * W_SIZE
        PACK_BLOCKS(w + start * row_bytes // d, row_bytes, n_rows, n_blocks, to, scratch)


@kernel
def prefetch_chunk(w: int, row_bytes: int, n_rows: int, d: int, start: int, begin: int, end: int) -> None:
    """Prefetch the next PACK_CHUNK columns of n_rows rows: no processor guesses that 16 short runs come in turn.

    After the last columns come the first of the rows below, with which the next panel begins.
    """
    if start >= end:
        w, start = w + n_rows * row_bytes, begin
    first, last = start * row_bytes // d, min(end, start + PACK_CHUNK) * row_bytes // d
    for r in range(n_rows):
        for at in range(w + r * row_bytes + first, w + r * row_bytes + last, 64):
            simd.prefetch(at)


def pack_blocks(w: int, row_bytes: int, n_rows: int, n_blocks: int, to: int, scratch: int) -> None:
    """n_rows rows of n_blocks blocks of 32 -> n_blocks packed blocks.

    Rows from n_rows on hold what was there before: their columns of y are cut off.
    """
    for r in range(n_rows):
        UNPACK_TO_MEMORY(w + r * row_bytes, n_blocks, scratch + r * ROW_STRIDE, to + W_SCALES + 4 * r, W_SIZE)
    for b in range(n_blocks):
        interleave(scratch + b * BLOCK, ROW_STRIDE, to + b * W_SIZE)


def pack_super_blocks(w: int, row_bytes: int, n_rows: int, n_blocks: int, to: int, scratch: int) -> None:
    """The same for super-blocks, of ``n_blocks`` times 32 columns. Scales are interleaved as the q are."""
    table, columns = scratch + TABLE_AT, scratch + SORTED_AT
    for r in range(n_rows):
        for i in range(n_blocks // 8):
            q, scales = scratch + r * ROW_STRIDE + 256 * i, table + TABLE_BYTES * i + 64 * r
            UNPACK_TO_MEMORY(w + r * row_bytes + i * BYTES, q, scales)
    for b in range(n_blocks):
        interleave(scratch + b * BLOCK, ROW_STRIDE, to + b // 4 * W_SIZE + b % 4 * LANES * BLOCK)
    for i in range(n_blocks // 8):
        for part in range(4 if HAS_16_MINIMA else 2):  # 8 of the 16 scales, or minima, of each row
            numbers = table + TABLE_BYTES * i + SUPER_MINIMA * (part // 2) + 32 * (part % 2)
            interleave(numbers, 64, columns + 512 * part)  # (16 rows, 8 numbers) -> (8, 16)
        for half in range(2):
            block, scales = to + (2 * i + half) * W_SIZE, columns + 64 * GROUPS * half
            for g in range(GROUPS):
                simd.store_f32x16(block + W_SCALES + 64 * g, simd.load_f32x16(scales + 64 * g))
            FINISH_BLOCK(block, scales + 128 * GROUPS, C)


# ---- 16-bit floating point


def pack_float16(w: int, row_bytes: int, n_rows: int, d: int, begin: int, panel: int, scratch: int) -> None:
    """As pack_panel; rows that are not there become zeros.

    Rows are interleaved as float32, so that what is done for each row is done for LANES of them at once.
    """
    end, columns = min(d, begin + PACK_COLUMNS), scratch + LANES * FLOAT_STRIDE
    for r in range(n_rows, LANES):
        for i in range(0, 4 * FLOAT_CHUNK, 4):
            simd.store_i32(scratch + r * FLOAT_STRIDE + i, 0)
    for start in range(begin, end, FLOAT_CHUNK):
        n, to = min(FLOAT_CHUNK, end - start), panel + (start - begin) // COLUMNS * W_SIZE
        for r in range(n_rows):
            WIDEN_ROW(w + r * row_bytes + 2 * start, n, scratch + r * FLOAT_STRIDE)
        for b in range((n + COLUMNS - 1) // COLUMNS):
            for part in range(0, COLUMNS, 8):
                interleave(scratch + 4 * (COLUMNS * b + part), FLOAT_STRIDE, columns + 64 * part)
            rounding.pack_int16_columns(columns, to + b * W_SIZE)


def widen_row(row: int, n: int, to: int) -> None:
    """n 16-bit floating-point numbers -> float32, and zeros up to a whole packed block."""
    for i in range(0, n - 15, 16):
        simd.store_f32x16(to + 4 * i, LOAD_16(row + 2 * i))
    for i in range(n // 16 * 16, n):
        simd.store_f32(to + 4 * i, LOAD_1(row + 2 * i))
    for i in range(n, (n + COLUMNS - 1) // COLUMNS * COLUMNS):
        simd.store_f32(to + 4 * i, np.float32(0.0))


# ---- each format's copy


def _pack(form: Format) -> Any:
    """The function with pack_panel's arguments that packs a format."""
    which = layout_of(form)
    layout = LAYOUTS[which]
    sizes = {"COLUMNS": layout.columns, "W_SIZE": layout.w_size, "W_SCALES": layout.w_scales}
    if form.kind == "float":
        load_16, load_1 = FLOAT_LOADS[form.block.name]
        widen = kernel(form.specialize(widen_row, **sizes, LOAD_16=load_16, LOAD_1=load_1))
        return kernel(form.specialize(pack_float16, **sizes, WIDEN_ROW=widen))
    if form.has_super_blocks:
        pack = form.specialize(
            pack_super_blocks, **sizes, UNPACK_TO_MEMORY=form.unpack_to_memory, C=form.c, GROUPS=layout.groups,
            HAS_16_MINIMA=form.minima is not None, FINISH_BLOCK=FINISH[which],
        )  # fmt: skip
    else:
        pack = form.specialize(pack_blocks, **sizes, UNPACK_TO_MEMORY=form.unpack_to_memory)
    return kernel(form.specialize(pack_panel, **sizes, PACK_BLOCKS=kernel(pack)))


PACK = {name: _pack(form) for name, form in FORMATS.items() if name != "F32"}
