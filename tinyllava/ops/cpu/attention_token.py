"""Attention of one query, which decoding is: a key or value is used once by each of the heads that share it.

Blocks of 16 keys, or values, are converted to rows of float32 in the first-level cache, and used by all heads that
share them before the next block is: keys are read from memory once, and converted once.
Reference: NumpyOps.attention.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir

from tinyllava.ops.cpu.attention import copy_row, kv_length
from tinyllava.ops.cpu.compile import kernel, task
from tinyllava.ops.cpu.microkernel import loop
from tinyllava.ops.cpu.rowwise import copy_floats
from tinyllava.ops.cpu.simd.intrinsics import load_half_vector, put_floats
from tinyllava.ops.cpu.simd.llvm import F32, FLOATS, I64, constant, emit_fused, instruction, load, splat, store
from tinyllava.ops.cpu.simd.reduce import fold_each, sum_lanes
from tinyllava.ops.cpu.softmax import softmax
from tinyllava.ops.cpu.thread_pool import arguments_at, floats_at

KV_BLOCK = 16  # keys, or values, of a block


def _rows(builder: Any, rows: Any, stride: Any) -> list[Any]:
    """The addresses of 16 rows."""
    return [builder.add(rows, builder.mul(stride, ir.Constant(I64, j))) for j in range(KV_BLOCK)]


@instruction("v:iiii")
def score_keys(builder: Any, q: Any, rows: Any, stride: Any, n_vectors: Any) -> Any:
    """The dot products of a query and 16 keys of n_vectors * 16 features; ``stride`` bytes from key to key."""
    keys = _rows(builder, rows, stride)

    def body(i: Any, sums: list[Any]) -> list[Any]:
        at = builder.shl(i, ir.Constant(I64, 6))
        part = load(builder, builder.add(q, at), FLOATS)
        return [
            emit_fused(builder, part, load(builder, builder.add(key, at), FLOATS), sum_)
            for key, sum_ in zip(keys, sums, strict=True)
        ]

    sums = loop(builder, n_vectors, [constant(FLOATS, 0.0)] * KV_BLOCK, body)
    return fold_each(builder, sums, sum_lanes)


@instruction("-:iiiii")
def mix_values(builder: Any, o: Any, weights: Any, rows: Any, stride: Any, n_vectors: Any) -> None:
    """o += weights (16,) @ 16 values of n_vectors * 16 features; ``stride`` bytes from value to value."""
    values = _rows(builder, rows, stride)
    factors = [splat(builder, load(builder, weights, F32, 4 * j)) for j in range(KV_BLOCK)]

    def body(i: Any, _: list[Any]) -> list[Any]:
        at = builder.shl(i, ir.Constant(I64, 6))
        place = builder.add(o, at)
        # Four sums, so that a product need not wait for the one before it.
        sums = [load(builder, place, FLOATS), *[constant(FLOATS, 0.0)] * 3]
        for j, (value, factor) in enumerate(zip(values, factors, strict=True)):
            part = load(builder, builder.add(value, at), FLOATS)
            sums[j % 4] = emit_fused(builder, part, factor, sums[j % 4])
        pairs = builder.fadd(sums[0], sums[1]), builder.fadd(sums[2], sums[3])
        store(builder, builder.fadd(*pairs), place)
        return []

    loop(builder, n_vectors, [], body)


@kernel
def whole_vectors(n: int) -> int:
    """n numbers, rounded up to vectors of 16."""
    return (n + 15) // 16 * 16


@kernel
def token_scratch(d: int, m: int, heads: int) -> int:
    """The size of a thread's scratch for ``heads`` heads of d features and m keys, in float32."""
    return whole_vectors(d) * (2 * heads + KV_BLOCK) + whole_vectors(m) * heads


@instruction("-:iiiii")
def convert_block(builder: Any, at: Any, stride: Any, rows: Any, row_stride: Any, n_vectors: Any) -> None:
    """16 keys or values of n_vectors * 16 float16 -> rows of float32."""
    halves, floats = _rows(builder, at, stride), _rows(builder, rows, row_stride)

    def body(i: Any, _: list[Any]) -> list[Any]:
        for half, row in zip(halves, floats, strict=True):
            numbers = load_half_vector(builder, builder.add(half, builder.shl(i, ir.Constant(I64, 5))))
            store(builder, numbers, builder.add(row, builder.shl(i, ir.Constant(I64, 6))))
        return []

    loop(builder, n_vectors, [], body)


@kernel
def load_block(at: int, stride: int, is_float16: bool, d: int, count: int, rows: Any) -> None:
    """``count`` <= 16 keys or values -> rows (16, width) of float32, padded with zeros."""
    width = rows.shape[1]
    if is_float16 and d == width and count == KV_BLOCK:
        convert_block(at, stride, rows.ctypes.data, 4 * width, width // 16)
        return
    for j in range(KV_BLOCK):
        copy_row(at + j * stride, is_float16, d if j < count else 0, rows[j], np.float32(1.0))


@task
def attend_token(args: int, chunk: int, thread_id: int) -> None:
    """``heads`` heads of one query, which share their keys and values; the other arguments are attend_block's."""
    (
        q, k, v, y, n, n_head, n_head_kv, d, m, causal, is_float16,
        k_stride, k_head_stride, v_stride, v_head_stride, scratch, scratch_size, heads, position,
    ) = arguments_at(args, 19)  # fmt: skip
    t, first = chunk // (n_head // heads), chunk % (n_head // heads) * heads
    m, kv = kv_length(m, position) - (n - t - 1 if causal else 0), first // (n_head // n_head_kv)
    at, width, to_first = scratch + thread_id * scratch_size, whole_vectors(d), (t * n_head + first) * d * 4
    queries, o = floats_at(at, heads, width), floats_at(at + 4 * heads * width, heads, width)
    rows = floats_at(at + 8 * heads * width, KV_BLOCK, width)
    scores = floats_at(at + 4 * (2 * heads + KV_BLOCK) * width, heads, whole_vectors(m))
    for h in range(heads):
        copy_row(q + to_first + h * d * 4, False, d, queries[h], np.float32(1.0 / math.sqrt(d)))
        copy_row(0, False, 0, o[h], np.float32(1.0))
    stride, n_vectors, n_scores = 4 * width, width // 16, scores.shape[1]
    for j in range(0, m, KV_BLOCK):
        block = k + kv * k_head_stride + j * k_stride
        load_block(block, k_stride, is_float16 != 0, d, min(KV_BLOCK, m - j), rows)
        for h in range(heads):
            found = score_keys(queries.ctypes.data + h * stride, rows.ctypes.data, stride, n_vectors)
            put_floats(scores.ctypes.data + 4 * (h * n_scores + j), found)
    for h in range(heads):
        softmax(scores.ctypes.data + 4 * h * n_scores, m, n_scores)
    for j in range(0, m, KV_BLOCK):
        block = v + kv * v_head_stride + j * v_stride
        load_block(block, v_stride, is_float16 != 0, d, min(KV_BLOCK, m - j), rows)
        for h in range(heads):
            weights = scores.ctypes.data + 4 * (h * n_scores + j)
            mix_values(o.ctypes.data + h * stride, weights, rows.ctypes.data, stride, n_vectors)
    for h in range(heads):
        copy_floats(o.ctypes.data + h * stride, y + to_first + h * d * 4, d)
