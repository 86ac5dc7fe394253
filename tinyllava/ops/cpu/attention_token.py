"""Attention of one query, which decoding is: every key and every value is used once by each head that shares it.

Sixteen keys, or values, become rows of float32 in the first-level cache, and all heads that share them meet these
rows before the next sixteen: keys are read from memory once, and converted once.
Reference: NumpyOps.attention.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir

from tinyllava.ops.cpu.attention import copy_row, keys_of
from tinyllava.ops.cpu.compile import kernel, task
from tinyllava.ops.cpu.microkernel import loop
from tinyllava.ops.cpu.simd.intrinsics import load_half_vector, put_floats
from tinyllava.ops.cpu.simd.llvm import F32, FLOATS, I64, constant, emit_fused, instruction, load, splat, store
from tinyllava.ops.cpu.simd.reduce import fold_each, sum_lanes
from tinyllava.ops.cpu.softmax import exponentials, largest, pad
from tinyllava.ops.cpu.thread_pool import floats_at, numbers_at

TOGETHER = 16  # keys or values that are treated together


def _rows(builder: Any, rows: Any, step: Any) -> list[Any]:
    """Where each of 16 rows begins."""
    return [builder.add(rows, builder.mul(step, ir.Constant(I64, j))) for j in range(TOGETHER)]


@instruction("v:iiii")
def score_keys(builder: Any, q: Any, rows: Any, step: Any, n_vectors: Any) -> Any:
    """The products of a query and 16 keys, all of n_vectors * 16 numbers; ``step`` bytes from key to key."""
    keys = _rows(builder, rows, step)

    def body(i: Any, sums: list[Any]) -> list[Any]:
        at = builder.shl(i, ir.Constant(I64, 6))
        part = load(builder, builder.add(q, at), FLOATS)
        return [
            emit_fused(builder, part, load(builder, builder.add(key, at), FLOATS), total)
            for key, total in zip(keys, sums, strict=True)
        ]

    sums = loop(builder, n_vectors, [constant(FLOATS, 0.0)] * TOGETHER, body)
    return fold_each(builder, sums, sum_lanes)


@instruction("-:iiiii")
def mix_values(builder: Any, o: Any, weights: Any, rows: Any, step: Any, n_vectors: Any) -> None:
    """o += weights (16,) @ 16 values, all of n_vectors * 16 numbers; ``step`` bytes from value to value."""
    values = _rows(builder, rows, step)
    factors = [splat(builder, load(builder, weights, F32, 4 * j)) for j in range(TOGETHER)]

    def body(i: Any, _: list[Any]) -> list[Any]:
        at = builder.shl(i, ir.Constant(I64, 6))
        place = builder.add(o, at)
        chains = [load(builder, place, FLOATS), *[constant(FLOATS, 0.0)] * 3]  # they do not wait for each other
        for j, (value, factor) in enumerate(zip(values, factors, strict=True)):
            part = load(builder, builder.add(value, at), FLOATS)
            chains[j % 4] = emit_fused(builder, part, factor, chains[j % 4])
        pairs = builder.fadd(chains[0], chains[1]), builder.fadd(chains[2], chains[3])
        store(builder, builder.fadd(*pairs), place)
        return []

    loop(builder, n_vectors, [], body)


@kernel
def whole_vectors(n: int) -> int:
    """n numbers, rounded up to vectors of 16."""
    return (n + 15) // 16 * 16


@kernel
def token_scratch(d: int, m: int, heads: int) -> int:
    """Floats of scratch that a thread needs for ``heads`` heads of d features and m keys."""
    return whole_vectors(d) * (2 * heads + TOGETHER) + whole_vectors(m) * heads


@instruction("-:iiiii")
def widen(builder: Any, at: Any, step: Any, rows: Any, row_step: Any, n_vectors: Any) -> None:
    """16 keys or values of n_vectors * 16 half-precision numbers -> rows of float32."""
    halves, floats = _rows(builder, at, step), _rows(builder, rows, row_step)

    def body(i: Any, _: list[Any]) -> list[Any]:
        for half, row in zip(halves, floats, strict=True):
            numbers = load_half_vector(builder, builder.add(half, builder.shl(i, ir.Constant(I64, 5))))
            store(builder, numbers, builder.add(row, builder.shl(i, ir.Constant(I64, 6))))
        return []

    loop(builder, n_vectors, [], body)


@kernel
def take_rows(at: int, step: int, is_half: bool, d: int, count: int, rows: Any) -> None:
    """``count`` <= 16 keys or values -> rows (16, width) of float32; zeros where there is none."""
    width = rows.shape[1]
    if is_half and d == width and count == TOGETHER:
        widen(at, step, rows.ctypes.data, 4 * width, width // 16)
        return
    for j in range(TOGETHER):
        copy_row(at + j * step, is_half, d if j < count else 0, rows[j], np.float32(1.0))


@task
def attend_token(args: int, chunk: int, thread_id: int) -> None:
    """Some heads of one query, which share their keys. Arguments as attend_block's, but a[17]: how many heads."""
    a = numbers_at(args)
    n, n_head, d, heads, is_half = a[4], a[5], a[7], a[17], a[10] != 0
    t, first = chunk // (n_head // heads), chunk % (n_head // heads) * heads
    m, kv = keys_of(a) - (n - t - 1 if a[9] else 0), first // (n_head // a[6])
    at, width = a[15] + thread_id * a[16], whole_vectors(d)
    q, o = floats_at(at, heads, width), floats_at(at + 4 * heads * width, heads, width)
    rows = floats_at(at + 8 * heads * width, TOGETHER, width)
    scores = floats_at(at + 4 * (2 * heads + TOGETHER) * width, heads, whole_vectors(m))
    for h in range(heads):
        copy_row(a[0] + (t * n_head + first + h) * d * 4, False, d, q[h], np.float32(1.0 / math.sqrt(d)))
        copy_row(0, False, 0, o[h], np.float32(1.0))
    step, n_vectors = 4 * width, width // 16
    for j in range(0, m, TOGETHER):
        take_rows(a[1] + kv * a[12] + j * a[11], a[11], is_half, d, min(TOGETHER, m - j), rows)
        for h in range(heads):
            found = score_keys(q.ctypes.data + h * step, rows.ctypes.data, step, n_vectors)
            put_floats(scores.ctypes.data + 4 * (h * scores.shape[1] + j), found)
    soften(scores, m)
    for j in range(0, m, TOGETHER):
        take_rows(a[2] + kv * a[14] + j * a[13], a[13], is_half, d, min(TOGETHER, m - j), rows)
        for h in range(heads):
            weights = scores.ctypes.data + 4 * (h * scores.shape[1] + j)
            mix_values(o.ctypes.data + h * step, weights, rows.ctypes.data, step, n_vectors)
    for h in range(heads):
        y = floats_at(a[3] + (t * n_head + first + h) * d * 4, 1, d)[0]
        for i in range(d):
            y[i] = o[h, i]


@kernel
def soften(scores: Any, m: int) -> None:
    """Softmax over the scores of m keys; zeros after them."""
    n = scores.shape[1]
    for h in range(scores.shape[0]):
        row = scores.ctypes.data + 4 * h * n
        pad(row, m, n)
        inverse = np.float32(1.0) / exponentials(row, n, largest(row, n, np.float32(-np.inf)))
        for j in range(n):
            scores[h, j] *= inverse
