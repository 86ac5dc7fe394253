"""linear for many tokens, second half: weights become tiles piece by piece, tiles meet the tokens' records.

    multiply_blocks    for each panel of rows: take its blocks apart, interleave 16 rows, multiply all tokens by it
    multiply_floats    the same for float32 weights and activations

A panel's tiles fit the second-level cache and are used for all tokens before the next panel is unpacked: no copy
of the matrix is ever made. Of a very wide matrix it is some of the columns.
The layouts of the records are tile.py's. Reference of all: NumpyOps.linear.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinyllava.ops.cpu.compile import kernel, task
from tinyllava.ops.cpu.microkernel import (
    BLOCK,
    FLOAT_TOKENS,
    LAYOUTS,
    MINIMA_4,
    MINIMA_8,
    MINIMUM,
    OFFSET,
    ROWS,
    SIDES,
    SIGNED,
    TOKENS,
    WORDS,
    interleave,
    outer,
    tile_minimum,
    tile_offset,
    tile_words,
)
from tinyllava.ops.cpu.microkernel_k import (
    seal_minima_4,
    seal_minima_8,
    seal_signed,
    tile_minima_4,
    tile_minima_8,
    tile_signed,
)
from tinyllava.ops.cpu.quantize_activations import COLUMNS, SLICE, X_SIZE, record_of
from tinyllava.ops.cpu.simd.intrinsics import (
    bfloat_at,
    float_at,
    half_at,
    load_bfloats,
    load_floats,
    load_halves,
    no_floats,
    prefetch,
    put_float,
    put_floats,
    put_int,
)
from tinyllava.ops.cpu.simd.rounding import words_of_columns
from tinyllava.ops.cpu.thread_pool import floats_at, numbers_at
from tinyllava.ops.cpu.unpack import FIRST_SUPER, FORMATS, SUPER_BYTES, levels_row, put_quarters, put_scales

OFFSETS = tuple(form.offset for form in FORMATS.values())  # by Format.number
W_GROUPS = tuple(layout.groups for layout in LAYOUTS)
W_SIZE = tuple(layout.w_size for layout in LAYOUTS)
W_SCALES = tuple(layout.w_scales for layout in LAYOUTS)

WIDTH = 8192  # columns that are taken apart before they are multiplied
GROUPS = 16  # of TOKENS tokens, that meet a slice before the next one is read
CHUNK = 512  # columns of 16 rows that are taken apart before they are interleaved
PIECE = 128  # the same of 16-bit floats
ROW_STEP = CHUNK + 64  # bytes of a row in scratch; a multiple of 4096 would share cache sets
TABLE_BYTES = 2048  # of a super-block's 16 rows: 16 numbers each (put_scales), and of Q2_K 16 more
# In scratch: rows taken apart; for super-blocks, tables of the rows' scales and minima, then one table by columns.
TABLE_AT = ROWS * ROW_STEP
SORTED_AT = TABLE_AT + CHUNK // 256 * TABLE_BYTES
TILE_ROOM = max(SORTED_AT + TABLE_BYTES, ROWS * (4 * PIECE + 64 + 4 * COLUMNS[WORDS]))  # bytes of all that
SUMS_STEP = 4 * SIDES * ROWS  # bytes from one token's sums to the next one's
ROOM = TILE_ROOM + GROUPS * TOKENS * SUMS_STEP


# ---- weights


@kernel
def floats_of_row(raw: int, is_bfloat: bool, n: int, to: int) -> None:
    """n 16-bit floats -> float32, and zeros until the last record is full."""
    for i in range(0, n - 15, 16):
        put_floats(to + 4 * i, load_bfloats(raw + 2 * i) if is_bfloat else load_halves(raw + 2 * i))
    for i in range(n // 16 * 16, n):
        put_float(to + 4 * i, bfloat_at(raw + 2 * i) if is_bfloat else half_at(raw + 2 * i))
    for i in range(n, (n + COLUMNS[WORDS] - 1) // COLUMNS[WORDS] * COLUMNS[WORDS]):
        put_float(to + 4 * i, np.float32(0.0))


@kernel
def make_words(is_bfloat: bool, raw: int, row_bytes: int, n_rows: int, d: int, tile: int, room: int) -> None:
    """n_rows <= 16 rows of 16-bit floats -> a tile; rows that are not there become zeros.

    Rows are interleaved as float32, so that what is done for each row is done for 16 of them at once.
    """
    step, columns = 4 * PIECE + 64, room + ROWS * (4 * PIECE + 64)
    for r in range(n_rows, ROWS):
        for i in range(0, 4 * PIECE, 4):
            put_int(room + r * step + i, 0)
    for start in range(0, d, PIECE):
        n = min(PIECE, d - start)
        for r in range(n_rows):
            floats_of_row(raw + r * row_bytes + 2 * start, is_bfloat, n, room + r * step)
        for b in range((n + COLUMNS[WORDS] - 1) // COLUMNS[WORDS]):
            for part in range(0, COLUMNS[WORDS], 8):
                interleave(room + 4 * (COLUMNS[WORDS] * b + part), step, columns + 64 * part)
            words_of_columns(columns, tile + (start // COLUMNS[WORDS] + b) * W_SIZE[WORDS])


@kernel
def fetch_chunk(raw: int, row_bytes: int, n_rows: int, d: int, start: int, begin: int, end: int) -> None:
    """Ask for the next CHUNK columns of n_rows rows: no processor guesses that 16 short runs come in turn.

    After the last columns come the first of the rows below, which the next tile begins with.
    """
    if start >= end:
        raw, start = raw + n_rows * row_bytes, begin
    first, last = start * row_bytes // d, min(end, start + CHUNK) * row_bytes // d
    for r in range(n_rows):
        for at in range(raw + r * row_bytes + first, raw + r * row_bytes + last, 64):
            prefetch(at)


@kernel
def make_tile(
    number: int, layout: int, raw: int, row_bytes: int, n_rows: int, d: int, begin: int, tile: int, room: int
) -> None:
    """n_rows <= 16 rows of d columns -> a tile of WIDTH columns, those from ``begin`` on.

    CHUNK columns at a time, which fit the first-level cache.
    """
    end = min(d, begin + WIDTH)
    if layout == WORDS:
        make_words(number == 1, raw + 2 * begin, row_bytes, n_rows, end - begin, tile, room)
        return
    for start in range(begin, end, CHUNK):
        fetch_chunk(raw, row_bytes, n_rows, d, start + CHUNK, begin, end)
        to = tile + (start - begin) // COLUMNS[layout] * W_SIZE[layout]
        n_blocks = (min(CHUNK, end - start) + BLOCK - 1) // BLOCK
        here = raw + start * row_bytes // d
        if layout < MINIMA_4:
            make_records(number, layout, here, row_bytes, n_rows, n_blocks, to, room)
        else:
            make_super_records(number, layout, here, row_bytes, n_rows, n_blocks, to, room)


@kernel
def make_records(
    number: int, layout: int, raw: int, row_bytes: int, n_rows: int, n_blocks: int, to: int, room: int
) -> None:
    """n_rows <= 16 rows of n_blocks blocks -> as many records."""
    size = W_SIZE[layout]
    for r in range(n_rows):
        scales = to + W_SCALES[layout] + 4 * r
        levels_row(number, raw + r * row_bytes, n_blocks, room + r * ROW_STEP, scales, size)
    for b in range(n_blocks):
        interleave(room + b * BLOCK, ROW_STEP, to + b * size)


@kernel
def make_super_records(
    number: int, layout: int, raw: int, row_bytes: int, n_rows: int, n_blocks: int, to: int, room: int
) -> None:
    """The same for super-blocks of 256: two records for each. Their scales are interleaved as the numbers are."""
    table, sorted_, size = room + TABLE_AT, room + SORTED_AT, W_SIZE[layout]
    block_bytes = SUPER_BYTES[number - FIRST_SUPER]
    for r in range(n_rows):
        for i in range(n_blocks // 8):
            block = raw + r * row_bytes + i * block_bytes
            put_quarters(number, block, room + r * ROW_STEP + 256 * i)
            put_scales(number, block, table + TABLE_BYTES * i + 64 * r)
    for b in range(n_blocks):
        interleave(room + b * BLOCK, ROW_STEP, to + b // 4 * size + b % 4 * 16 * BLOCK)
    groups = W_GROUPS[layout]
    for i in range(n_blocks // 8):
        for part in range(4 if layout == MINIMA_8 else 2):  # 8 of the 16 scales, or minima, of each row
            numbers = table + TABLE_BYTES * i + TABLE_BYTES // 2 * (part // 2) + 32 * (part % 2)
            interleave(numbers, 64, sorted_ + 512 * part)  # (16 rows, 8 numbers) -> (8, 16)
        for half in range(2):
            record, own = to + (2 * i + half) * size, sorted_ + 64 * groups * half
            for g in range(groups):
                put_floats(record + W_SCALES[layout] + 64 * g, load_floats(own + 64 * g))
            seal(layout, record, own + 128 * groups, OFFSETS[number])


@kernel
def seal(layout: int, record: int, minima: int, offset: int) -> None:
    """The last step of a record of super_tile.py."""
    if layout == MINIMA_4:
        seal_minima_4(record, minima)
    elif layout == MINIMA_8:
        seal_minima_8(record, minima)
    else:
        seal_signed(record, offset)


@kernel
def multiply_tile(layout: int, tile: int, side: int, x: int, y: int, y_step: int, n_records: int) -> None:
    """SIDES tiles, ``side`` bytes apart, times the records of TOKENS tokens -> y."""
    if layout == OFFSET:
        tile_offset(tile, side, x, y, y_step, n_records)
    elif layout == MINIMUM:
        tile_minimum(tile, side, x, y, y_step, n_records)
    elif layout == MINIMA_4:
        tile_minima_4(tile, side, x, y, y_step, n_records)
    elif layout == MINIMA_8:
        tile_minima_8(tile, side, x, y, y_step, n_records)
    elif layout == SIGNED:
        tile_signed(tile, side, x, y, y_step, n_records)
    else:
        tile_words(tile, side, x, y, y_step, n_records)


@kernel
def start_sums(sums: int, bias: int, n: int) -> None:
    """TOKENS rows of SIDES * 16 sums become the bias of n numbers, or zeros if it is 0."""
    for t in range(TOKENS):
        row = sums + t * SUMS_STEP
        for i in range(0, SIDES * ROWS, 16):
            put_floats(row + 4 * i, load_floats(bias + 4 * i) if bias != 0 and i + 16 <= n else no_floats())
        if bias != 0:
            for i in range(n // 16 * 16, n):
                put_float(row + 4 * i, float_at(bias + 4 * i))


@kernel
def move_rows(source: int, source_step: int, to: int, step: int) -> None:
    """TOKENS rows of SIDES * 16 numbers."""
    for t in range(TOKENS):
        for i in range(0, 4 * SIDES * ROWS, 64):
            put_floats(to + t * step + i, load_floats(source + t * source_step + i))


@task
def multiply_blocks(args: int, chunk: int, thread_id: int) -> None:
    """A panel of the matrix times all tokens -> 16 * panel columns of y (n rounded up, d_out to whole SIDES).

    The format's number and layout; the matrix, bytes of a row, its rows and columns, tiles of a panel; records,
    groups of tokens; y and bytes from row to row; scratch, its size; the bias, or 0.
    """
    a = numbers_at(args)
    number, layout, raw, row_bytes, d_out, d, panel = a[0], a[1], a[2], a[3], a[4], a[5], a[6]
    scratch, columns, first = a[11] + thread_id * a[12], COLUMNS[layout], chunk * panel
    tile_size = (min(WIDTH, d) + columns - 1) // columns * W_SIZE[layout]
    count, room = min(panel, (d_out + ROWS - 1) // ROWS - first), scratch + panel * tile_size
    for start in range(0, d, WIDTH):
        for p in range(count):
            row, tile = (first + p) * ROWS, scratch + p * tile_size
            n_rows = min(ROWS, d_out - row)
            make_tile(number, layout, raw + row * row_bytes, row_bytes, n_rows, d, start, tile, room)
        for p in range(0, count, SIDES):
            side = tile_size if p + SIDES <= count else 0  # the last may be alone
            multiply_panel(a, start, (first + p) * ROWS, scratch + p * tile_size, side, room + TILE_ROOM)


@kernel
def multiply_panel(a: Any, start: int, row: int, tile: int, side: int, sums: int) -> None:
    """Columns ``start`` ... of SIDES tiles times those of all tokens.

    Slice by slice: a slice of the tiles stays in the first-level cache while some groups of tokens meet it, and
    the sums of these groups while slice after slice is added to them. They do so in scratch: rows of y are often
    a multiple of 4096 bytes apart, and would share the same few sets of that cache.
    """
    layout, d_out, d, n_groups, y_step = a[1], a[4], a[5], a[8], a[10]
    columns, size = COLUMNS[layout], X_SIZE[layout]
    y, here = a[9] + row * 4, min(SIDES * ROWS, d_out - row)
    bias = a[13] + row * 4 if a[13] != 0 else 0
    for first in range(0, n_groups, GROUPS):
        last = min(first + GROUPS, n_groups)
        for g in range(first, last):
            own = sums + (g - first) * TOKENS * SUMS_STEP
            if start == 0:
                start_sums(own, bias, here)
            else:
                move_rows(y + g * TOKENS * y_step, y_step, own, SUMS_STEP)
        for at in range(start, min(start + WIDTH, d), SLICE):
            n = (min(SLICE, d - at) + columns - 1) // columns
            w, slice_records = tile + (at - start) // columns * W_SIZE[layout], SLICE // columns
            for g in range(first, last):
                own = sums + (g - first) * TOKENS * SUMS_STEP
                record = record_of(g, at // columns, n_groups, (d + columns - 1) // columns, slice_records)
                multiply_tile(layout, w, side, a[7] + record * size, own, SUMS_STEP, n)
        for g in range(first, last):
            move_rows(sums + (g - first) * TOKENS * SUMS_STEP, SUMS_STEP, y + g * TOKENS * y_step, y_step)


@task
def multiply_floats(args: int, chunk: int, thread_id: int) -> None:
    """SIDES * 16 rows of a float32 matrix times all tokens -> as many columns of y, both padded as above."""
    a = numbers_at(args)
    raw, d_out, d, x, n_groups, y, y_step = a[0], a[1], a[2], a[3], a[4], a[5], a[6]
    scratch = a[7] + thread_id * a[8]
    columns = SIDES * ROWS
    count = min(columns, d_out - chunk * columns)
    w = floats_at(raw + chunk * columns * d * 4, count, d)
    tile = floats_at(scratch, d, columns)
    for r in range(count):
        for k in range(d):
            tile[k, r] = w[r, k]
    for g in range(n_groups):
        at = y + g * FLOAT_TOKENS * y_step + chunk * columns * 4
        for t in range(FLOAT_TOKENS):
            for r in range(columns):
                put_float(at + t * y_step + 4 * r, np.float32(0.0))
        outer(scratch, columns * 4, ROWS * 4, x + g * FLOAT_TOKENS * d * 4, d * 4, at, y_step, d)
