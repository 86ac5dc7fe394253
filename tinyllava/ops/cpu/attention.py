"""Attention of a block of queries, for prompts and pictures, and of one query, for decoding.

Neither holds the matrix of all scores. Keys and values are float32 or float16, converted as needed.
Reference: NumpyOps.attention.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tinyllava.ops.cpu.compile import kernel, task
from tinyllava.ops.cpu.microkernel import LANES, MR, NR_F32, interleave, loop, microkernel_f32
from tinyllava.ops.cpu.simd import intrinsics as simd
from tinyllava.ops.cpu.simd import llvm, reduce
from tinyllava.ops.cpu.softmax import pad, running_softmax, scale_row, softmax
from tinyllava.ops.cpu.thread_pool import arguments_at, floats_at, int64_at, row_at

Q_BLOCK = 144  # queries of a block, at most: a multiple of NR_F32 and of 16
K_BLOCK = 64  # keys of a block
KV_BLOCK = 16  # the same where there is one query


@kernel
def copy_row(source: int, is_float16: bool, d: int, row: Any, scale: float) -> None:
    """d numbers at an address, times ``scale`` -> row as float32, with zeros after them."""
    size, start, factor = 2 if is_float16 else 4, row.ctypes.data, simd.broadcast(scale)
    for i in range(0, d - 15, 16):
        at = source + size * i
        simd.store_f32x16(start + 4 * i, (simd.load_f16x16(at) if is_float16 else simd.load_f32x16(at)) * factor)
    for i in range(d // 16 * 16, d):
        at = source + size * i
        row[i] = (simd.load_f16(at) if is_float16 else simd.load_f32(at)) * scale
    for i in range(d, row.shape[0]):
        row[i] = np.float32(0.0)


@kernel
def kv_length(m: int, position: int) -> int:
    """How many keys there are: m, and during a replay the number at the address ``position`` more."""
    return m + (int64_at(position) if position != 0 else 0)


@kernel
def round_up(n: int, unit: int) -> int:
    """The next multiple of ``unit``."""
    return (n + unit - 1) // unit * unit


# ---- blocks of queries, and blocks of keys for each (Dao et al. 2022, FlashAttention)
#
# For each block of keys the running softmax is updated: m is the largest score so far, s the sum of e^(score - m),
# o the sum of the values with those weights,
#
#     m' = max(m, scores);   c = e^(m - m');   s = c s + sum e^(scores - m');   o = c o + e^(scores - m') @ V
#
# and o / s is the answer after the last block.


@kernel
def block_scratch(d: int) -> int:
    """The size of a thread's scratch for heads of d features, in float32: block_arrays."""
    return (2 * Q_BLOCK + 2 * K_BLOCK + LANES) * round_up(d, MR) + Q_BLOCK * (K_BLOCK + 2)


@kernel
def block_arrays(at: int, width: int) -> Any:
    """The arrays that a thread works on, one after the other in its scratch."""
    q, o = floats_at(at, Q_BLOCK, width), floats_at(at + 4 * Q_BLOCK * width, Q_BLOCK, width)
    at += 8 * Q_BLOCK * width
    k = floats_at(at, K_BLOCK, width)  # packed: panels of 16 keys, each (width, 16)
    v = floats_at(at + 4 * K_BLOCK * width, K_BLOCK, width)
    rows = floats_at(at + 8 * K_BLOCK * width, LANES, width)  # 16 keys before they are packed
    at += (8 * K_BLOCK + 4 * LANES) * width
    scores, rest = floats_at(at, Q_BLOCK, K_BLOCK), floats_at(at + 4 * Q_BLOCK * K_BLOCK, 2, Q_BLOCK)
    return q, o, k, v, rows, scores, rest[0], rest[1]  # the last two: m and s of each query


@task
def attend_block(args: int, chunk: int, thread_id: int) -> None:
    """One head of one block of queries: q and y (n, n_head, d), k and v (m, n_head_kv, d) with strides in bytes.

    ``block``: how many queries a block has. ``position``: see kv_length.
    """
    (
        q, k, v, y, n, n_head, n_head_kv, d, m, causal, is_float16,
        k_stride, k_head_stride, v_stride, v_head_stride, scratch, scratch_size, block, position,
    ) = arguments_at(args, 19)  # fmt: skip
    n_blocks, scale, one = (n + block - 1) // block, np.float32(1.0 / math.sqrt(d)), np.float32(1.0)
    head, first = chunk // n_blocks, chunk % n_blocks * block
    m, n_queries, kv = kv_length(m, position), min(block, n - first), head // (n_head // n_head_kv)
    end = m - n + first + n_queries if causal else m  # of the keys that the block's last query sees
    to_first = (first * n_head + head) * d * 4  # bytes from q, or y, to the block's first query
    at = scratch + thread_id * scratch_size
    queries, o, keys, values, rows, scores, largest, sums = block_arrays(at, round_up(d, MR))
    for t in range(Q_BLOCK):
        copy_row(q + to_first + t * n_head * d * 4, False, d if t < n_queries else 0, queries[t], scale)
        copy_row(0, False, 0, o[t], one)
        largest[t], sums[t] = np.float32(-np.inf), np.float32(0.0)
    for start in range(0, end, K_BLOCK):
        n_keys = min(K_BLOCK, end - start)
        pack_keys(k + start * k_stride + kv * k_head_stride, k_stride, is_float16 != 0, d, n_keys, rows, keys)
        for j in range(n_keys):
            copy_row(v + (start + j) * v_stride + kv * v_head_stride, is_float16 != 0, d, values[j], one)
        seen = m - n + first + 1 - start if causal else m  # keys of this block that query 0 sees: visible()
        score_block(queries, keys, scores, n_queries, n_keys, seen)
        softmax_block(scores, o, largest, sums, n_queries, n_keys, seen, rows.ctypes.data)
        mix_block(scores, values, o, n_queries, n_keys, seen)
    for t in range(n_queries):
        result = row_at(y + to_first + t * n_head * d * 4, d)
        copy_row(o[t].ctypes.data, False, d, result, one / sums[t])


@kernel
def visible(seen: int, t: int, n_keys: int) -> int:
    """How many of a block's n_keys keys query t sees: as many as query 0 and t more, from the first on."""
    return max(0, min(n_keys, seen + t))


@kernel
def pack_keys(k, stride, is_float16, d, n_keys, rows, keys) -> None:  # type: ignore[no-untyped-def]
    """n_keys keys -> panels of 16 keys, each (width, 16): a feature of 16 keys side by side."""
    width = rows.shape[1]
    for panel in range(round_up(n_keys, LANES) // LANES):
        for r in range(LANES):
            j = panel * LANES + r
            copy_row(k + j * stride, is_float16, d if j < n_keys else 0, rows[r], np.float32(1.0))
        for i in range(0, width, 8):
            interleave(rows.ctypes.data + 4 * i, 4 * width, keys.ctypes.data + (panel * width + i) * 64)


@kernel
def score_block(q, k, scores, n_queries, n_keys, seen) -> None:  # type: ignore[no-untyped-def]
    """scores = q @ k^T, in whole micro-tiles: scores of keys that a query does not see mean nothing."""
    width = q.shape[1]
    for t in range(0, n_queries, NR_F32):
        for j in range(NR_F32):
            scores[t + j] = np.float32(0.0)
        for first in range(0, visible(seen, t + NR_F32 - 1, n_keys), MR):
            keys, to = k.ctypes.data + first * width * 4, scores.ctypes.data + 4 * (t * K_BLOCK + first)
            microkernel_f32(keys, 64, width * 64, q.ctypes.data + 4 * t * width, 4 * width, to, 4 * K_BLOCK, width)


@kernel
def softmax_block(scores, o, largest, sums, n_queries, n_keys, seen, scratch):  # type: ignore[no-untyped-def]
    """The running softmax over the block's scores, which become weights; o is corrected."""
    n, stride, width = round_up(n_keys, 16), 4 * K_BLOCK, o.shape[1]
    for first in range(0, n_queries, 16):
        row, at = scores.ctypes.data + first * stride, 4 * first
        for t in range(16):
            pad(row + t * stride, visible(seen, first + t, n_keys), n)
        correction = running_softmax(row, stride, n, largest.ctypes.data + at, sums.ctypes.data + at, scratch)
        simd.store_f32x16(scratch, correction)
        for t in range(min(16, n_queries - first)):
            factor = simd.load_f32(scratch + 4 * t)
            if factor != np.float32(1.0):
                scale_row(o.ctypes.data + 4 * (first + t) * width, width, factor)


@kernel
def mix_block(scores, v, o, n_queries, n_keys, seen) -> None:  # type: ignore[no-untyped-def]
    """o += scores @ v, in whole micro-tiles: the scores of keys that a query does not see are 0 now."""
    width = v.shape[1]
    for t in range(0, n_queries, NR_F32):
        n = visible(seen, t + NR_F32 - 1, n_keys)
        for i in range(0, width if n > 0 else 0, MR):
            x, y = scores.ctypes.data + 4 * t * K_BLOCK, o.ctypes.data + 4 * (t * width + i)
            microkernel_f32(v.ctypes.data + 4 * i, 4 * width, 4 * LANES, x, 4 * K_BLOCK, y, 4 * width, n)


# ---- one query
#
# Decoding uses each key, or value, once for each of the heads that share it. A block of 16 is converted to rows of
# float32 in the first-level cache, and all these heads use it before the next block is loaded: keys are read from
# memory once, and converted once.


def _rows(builder: Any, rows: Any, stride: Any) -> list[Any]:
    """The addresses of 16 rows."""
    return [builder.add(rows, builder.mul(stride, llvm.i64(j))) for j in range(KV_BLOCK)]


@llvm.instruction("v:iiii")
def score_keys(builder: Any, q: Any, rows: Any, stride: Any, n_vectors: Any) -> Any:
    """The dot products of a query and 16 keys of n_vectors * 16 features; ``stride`` bytes from key to key."""
    keys = _rows(builder, rows, stride)

    def body(i: Any, sums: list[Any]) -> list[Any]:
        at = builder.shl(i, llvm.i64(6))
        part = llvm.load(builder, builder.add(q, at), llvm.F32X16)
        return [
            llvm.emit_fma(builder, part, llvm.load(builder, builder.add(key, at), llvm.F32X16), sum_)
            for key, sum_ in zip(keys, sums, strict=True)
        ]

    sums = loop(builder, n_vectors, [llvm.f32x16(0.0)] * KV_BLOCK, body)
    return reduce.emit_reduce_each(builder, sums, reduce.emit_add)


@llvm.instruction("-:iiiii")
def mix_values(builder: Any, o: Any, weights: Any, rows: Any, stride: Any, n_vectors: Any) -> None:
    """o += weights (16,) @ 16 values of n_vectors * 16 features; ``stride`` bytes from value to value."""
    values = _rows(builder, rows, stride)
    factors = [llvm.broadcast(builder, llvm.load(builder, weights, llvm.F32, 4 * j)) for j in range(KV_BLOCK)]

    def body(i: Any, _: list[Any]) -> list[Any]:
        at = builder.shl(i, llvm.i64(6))
        place = builder.add(o, at)
        # Four sums, so that a product need not wait for the one before it.
        sums = [llvm.load(builder, place, llvm.F32X16), *[llvm.f32x16(0.0)] * 3]
        for j, (value, factor) in enumerate(zip(values, factors, strict=True)):
            part = llvm.load(builder, builder.add(value, at), llvm.F32X16)
            sums[j % 4] = llvm.emit_fma(builder, part, factor, sums[j % 4])
        pairs = builder.fadd(sums[0], sums[1]), builder.fadd(sums[2], sums[3])
        llvm.store(builder, builder.fadd(*pairs), place)
        return []

    loop(builder, n_vectors, [], body)


@kernel
def token_scratch(d: int, m: int, heads: int) -> int:
    """The size of a thread's scratch for ``heads`` heads of d features and m keys, in float32: attend_token."""
    return round_up(d, 16) * (2 * heads + KV_BLOCK) + round_up(m, 16) * heads


@llvm.instruction("-:iiiii")
def convert_block(builder: Any, at: Any, stride: Any, rows: Any, row_stride: Any, n_vectors: Any) -> None:
    """16 keys or values of n_vectors * 16 float16 -> rows of float32."""
    halves, floats = _rows(builder, at, stride), _rows(builder, rows, row_stride)

    def body(i: Any, _: list[Any]) -> list[Any]:
        for half, row in zip(halves, floats, strict=True):
            numbers = simd.emit_load_f16x16(builder, builder.add(half, builder.shl(i, llvm.i64(5))))
            llvm.store(builder, numbers, builder.add(row, builder.shl(i, llvm.i64(6))))
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
    at, width, to_first = scratch + thread_id * scratch_size, round_up(d, 16), (t * n_head + first) * d * 4
    queries, o = floats_at(at, heads, width), floats_at(at + 4 * heads * width, heads, width)
    rows = floats_at(at + 8 * heads * width, KV_BLOCK, width)
    scores = floats_at(at + 4 * (2 * heads + KV_BLOCK) * width, heads, round_up(m, 16))
    for h in range(heads):
        copy_row(q + to_first + h * d * 4, False, d, queries[h], np.float32(1.0 / math.sqrt(d)))
        copy_row(0, False, 0, o[h], np.float32(1.0))
    stride, n_vectors, n_scores = 4 * width, width // 16, scores.shape[1]
    for j in range(0, m, KV_BLOCK):
        block = k + kv * k_head_stride + j * k_stride
        load_block(block, k_stride, is_float16 != 0, d, min(KV_BLOCK, m - j), rows)
        for h in range(heads):
            found = score_keys(queries.ctypes.data + h * stride, rows.ctypes.data, stride, n_vectors)
            simd.store_f32x16(scores.ctypes.data + 4 * (h * n_scores + j), found)
    for h in range(heads):
        softmax(scores.ctypes.data + 4 * h * n_scores, m, n_scores)
    for j in range(0, m, KV_BLOCK):
        block = v + kv * v_head_stride + j * v_stride
        load_block(block, v_stride, is_float16 != 0, d, min(KV_BLOCK, m - j), rows)
        for h in range(heads):
            weights = scores.ctypes.data + 4 * (h * n_scores + j)
            mix_values(o.ctypes.data + h * stride, weights, rows.ctypes.data, stride, n_vectors)
    for h in range(heads):
        copy_row(o.ctypes.data + h * stride, False, d, row_at(y + to_first + h * d * 4, d), np.float32(1.0))
