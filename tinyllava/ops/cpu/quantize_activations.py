"""linear for many tokens, first half: activations x (n, d) become records, as tile.py has them.

Sixteen blocks of 32 numbers are rounded at a time, so that what is decided for a block (the step, which of four is
best) is decided for 16 in one vector. Reference of the rounding itself: best_step in rounding.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinyllava.ops.cpu.compile import kernel, task
from tinyllava.ops.cpu.microkernel import BLOCK, LAYOUTS, MINIMA_4, OFFSET, SIGNED, TOKENS, WORDS
from tinyllava.ops.cpu.simd.intrinsics import (
    add,
    everywhere,
    float_at,
    load_floats,
    no_floats,
    put_float,
    put_floats,
    put_int,
    put_short,
    times,
    word_at,
)
from tinyllava.ops.cpu.simd.reduce import sums_of_each
from tinyllava.ops.cpu.simd.rounding import (
    X_WORD,
    extreme,
    extremes_of_each,
    extremes_of_four,
    flip_signs,
    inverse_or_zero,
    put_ends,
    put_ints,
    put_rounded,
    quantize_words,
    rounding_errors,
    sums_of_four,
    where_less,
)
from tinyllava.ops.cpu.thread_pool import numbers_at

COLUMNS = tuple(layout.columns for layout in LAYOUTS)
X_SIZE = tuple(layout.x_size for layout in LAYOUTS)
X_SCALES = tuple(layout.x_scales for layout in LAYOUTS)
X_SUMS = tuple(layout.x_sums for layout in LAYOUTS)

SLICE = 1024  # columns that are multiplied by some groups of tokens before the next
BLOCKS = 16  # that are rounded together
# Scratch of a thread: steps, their inverses (a vector each), sums (two), then two vectors for each block.
STEPS, INVERSES, SUMS, PARTS = 0, 64, 128, 256
QUANTIZE_ROOM = PARTS + 2 * 64 * BLOCKS
TOPS = tuple(np.float32(top) for top in (-128, -127, -126, -125))  # what a block's largest number may become


@kernel
def record_of(group: int, b: int, n_groups: int, n_records: int, slice_records: int) -> int:
    """Where the b-th record of a group of tokens stands: slice by slice, and group by group in each."""
    first = b // slice_records * slice_records
    return first * n_groups + group * min(slice_records, n_records - first) + b - first


@task
def quantize_tokens(args: int, chunk: int, thread_id: int) -> None:
    """Tokens chunk * TOKENS ... of x (n, d) -> their records; tokens from n on are zeros.

    x, n, d, layout, the constant c, where the records go, scratch, groups of tokens that there will be.
    """
    a = numbers_at(args)
    for token in range(TOKENS * chunk, TOKENS * (chunk + 1)):
        x = a[0] + 4 * token * a[2] if token < a[1] else 0
        quantize_token(x, token, a, a[6] + thread_id * QUANTIZE_ROOM)


@task
def quantize_others(args: int, chunk: int, thread_id: int) -> None:
    """Row ``chunk`` of x (n, d) in another token's place. Arguments as above, and n tokens' numbers (int64)."""
    a = numbers_at(args)
    token = numbers_at(a[8] + 8 * chunk)[0]
    quantize_token(a[0] + 4 * chunk * a[2], token, a, a[6] + thread_id * QUANTIZE_ROOM)


@kernel
def quantize_token(x: int, token: int, a: Any, room: int) -> None:
    """One token's d numbers at x, or zeros if x is 0, into its records."""
    d, layout, group, t = a[2], a[3], token // TOKENS, token % TOKENS
    columns, size = COLUMNS[layout], X_SIZE[layout]
    for start in range(0, d, SLICE):
        at = a[5] + record_of(group, start // columns, a[7], d // columns, SLICE // columns) * size
        count = min(SLICE, d - start) // columns
        if x == 0:
            for b in range(count):
                clear_block(at + b * size, layout, t)
        elif layout == WORDS:
            for b in range(count):
                block_of_words(x + 4 * (start + columns * b), at + b * size, t)
        else:
            for b in range(0, count * columns // BLOCK, BLOCKS):
                few, record = min(BLOCKS, count * columns // BLOCK - b), at + b * BLOCK // columns * size
                blocks_of_bytes(x + 4 * (start + BLOCK * b), few, record, layout, a[4], t, room)


@kernel
def clear_block(record: int, layout: int, t: int) -> None:
    """A token that is not there: zeros in its part of a record."""
    size, more = X_SCALES[layout] // TOKENS, (X_SIZE[layout] - X_SUMS[layout]) // TOKENS
    for i in range(0, size, 4):
        put_int(record + t * size + i, 0)
    put_int(record + X_SCALES[layout] + 4 * t, 0)
    for i in range(0, more, 4):
        put_int(record + X_SUMS[layout] + t * more + i, 0)


@kernel
def best_steps(x: int, count: int, together: bool, room: int) -> None:
    """The best step of each of ``count`` blocks at x, and its inverse -> STEPS and INVERSES of the scratch.

    ``together``: four blocks share a step. For so many numbers one is nearly as good as another: two are tried.
    """
    parts = room + PARTS
    for b in range(count):
        put_ends(x + 128 * b, parts + 64 * b)
    for b in range(count, BLOCKS):
        put_floats(parts + 64 * b, no_floats())
        put_floats(parts + 64 * b + 1024, no_floats())
    ends = extremes_of_each(parts)
    ends = extremes_of_four(ends) if together else ends
    inverse = inverse_or_zero(ends)
    best, least = no_floats(), everywhere(np.float32(np.inf))
    for i in range(2 if together else 4):
        top = TOPS[i]
        step = times(ends, everywhere(np.float32(1.0) / top))
        put_floats(room + INVERSES, times(inverse, everywhere(top)))
        for b in range(count):
            put_floats(parts + 64 * b, rounding_errors(x + 128 * b, float_at(room + INVERSES + 4 * b)))
        error = times(sums_of_each(parts), everywhere(np.float32(1.0) / (top * top)))  # times ends^2, as all are
        error = sums_of_four(error) if together else error
        best, least = where_less(error, least, step, best), where_less(error, least, error, least)
    best = add(best, times(least, everywhere(np.float32(0.0))))  # NaN, if a number is not finite: no error is less
    put_floats(room + STEPS, best)
    put_floats(room + INVERSES, inverse_or_zero(best))


@kernel
def blocks_of_bytes(x: int, count: int, record: int, layout: int, offset: int, t: int, room: int) -> None:
    """``count`` <= 16 blocks of 32 floats at x -> token t's bytes, scales and sums in their records."""
    each = COLUMNS[layout] // BLOCK  # blocks of a record
    best_steps(x, count, each > 1, room)
    parts, size = room + PARTS, X_SIZE[layout]
    for b in range(count):
        to = record + b // each * size + (t * each + b % each) * BLOCK
        put_rounded(x + 128 * b, float_at(room + INVERSES + 4 * b), to, parts + 64 * b)
        if layout == SIGNED:
            flip_signs(to)
    for b in range(0, count, each):
        put_float(record + b // each * size + X_SCALES[layout] + 4 * t, float_at(room + STEPS + 4 * b))
    if layout < MINIMA_4:
        totals = add(sums_of_each(parts), sums_of_each(parts + 1024))
        if layout == OFFSET:
            put_ints(room + SUMS, times(totals, everywhere(np.float32(-offset))))
        else:
            put_floats(room + SUMS, times(totals, load_floats(room + STEPS)))
        for b in range(count):
            put_int(record + b * size + X_SUMS[layout] + 4 * t, word_at(room + SUMS + 4 * b))
    elif layout != SIGNED:
        put_group_sums(count, record + X_SUMS[layout], layout, t, room)


@kernel
def put_group_sums(count: int, to: int, layout: int, t: int, room: int) -> None:
    """The sums of token t's groups of 32 or 16 bytes, as int16; ``to`` is where the first record's sums begin."""
    first, second = sums_of_each(room + PARTS), sums_of_each(room + PARTS + 1024)
    if layout == MINIMA_4:
        put_ints(room + SUMS, add(first, second))
        for b in range(count):
            put_short(to + b // 4 * X_SIZE[layout] + 8 * t + 2 * (b % 4), word_at(room + SUMS + 4 * b))
    else:
        put_ints(room + SUMS, first)
        put_ints(room + SUMS + 64, second)
        for b in range(count):
            at = to + b // 4 * X_SIZE[layout] + 16 * t + 4 * (b % 4)
            put_short(at, word_at(room + SUMS + 4 * b))
            put_short(at + 2, word_at(room + SUMS + 64 + 4 * b))


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
