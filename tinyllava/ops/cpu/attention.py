"""Attention without the matrix of all scores: queries in blocks, and keys in blocks for each (Dao et al. 2022).

For each block of keys the running softmax is corrected: m the largest score so far, s the sum of e^(score - m),
o the mix of the values with those weights,

    m' = max(m, scores);   c = e^(m - m');   s = c s + sum e^(scores - m');   o = c o + e^(scores - m') @ V

and o / s is the answer after the last block. Keys and values are float32 or half-precision, converted as needed.
Reference: NumpyOps.attention.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tinyllava.ops.cpu.compile import kernel, task
from tinyllava.ops.cpu.microkernel import LANES, MR, NR_F32, interleave, microkernel_f32
from tinyllava.ops.cpu.simd.intrinsics import (
    everywhere,
    float_at,
    half_at,
    load_floats,
    load_halves,
    put_floats,
    times,
)
from tinyllava.ops.cpu.softmax import pad, soften_rows
from tinyllava.ops.cpu.thread_pool import floats_at, numbers_at

QUERIES = 144  # of a block, at most: whole NR_F32, and whole vectors
KEYS = 64
COLUMNS = MR  # that a product gives at once


@kernel
def sixteen_at(address: int, is_half: bool) -> Any:
    """16 numbers, as float32."""
    return load_halves(address) if is_half else load_floats(address)


@kernel
def one_at(address: int, is_half: bool) -> Any:
    """One number, as float32."""
    return half_at(address) if is_half else float_at(address)


@kernel
def copy_row(at: int, is_half: bool, d: int, to: Any, scale: float) -> None:
    """d numbers at an address, times ``scale``, as float32; zeros after them."""
    size, start, factor = 2 if is_half else 4, to.ctypes.data, everywhere(scale)
    for i in range(0, d - 15, 16):
        put_floats(start + 4 * i, times(sixteen_at(at + size * i, is_half), factor))
    for i in range(d // 16 * 16, d):
        to[i] = one_at(at + size * i, is_half) * scale
    for i in range(d, to.shape[0]):
        to[i] = np.float32(0.0)


@kernel
def width_of(d: int) -> int:
    """d features, rounded up to whole products."""
    return (d + COLUMNS - 1) // COLUMNS * COLUMNS


@kernel
def scratch_floats(d: int) -> int:
    """Floats of scratch that a thread needs for heads of d features, rounded up."""
    width = width_of(d)
    return (2 * QUERIES + 2 * KEYS + LANES) * width + QUERIES * (KEYS + 2)


@kernel
def rooms(at: int, width: int) -> Any:
    """What a thread works on, one after the other in its scratch."""
    q, o = floats_at(at, QUERIES, width), floats_at(at + 4 * QUERIES * width, QUERIES, width)
    at += 8 * QUERIES * width
    k = floats_at(at, KEYS, width)  # in panels of 16 keys: (width, 16) each
    v = floats_at(at + 4 * KEYS * width, KEYS, width)
    rows = floats_at(at + 8 * KEYS * width, LANES, width)
    at += (8 * KEYS + 4 * LANES) * width
    scores, rest = floats_at(at, QUERIES, KEYS), floats_at(at + 4 * QUERIES * KEYS, 2, QUERIES)
    return q, o, k, v, rows, scores, rest[0], rest[1]


@kernel
def keys_of(a: Any) -> int:
    """How many keys there are: a number, and what stands at an address, if one is given."""
    return a[8] + (numbers_at(a[18])[0] if a[18] != 0 else 0)


@task
def attend_block(args: int, chunk: int, thread_id: int) -> None:
    """One head of one block of queries.

    q, k, v, y, n, h, g, d, m, causal, is_half, bytes from key to key, from head to head, the same for values,
    scratch, its size, queries of a block, an address whose number is added to m, or 0.
    """
    a = numbers_at(args)
    n, n_head, d, m, causal, is_half = a[4], a[5], a[7], keys_of(a), a[9], a[10] != 0
    n_blocks, one = (n + a[17] - 1) // a[17], np.float32(1.0)
    head, first = chunk // n_blocks, chunk % n_blocks * a[17]
    kv = head // (n_head // a[6])
    count, width = min(a[17], n - first), width_of(d)
    q, o, k, v, rows, scores, top, sums = rooms(a[15] + thread_id * a[16], width)
    for t in range(QUERIES):
        here = d if t < count else 0
        copy_row(a[0] + ((first + t) * n_head + head) * d * 4, False, here, q[t], np.float32(1.0 / math.sqrt(d)))
        copy_row(0, False, 0, o[t], one)
        top[t], sums[t] = np.float32(-np.inf), np.float32(0.0)
    seen = m - n + first + count if causal else m
    for start in range(0, seen, KEYS):
        here = min(KEYS, seen - start)
        pack_keys(a[1] + start * a[11] + kv * a[12], a[11], is_half, d, here, rows, k)
        for j in range(here):
            copy_row(a[2] + (start + j) * a[13] + kv * a[14], is_half, d, v[j], one)
        before = m - n + first - start if causal else m  # the first query sees keys 0 .. before; below 0, none
        score_block(q, k, scores, count, here, before)
        soften(scores, o, top, sums, count, here, before, rows.ctypes.data)
        mix_block(scores, v, o, count, here, before)
    for t in range(count):
        to = floats_at(a[3] + ((first + t) * n_head + head) * d * 4, 1, d)[0]
        inverse = one / sums[t]
        for i in range(d):
            to[i] = o[t, i] * inverse


@kernel
def pack_keys(at, step, is_half, d, count, rows, k) -> None:  # type: ignore[no-untyped-def]
    """count keys -> panels of 16, each (width, 16): the 16 numbers of one feature side by side."""
    width = rows.shape[1]
    for panel in range((count + LANES - 1) // LANES):
        for r in range(LANES):
            here = d if panel * LANES + r < count else 0
            copy_row(at + (panel * LANES + r) * step, is_half, here, rows[r], np.float32(1.0))
        for i in range(0, width, 8):
            interleave(rows.ctypes.data + 4 * i, 4 * width, k.ctypes.data + (panel * width + i) * 64)


@kernel
def score_block(q, k, scores, count, here, before) -> None:  # type: ignore[no-untyped-def]
    """scores = q @ k^T, whole tiles of it: what a query does not see means nothing."""
    width = q.shape[1]
    for t in range(0, count, NR_F32):
        for j in range(NR_F32):
            scores[t + j] = np.float32(0.0)
        for first in range(0, min(here, before + t + NR_F32), COLUMNS):
            keys, to = k.ctypes.data + first * width * 4, scores.ctypes.data + 4 * (t * KEYS + first)
            microkernel_f32(keys, 64, width * 64, q.ctypes.data + 4 * t * width, 4 * width, to, 4 * KEYS, width)


@kernel
def soften(scores, o, top, sums, count, here, before, room) -> None:  # type: ignore[no-untyped-def]
    """The running softmax over the next scores of all queries, which become weights; o is corrected."""
    n, step = (here + 15) // 16 * 16, 4 * KEYS
    for first in range(0, count, 16):
        row, at = scores.ctypes.data + first * step, 4 * first
        for t in range(16):
            pad(row + t * step, max(0, min(here, before + first + t + 1)), n)
        correction = soften_rows(row, step, n, top.ctypes.data + at, sums.ctypes.data + at, room)
        put_floats(room, correction)
        for t in range(min(16, count - first)):
            factor = float_at(room + 4 * t)
            if factor != np.float32(1.0):
                scale_row(o.ctypes.data + 4 * (first + t) * o.shape[1], o.shape[1], factor)


@kernel
def scale_row(row: int, n: int, factor: float) -> None:
    """n numbers times a factor; n a multiple of 16."""
    for i in range(0, n, 16):
        put_floats(row + 4 * i, times(load_floats(row + 4 * i), everywhere(factor)))


@kernel
def mix_block(scores, v, o, count, here, before) -> None:  # type: ignore[no-untyped-def]
    """o += scores @ v, whole tiles of it."""
    width = v.shape[1]
    for t in range(0, count, NR_F32):
        seen = min(here, before + t + NR_F32)  # by the last of these queries
        for i in range(0, width if seen > 0 else 0, COLUMNS):
            x, y = scores.ctypes.data + 4 * t * KEYS, o.ctypes.data + 4 * (t * width + i)
            microkernel_f32(v.ctypes.data + 4 * i, 4 * width, 4 * LANES, x, 4 * KEYS, y, 4 * width, seen)
