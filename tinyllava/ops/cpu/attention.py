"""Attention without the matrix of all scores: queries in blocks, and keys in blocks for each (Dao et al. 2022).

For each block of keys the running softmax is updated: m is the largest score so far, s the sum of e^(score - m),
o the sum of the values with those weights,

    m' = max(m, scores);   c = e^(m - m');   s = c s + sum e^(scores - m');   o = c o + e^(scores - m') @ V

and o / s is the answer after the last block. Keys and values are float32 or float16, converted as needed.
Reference: NumpyOps.attention.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tinyllava.ops.cpu.compile import kernel, task
from tinyllava.ops.cpu.microkernel import FLOAT_TOKENS, ROWS, SIDES, interleave, outer
from tinyllava.ops.cpu.simd.intrinsics import (
    everywhere,
    float_at,
    half_at,
    load_floats,
    load_halves,
    put_floats,
    times,
)
from tinyllava.ops.cpu.softmax import pad, running_softmax, scale_row
from tinyllava.ops.cpu.thread_pool import arguments_at, floats_at, numbers_at, row_at

Q_BLOCK = 144  # queries of a block, at most: a multiple of FLOAT_TOKENS and of 16
K_BLOCK = 64  # keys of a block
COLUMNS = SIDES * ROWS  # that the micro-kernel computes at a time


@kernel
def copy_row(source: int, is_float16: bool, d: int, row: Any, scale: float) -> None:
    """d numbers at an address, times ``scale`` -> row as float32, with zeros after them."""
    size, start, factor = 2 if is_float16 else 4, row.ctypes.data, everywhere(scale)
    for i in range(0, d - 15, 16):
        at = source + size * i
        put_floats(start + 4 * i, times(load_halves(at) if is_float16 else load_floats(at), factor))
    for i in range(d // 16 * 16, d):
        at = source + size * i
        row[i] = (half_at(at) if is_float16 else float_at(at)) * scale
    for i in range(d, row.shape[0]):
        row[i] = np.float32(0.0)


@kernel
def kv_length(m: int, position: int) -> int:
    """How many keys there are: m, and during a replay the number at the address ``position`` more."""
    return m + (numbers_at(position)[0] if position != 0 else 0)


@kernel
def padded(d: int) -> int:
    """d features, rounded up to a multiple of COLUMNS."""
    return (d + COLUMNS - 1) // COLUMNS * COLUMNS


@kernel
def scratch_floats(d: int) -> int:
    """The size of a thread's scratch for heads of d features, in float32 (scratch_arrays)."""
    return (2 * Q_BLOCK + 2 * K_BLOCK + ROWS) * padded(d) + Q_BLOCK * (K_BLOCK + 2)


@kernel
def scratch_arrays(at: int, width: int) -> Any:
    """The arrays that a thread works on, one after the other in its scratch."""
    q, o = floats_at(at, Q_BLOCK, width), floats_at(at + 4 * Q_BLOCK * width, Q_BLOCK, width)
    at += 8 * Q_BLOCK * width
    k = floats_at(at, K_BLOCK, width)  # packed: panels of 16 keys, each (width, 16)
    v = floats_at(at + 4 * K_BLOCK * width, K_BLOCK, width)
    rows = floats_at(at + 8 * K_BLOCK * width, ROWS, width)  # 16 keys before they are packed
    at += (8 * K_BLOCK + 4 * ROWS) * width
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
    queries, o, keys, values, rows, scores, largest, sums = scratch_arrays(at, padded(d))
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
        result, inverse = row_at(y + to_first + t * n_head * d * 4, d), one / sums[t]
        for i in range(d):
            result[i] = o[t, i] * inverse


@kernel
def visible(seen: int, t: int, n_keys: int) -> int:
    """How many of a block's n_keys keys query t sees: as many as query 0 and t more, from the first on."""
    return max(0, min(n_keys, seen + t))


@kernel
def pack_keys(k, stride, is_float16, d, n_keys, rows, keys) -> None:  # type: ignore[no-untyped-def]
    """n_keys keys -> panels of 16 keys, each (width, 16): a feature of 16 keys side by side."""
    width = rows.shape[1]
    for panel in range((n_keys + ROWS - 1) // ROWS):
        for r in range(ROWS):
            j = panel * ROWS + r
            copy_row(k + j * stride, is_float16, d if j < n_keys else 0, rows[r], np.float32(1.0))
        for i in range(0, width, 8):
            interleave(rows.ctypes.data + 4 * i, 4 * width, keys.ctypes.data + (panel * width + i) * 64)


@kernel
def score_block(q, k, scores, n_queries, n_keys, seen) -> None:  # type: ignore[no-untyped-def]
    """scores = q @ k^T, in whole micro-tiles: scores of keys that a query does not see mean nothing."""
    width = q.shape[1]
    for t in range(0, n_queries, FLOAT_TOKENS):
        for j in range(FLOAT_TOKENS):
            scores[t + j] = np.float32(0.0)
        for first in range(0, visible(seen, t + FLOAT_TOKENS - 1, n_keys), COLUMNS):
            keys, to = k.ctypes.data + first * width * 4, scores.ctypes.data + 4 * (t * K_BLOCK + first)
            outer(keys, 64, width * 64, q.ctypes.data + 4 * t * width, 4 * width, to, 4 * K_BLOCK, width)


@kernel
def softmax_block(scores, o, largest, sums, n_queries, n_keys, seen, scratch) -> None:  # type: ignore[no-untyped-def]
    """The running softmax over the block's scores, which become weights; o is corrected."""
    n, stride, width = (n_keys + 15) // 16 * 16, 4 * K_BLOCK, o.shape[1]
    for first in range(0, n_queries, 16):
        row, at = scores.ctypes.data + first * stride, 4 * first
        for t in range(16):
            pad(row + t * stride, visible(seen, first + t, n_keys), n)
        correction = running_softmax(row, stride, n, largest.ctypes.data + at, sums.ctypes.data + at, scratch)
        put_floats(scratch, correction)
        for t in range(min(16, n_queries - first)):
            factor = float_at(scratch + 4 * t)
            if factor != np.float32(1.0):
                scale_row(o.ctypes.data + 4 * (first + t) * width, width, factor)


@kernel
def mix_block(scores, v, o, n_queries, n_keys, seen) -> None:  # type: ignore[no-untyped-def]
    """o += scores @ v, in whole micro-tiles: the scores of keys that a query does not see are 0 now."""
    width = v.shape[1]
    for t in range(0, n_queries, FLOAT_TOKENS):
        n = visible(seen, t + FLOAT_TOKENS - 1, n_keys)
        for i in range(0, width if n > 0 else 0, COLUMNS):
            x, y = scores.ctypes.data + 4 * t * K_BLOCK, o.ctypes.data + 4 * (t * width + i)
            outer(v.ctypes.data + 4 * i, 4 * width, 4 * ROWS, x, 4 * K_BLOCK, y, 4 * width, n)
