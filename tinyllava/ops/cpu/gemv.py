"""linear for one token, which decoding is: every weight is used once, so memory sets the pace.

Each task multiplies some rows of a matrix, read from front to back straight out of the mapped file, with one
quantized token; the blocks come apart in registers. The task ``quantize_token`` prepares the token:

    bytes     s8 for each column, in order
    eights    for each 256: | 8 scales | 8 sums |                          Q4_1 Q5_0 Q5_1 Q8_0 Q5_K
    halves    the same; bytes of each 128: four first halves of 32, then four second halves      Q4_0
    planes    the same; bytes of each 128: blocks 0, 2, 1, 3; scales of 1 and 3 divided by 16    Q4_K
    sixteens  for each 256: | 16 scales | 16 sums |, of 16 columns each    the other K formats, and any odd row

where a sum is d * sum(bytes), times -c in the formats with a constant c,

so that what is subtracted (c, or the blocks' minima) costs a multiplication per block, not one per weight. Halves
and planes are the orders in which 64 bytes of nibbles give up their lower and their upper ones; the upper ones of
Q4_K stay where they are, 16 times too large, which the scales make good.
Reference of all: NumpyOps.linear.
"""

from __future__ import annotations

import numpy as np

from tinyllava.ops.cpu.compile import kernel, task
from tinyllava.ops.cpu.gemv_rows import (
    row_of_levels,
    row_q2_k,
    row_q3_k,
    row_q4_0,
    row_q4_1,
    row_q4_k,
    row_q5_0,
    row_q5_1,
    row_q5_k,
    row_q6_k,
    row_q8_0,
)
from tinyllava.ops.cpu.simd.intrinsics import (
    add,
    bfloat_at,
    clear_bytes,
    float_at,
    fused,
    half_at,
    load_bfloats,
    load_floats,
    load_halves,
    no_floats,
    part_halves,
    put_float,
)
from tinyllava.ops.cpu.simd.reduce import total
from tinyllava.ops.cpu.simd.rounding import best_step, quantize_bytes
from tinyllava.ops.cpu.thread_pool import numbers_at
from tinyllava.ops.cpu.unpack import levels_row

EIGHTS, HALVES, PLANES, SIXTEENS, FLOATS = 0, 1, 2, 3, 4
PART = 256  # columns of a token that are one chunk: no form's order goes beyond them


@task
def quantize_token(args: int, chunk: int, _thread_id: int) -> None:
    """PART columns of a token. Arguments: x, d, form, constant c of the weights' format, bytes, scales."""
    a = numbers_at(args)
    first, d = PART * chunk, min(PART, a[1] - PART * chunk)
    size = 128 if a[2] == SIXTEENS else 64  # of the scales and sums of 256 columns
    quantize_part(a[0] + 4 * first, d, a[2], a[3], a[4] + first, a[5] + size * chunk)


@kernel
def quantize_part(x: int, d: int, form: int, offset: int, to: int, scales: int) -> None:
    """x (d,) float32 at an address -> bytes at ``to`` and scales and sums at ``scales``."""
    factor = np.float32(-offset) if offset else np.float32(1.0)
    for b in range(d // 32):
        step = best_step(x + 128 * b)
        inverse = np.float32(1.0) / step if step != np.float32(0.0) else np.float32(0.0)
        place = b ^ 3 if form == PLANES and (b + 1) & 2 else b  # 0, 2, 1, 3
        both = quantize_bytes(x + 128 * b, inverse, to + 32 * place)
        first = step * factor * np.float32(np.int32(both & 0xFFFFFFFF))
        second = step * factor * np.float32(both >> 32)
        if form == SIXTEENS:
            at = scales + 128 * (b // 8) + 8 * (b % 8)
            put_float(at, step)
            put_float(at + 4, step)
            put_float(at + 64, first)
            put_float(at + 68, second)
        else:
            at = scales + 64 * (b // 8) + 4 * (b % 8)
            put_float(at, step * np.float32(0.0625) if form == PLANES and b % 2 else step)
            put_float(at + 32, first + second)
    if form == HALVES:
        for b in range(d // 256):
            part_halves(to + 256 * b)
            part_halves(to + 256 * b + 128)


@task
def dot_levels(args: int, chunk: int, thread_id: int) -> None:
    """Rows of an odd number of blocks of 32. More arguments: format, has minima, scratch, its size."""
    a = numbers_at(args)
    n_records, table = a[3] // 32, a[10] + thread_id * a[11]
    n_pairs = (n_records + 1) // 2
    q = table + 512 * n_pairs
    for i in range(512 * n_pairs - 256, 576 * n_pairs, 64):  # an odd row's last half pair stays zero
        clear_bytes(table + i)
    for r in range(chunk * a[7], min(a[2], (chunk + 1) * a[7])):
        levels_row(a[8], a[0] + r * a[1], n_records, q, table, 256)
        put_float(a[6] + 4 * r, row_of_levels(q, table, a[4], a[5], n_pairs, a[9] != 0))


@task
def dot_f16(args: int, chunk: int, _thread_id: int) -> None:
    """Rows of half-precision numbers."""
    a = numbers_at(args)
    for r in range(chunk * a[7], min(a[2], (chunk + 1) * a[7])):
        row, sums, more = a[0] + r * a[1], no_floats(), no_floats()
        for i in range(0, a[3] - 31, 32):
            sums = fused(load_halves(row + 2 * i), load_floats(a[4] + 4 * i), sums)
            more = fused(load_halves(row + 2 * i + 32), load_floats(a[4] + 4 * i + 64), more)
        rest = total(add(sums, more))
        for i in range(a[3] // 32 * 32, a[3]):
            rest += half_at(row + 2 * i) * float_at(a[4] + 4 * i)
        put_float(a[6] + 4 * r, rest)


@task
def dot_bf16(args: int, chunk: int, _thread_id: int) -> None:
    """Rows of bfloat16."""
    a = numbers_at(args)
    for r in range(chunk * a[7], min(a[2], (chunk + 1) * a[7])):
        row, sums, more = a[0] + r * a[1], no_floats(), no_floats()
        for i in range(0, a[3] - 31, 32):
            sums = fused(load_bfloats(row + 2 * i), load_floats(a[4] + 4 * i), sums)
            more = fused(load_bfloats(row + 2 * i + 32), load_floats(a[4] + 4 * i + 64), more)
        rest = total(add(sums, more))
        for i in range(a[3] // 32 * 32, a[3]):
            rest += bfloat_at(row + 2 * i) * float_at(a[4] + 4 * i)
        put_float(a[6] + 4 * r, rest)


@task
def dot_f32(args: int, chunk: int, _thread_id: int) -> None:
    """Rows of float32."""
    a = numbers_at(args)
    for r in range(chunk * a[7], min(a[2], (chunk + 1) * a[7])):
        row, sums, more = a[0] + r * a[1], no_floats(), no_floats()
        for i in range(0, a[3] - 31, 32):
            sums = fused(load_floats(row + 4 * i), load_floats(a[4] + 4 * i), sums)
            more = fused(load_floats(row + 4 * i + 64), load_floats(a[4] + 4 * i + 64), more)
        rest = total(add(sums, more))
        for i in range(a[3] // 32 * 32, a[3]):
            rest += float_at(row + 4 * i) * float_at(a[4] + 4 * i)
        put_float(a[6] + 4 * r, rest)


# ---- one task for each format: rows chunk * a[7] ... of arguments
#      raw, row_bytes, d_out, d, bytes of x, scales of x, y, rows for each chunk


@task
def dot_q4_0(args: int, chunk: int, _thread_id: int) -> None:
    """Rows of Q4_0."""
    a = numbers_at(args)
    for r in range(chunk * a[7], min(a[2], (chunk + 1) * a[7])):
        put_float(a[6] + 4 * r, row_q4_0(a[0] + r * a[1], a[4], a[5], a[3] // 64))


@task
def dot_q4_1(args: int, chunk: int, _thread_id: int) -> None:
    """Rows of Q4_1."""
    a = numbers_at(args)
    for r in range(chunk * a[7], min(a[2], (chunk + 1) * a[7])):
        put_float(a[6] + 4 * r, row_q4_1(a[0] + r * a[1], a[4], a[5], a[3] // 64))


@task
def dot_q5_0(args: int, chunk: int, _thread_id: int) -> None:
    """Rows of Q5_0."""
    a = numbers_at(args)
    for r in range(chunk * a[7], min(a[2], (chunk + 1) * a[7])):
        put_float(a[6] + 4 * r, row_q5_0(a[0] + r * a[1], a[4], a[5], a[3] // 64))


@task
def dot_q5_1(args: int, chunk: int, _thread_id: int) -> None:
    """Rows of Q5_1."""
    a = numbers_at(args)
    for r in range(chunk * a[7], min(a[2], (chunk + 1) * a[7])):
        put_float(a[6] + 4 * r, row_q5_1(a[0] + r * a[1], a[4], a[5], a[3] // 64))


@task
def dot_q8_0(args: int, chunk: int, _thread_id: int) -> None:
    """Rows of Q8_0."""
    a = numbers_at(args)
    for r in range(chunk * a[7], min(a[2], (chunk + 1) * a[7])):
        put_float(a[6] + 4 * r, row_q8_0(a[0] + r * a[1], a[4], a[5], a[3] // 64))


@task
def dot_q4_k(args: int, chunk: int, _thread_id: int) -> None:
    """Rows of Q4_K."""
    a = numbers_at(args)
    for r in range(chunk * a[7], min(a[2], (chunk + 1) * a[7])):
        put_float(a[6] + 4 * r, row_q4_k(a[0] + r * a[1], a[4], a[5], a[3] // 256))


@task
def dot_q5_k(args: int, chunk: int, _thread_id: int) -> None:
    """Rows of Q5_K."""
    a = numbers_at(args)
    for r in range(chunk * a[7], min(a[2], (chunk + 1) * a[7])):
        put_float(a[6] + 4 * r, row_q5_k(a[0] + r * a[1], a[4], a[5], a[3] // 256))


@task
def dot_q6_k(args: int, chunk: int, _thread_id: int) -> None:
    """Rows of Q6_K."""
    a = numbers_at(args)
    for r in range(chunk * a[7], min(a[2], (chunk + 1) * a[7])):
        put_float(a[6] + 4 * r, row_q6_k(a[0] + r * a[1], a[4], a[5], a[3] // 256))


@task
def dot_q2_k(args: int, chunk: int, _thread_id: int) -> None:
    """Rows of Q2_K."""
    a = numbers_at(args)
    for r in range(chunk * a[7], min(a[2], (chunk + 1) * a[7])):
        put_float(a[6] + 4 * r, row_q2_k(a[0] + r * a[1], a[4], a[5], a[3] // 256))


@task
def dot_q3_k(args: int, chunk: int, _thread_id: int) -> None:
    """Rows of Q3_K."""
    a = numbers_at(args)
    for r in range(chunk * a[7], min(a[2], (chunk + 1) * a[7])):
        put_float(a[6] + 4 * r, row_q3_k(a[0] + r * a[1], a[4], a[5], a[3] // 256))


TASKS = {
    "Q4_0": (dot_q4_0, HALVES),
    "Q4_1": (dot_q4_1, EIGHTS),
    "Q5_0": (dot_q5_0, EIGHTS),
    "Q5_1": (dot_q5_1, EIGHTS),
    "Q8_0": (dot_q8_0, EIGHTS),
    "Q2_K": (dot_q2_k, SIXTEENS),
    "Q3_K": (dot_q3_k, SIXTEENS),
    "Q4_K": (dot_q4_k, PLANES),
    "Q5_K": (dot_q5_k, EIGHTS),
    "Q6_K": (dot_q6_k, SIXTEENS),
}
