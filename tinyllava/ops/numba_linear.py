"""linear for many tokens: weights become tiles piece by piece, tiles meet the quantized activations.

    quantize_tokens    x (n, d) float32 -> records of TOKENS tokens x 32 or 64 columns
    multiply_blocks    for each panel of rows: take its blocks apart, interleave 16 rows, multiply all tokens by it
    multiply_floats    the same for float32 weights and activations

A panel's tiles fit the second-level cache and are used for all tokens before the next panel is unpacked: no copy
of the matrix is ever made. Of a wide matrix it is a slice of columns, so that tokens fit the first-level cache.
The layouts of the records are tile.py's. Reference of all: NumpyOps.linear.
"""

from __future__ import annotations

import numpy as np

from tinyllava.ops.compiled import job, kernel
from tinyllava.ops.formats import levels_row
from tinyllava.ops.instructions import (
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
from tinyllava.ops.rounding import X_WORD, best_step, extreme, quantize_bytes, quantize_words, words_of_columns
from tinyllava.ops.team import floats_at, numbers_at
from tinyllava.ops.tile import (
    BLOCK,
    LAYOUTS,
    ROWS,
    TOKENS,
    interleave,
    outer,
    tile_minimum,
    tile_minimum_2,
    tile_offset,
    tile_offset_2,
    tile_words,
)

WORDS = len(LAYOUTS) - 1  # the number of the layout for 16-bit floats
COLUMNS = tuple(layout.columns for layout in LAYOUTS)
X_SIZE = tuple(layout.x_size for layout in LAYOUTS)
X_SCALES = tuple(layout.x_scales for layout in LAYOUTS)
X_SUMS = tuple(layout.x_sums for layout in LAYOUTS)
W_SIZE = tuple(layout.w_size for layout in LAYOUTS)
W_SCALES = tuple(layout.w_scales for layout in LAYOUTS)

SLICE = 1024  # columns that are multiplied before the next are taken apart
CHUNK = 512  # columns of 16 rows that are taken apart before they are interleaved
PIECE = 128  # the same of 16-bit floats
ROOM = 128 + ROWS * max(CHUNK + 64, 4 * PIECE + 64 + 4 * COLUMNS[WORDS])  # bytes of scratch for that


@job
def quantize_tokens(args: int, item: int, _who: int) -> None:
    """Tokens item * TOKENS ... of x (n, d) -> their records; tokens from n on are zeros."""
    a = numbers_at(args)
    x, n, d, layout, offset, to = a[0], a[1], a[2], a[3], a[4], a[5]
    columns = COLUMNS[layout]
    n_records = d // columns
    for t in range(TOKENS):
        token = TOKENS * item + t
        for b in range(n_records):
            record = to + (item * n_records + b) * X_SIZE[layout]
            if token >= n:
                clear_block(record, layout, t)
            elif layout == WORDS:
                block_of_words(x + 4 * (token * d + columns * b), record, t)
            else:
                block_of_bytes(x + 4 * (token * d + columns * b), record, layout, offset, t)


@kernel
def clear_block(record: int, layout: int, t: int) -> None:
    """A token that is not there: zeros in its part of a record."""
    size = X_SCALES[layout] // TOKENS
    for i in range(0, size, 4):
        put_int(record + t * size + i, 0)
    for i in range(t, (X_SIZE[layout] - X_SCALES[layout]) // 4, TOKENS):
        put_int(record + X_SCALES[layout] + 4 * i, 0)


@kernel
def block_of_bytes(x: int, record: int, layout: int, offset: int, t: int) -> None:
    """32 floats at x -> token t's bytes, scale and sums."""
    d = best_step(x)
    inverse = np.float32(1.0) / d if d != np.float32(0.0) else np.float32(0.0)
    both = quantize_bytes(x, inverse, record + t * BLOCK)
    first, second = np.int64(np.int32(both & 0xFFFFFFFF)), both >> 32
    put_float(record + X_SCALES[layout] + 4 * t, d)
    sums = record + X_SUMS[layout] + 4 * t
    if layout == 0:
        put_int(sums, -offset * (first + second))
    elif layout == 1:
        put_float(sums, d * np.float32(first + second))
    elif layout == 2:
        put_int(sums, -offset * first)
        put_int(sums + 4 * TOKENS, -offset * second)
    else:
        put_float(sums, d * np.float32(first))
        put_float(sums + 4 * TOKENS, d * np.float32(second))


@kernel
def block_of_words(x: int, record: int, t: int) -> None:
    """64 floats at x -> token t's words and scale."""
    d = extreme(x) / np.float32(-X_WORD)
    second = extreme(x + 128) / np.float32(-X_WORD)
    d = d if abs(d) > abs(second) else second + np.float32(0.0) * d  # NaN if either is
    inverse = np.float32(1.0) / d if d != np.float32(0.0) else np.float32(0.0)
    quantize_words(x, inverse, record + t * 128)
    quantize_words(x + 128, inverse, record + t * 128 + 64)
    put_float(record + X_SCALES[WORDS] + 4 * t, d)


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
    """n_rows <= 16 rows of d columns -> a tile of SLICE columns, those from ``begin`` on.

    CHUNK columns at a time, which fit the first-level cache.
    """
    end = min(d, begin + SLICE)
    if layout == WORDS:
        make_words(number == 1, raw + 2 * begin, row_bytes, n_rows, end - begin, tile, room)
        return
    size, step = W_SIZE[layout], CHUNK + 64  # bytes of a row in scratch; a multiple of 4096 would share cache sets
    rows = room + 128
    for start in range(begin, end, CHUNK):
        fetch_chunk(raw, row_bytes, n_rows, d, start + CHUNK, begin, end)
        n_records = (min(CHUNK, end - start) + BLOCK - 1) // BLOCK
        to = tile + (start - begin) // BLOCK * size
        for r in range(n_rows):
            here, at = raw + r * row_bytes + start * row_bytes // d, to + W_SCALES[layout] + 4 * r
            levels_row(number, here, n_records, rows + r * step, at, size, room)
        for b in range(n_records):
            interleave(rows + b * BLOCK, step, to + b * size)


@kernel
def multiply_tile(layout: int, tile: int, x: int, y: int, y_step: int, n_records: int) -> None:
    """A tile times the records of TOKENS tokens -> y."""
    if layout == 0:
        tile_offset(tile, x, y, y_step, n_records)
    elif layout == 1:
        tile_minimum(tile, x, y, y_step, n_records)
    elif layout == 2:
        tile_offset_2(tile, x, y, y_step, n_records)
    elif layout == 3:
        tile_minimum_2(tile, x, y, y_step, n_records)
    else:
        tile_words(tile, x, y, y_step, n_records)


@kernel
def start_at(y: int, y_step: int, bias: int, n: int, n_padded: int) -> None:
    """TOKENS rows of y become the bias of n numbers, or zeros if it is 0; zeros up to n_padded."""
    for t in range(TOKENS):
        row = y + t * y_step
        for i in range(0, n_padded, 16):
            put_floats(row + 4 * i, load_floats(bias + 4 * i) if bias != 0 and i + 16 <= n else no_floats())
        if bias != 0:
            for i in range(n // 16 * 16, n):
                put_float(row + 4 * i, float_at(bias + 4 * i))


@job
def multiply_blocks(args: int, item: int, who: int) -> None:
    """A panel of the matrix times all tokens -> 16 * panel columns of y (n rounded up, d_out rounded up).

    The format's number and layout; the matrix, bytes of a row, its rows and columns, tiles of a panel; records,
    groups of tokens; y and bytes from row to row; scratch, its size; the bias, or 0.
    """
    a = numbers_at(args)
    number, layout, raw, row_bytes, d_out, d, panel = a[0], a[1], a[2], a[3], a[4], a[5], a[6]
    n_groups, y, y_step, scratch = a[8], a[9], a[10], a[11] + who * a[12]
    columns, first = COLUMNS[layout], item * panel
    n_records, tile_size = (d + columns - 1) // columns, (min(SLICE, d) + columns - 1) // columns * W_SIZE[layout]
    count, room = min(panel, (d_out + ROWS - 1) // ROWS - first), scratch + panel * tile_size
    bias = a[13] + first * ROWS * 4 if a[13] != 0 else 0
    for start in range(0, d, SLICE):
        width, x = min(SLICE, d - start), a[7] + start // columns * X_SIZE[layout]
        for p in range(count):
            row, tile = (first + p) * ROWS, scratch + p * tile_size
            n_rows = min(ROWS, d_out - row)
            make_tile(number, layout, raw + row * row_bytes, row_bytes, n_rows, d, start, tile, room)
        for g in range(n_groups):
            to, tokens = y + g * TOKENS * y_step + first * ROWS * 4, x + g * n_records * X_SIZE[layout]
            if start == 0:
                start_at(to, y_step, bias, min(count * ROWS, d_out - first * ROWS), count * ROWS)
            for p in range(count):
                tile, n = scratch + p * tile_size, (width + columns - 1) // columns
                multiply_tile(layout, tile, tokens, to + p * ROWS * 4, y_step, n)


@job
def multiply_floats(args: int, item: int, who: int) -> None:
    """16 rows of a float32 matrix times all tokens -> 16 columns of y, both padded as above."""
    a = numbers_at(args)
    raw, d_out, d, x, n_groups, y, y_step, scratch = a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7] + who * a[8]
    count = min(ROWS, d_out - item * ROWS)
    w = floats_at(raw + item * ROWS * d * 4, count, d)
    tile = floats_at(scratch, d, ROWS)
    for r in range(count):
        for k in range(d):
            tile[k, r] = w[r, k]
    for g in range(n_groups):
        at = y + g * TOKENS * y_step + item * ROWS * 4
        for t in range(TOKENS):
            for r in range(ROWS):
                put_float(at + t * y_step + 4 * r, np.float32(0.0))
        outer(scratch, ROWS * 4, x + g * TOKENS * d * 4, d * 4, at, y_step, d)
