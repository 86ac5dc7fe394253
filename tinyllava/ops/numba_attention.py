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

from tinyllava.ops.instructions import float_at, half_at
from tinyllava.ops.numba_rows import exp
from tinyllava.ops.team import floats_at, job, kernel, numbers_at
from tinyllava.ops.tile import ROWS, TOKENS, interleave, outer

QUERIES, KEYS = 64, 64  # of a block


@kernel
def copy_row(at: int, is_half: bool, d: int, to: Any, scale: float) -> None:
    """d numbers at an address, times ``scale``, as float32; zeros after them."""
    if is_half:
        for i in range(d):
            to[i] = half_at(at + 2 * i) * scale
    else:
        for i in range(d):
            to[i] = float_at(at + 4 * i) * scale
    for i in range(d, to.shape[0]):
        to[i] = np.float32(0.0)


@kernel
def scratch_floats(d: int) -> int:
    """Floats of scratch that a thread needs for heads of d features, rounded up."""
    width = (d + ROWS - 1) // ROWS * ROWS
    return (2 * QUERIES + 2 * KEYS + ROWS) * width + QUERIES * (KEYS + 2)


@job
def attend_block(args: int, item: int, who: int) -> None:
    """One head of one block of queries.

    q, k, v, y, n, h, g, d, m, causal, is_half, bytes from key to key, from head to head, the same for values,
    scratch, its size.
    """
    a = numbers_at(args)
    n, n_head, d, m, causal, is_half = a[4], a[5], a[7], a[8], a[9], a[10] != 0
    n_blocks, one = (n + QUERIES - 1) // QUERIES, np.float32(1.0)
    head, first = item // n_blocks, item % n_blocks * QUERIES
    kv = head // (n_head // a[6])
    count, width = min(QUERIES, n - first), (d + ROWS - 1) // ROWS * ROWS
    buffer = a[15] + who * a[16]
    q = floats_at(buffer, QUERIES, width)
    o = floats_at(buffer + 4 * QUERIES * width, QUERIES, width)
    k = floats_at(buffer + 8 * QUERIES * width, KEYS, width)  # in panels of 16 keys: (width, 16) each
    v = floats_at(buffer + (8 * QUERIES + 4 * KEYS) * width, KEYS, width)
    rows = floats_at(buffer + 8 * (QUERIES + KEYS) * width, ROWS, width)
    scores = floats_at(buffer + (8 * (QUERIES + KEYS) + 4 * ROWS) * width, QUERIES, KEYS)
    top = floats_at(scores.ctypes.data + 4 * QUERIES * KEYS, 1, QUERIES)[0]
    sums = floats_at(scores.ctypes.data + 4 * QUERIES * (KEYS + 1), 1, QUERIES)[0]
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
        score_block(q, k, scores, count, here)
        for t in range(count):
            visible = min(here, m - n + first + t + 1 - start) if causal else here
            soften(scores[t], visible, here, top, sums, t, o[t])
        mix_block(scores, v, o, count, here)
    for t in range(count):
        to = floats_at(a[3] + ((first + t) * n_head + head) * d * 4, 1, d)[0]
        inverse = one / sums[t]
        for i in range(d):
            to[i] = o[t, i] * inverse


@kernel
def pack_keys(at, step, is_half, d, count, rows, k) -> None:  # type: ignore[no-untyped-def]
    """count keys -> panels of 16, each (width, 16): the 16 numbers of one feature side by side."""
    width = rows.shape[1]
    for panel in range((count + ROWS - 1) // ROWS):
        for r in range(ROWS):
            here = d if panel * ROWS + r < count else 0
            copy_row(at + (panel * ROWS + r) * step, is_half, here, rows[r], np.float32(1.0))
        for i in range(0, width, 8):
            interleave(rows.ctypes.data + 4 * i, 4 * width, k.ctypes.data + (panel * width + i) * 64)


@kernel
def score_block(q, k, scores, count, n_keys) -> None:  # type: ignore[no-untyped-def]
    """scores = q @ k^T, whole tiles of it."""
    width = q.shape[1]
    for t in range(0, count, TOKENS):
        for j in range(TOKENS):
            scores[t + j] = np.float32(0.0)
        for panel in range((n_keys + ROWS - 1) // ROWS):
            keys, to = k.ctypes.data + panel * width * 64, scores.ctypes.data + 4 * (t * KEYS + panel * ROWS)
            outer(keys, 64, q.ctypes.data + 4 * t * width, 4 * width, to, 4 * KEYS, width)


@kernel
def soften(scores, visible, n_keys, top, sums, t, o) -> None:  # type: ignore[no-untyped-def]
    """The running softmax over one row's next scores, which become weights."""
    highest = top[t]
    for j in range(visible):
        highest = max(highest, scores[j])
    if visible > 0:
        correction = exp(top[t] - highest) if top[t] > np.float32(-np.inf) else np.float32(0.0)
        total = np.float32(0.0)
        for j in range(visible):
            scores[j] = exp(scores[j] - highest)
            total += scores[j]
        top[t], sums[t] = highest, sums[t] * correction + total
        if correction != np.float32(1.0):
            for i in range(o.shape[0]):
                o[i] *= correction
    for j in range(max(0, visible), n_keys):
        scores[j] = np.float32(0.0)


@kernel
def mix_block(scores, v, o, count, n_keys) -> None:  # type: ignore[no-untyped-def]
    """o += scores @ v, whole tiles of it."""
    width = v.shape[1]
    for t in range(0, count, TOKENS):
        for i in range(0, width, ROWS):
            x, y = scores.ctypes.data + 4 * t * KEYS, o.ctypes.data + 4 * (t * width + i)
            outer(v.ctypes.data + 4 * i, 4 * width, x, 4 * KEYS, y, 4 * width, n_keys)


@job
def attend_token(args: int, item: int, who: int) -> None:
    """One head of one query: arguments as attend_block's; item counts heads within queries."""
    a = numbers_at(args)
    n, n_head, d, causal, is_half = a[4], a[5], a[7], a[9], a[10] != 0
    t, head = item // n_head, item % n_head
    kv, m = head // (n_head // a[6]), a[8] - n + t + 1 if causal else a[8]
    buffer = floats_at(a[15] + who * a[16], 1, m + 3 * d)[0]
    scores, q, row, o = buffer[:m], buffer[m : m + d], buffer[m + d : m + 2 * d], buffer[m + 2 * d :]
    copy_row(a[0] + item * d * 4, False, d, q, np.float32(1.0 / math.sqrt(d)))
    highest = np.float32(-np.inf)
    for j in range(m):
        copy_row(a[1] + j * a[11] + kv * a[12], is_half, d, row, np.float32(1.0))
        score = np.float32(0.0)
        for i in range(d):
            score += q[i] * row[i]
        scores[j] = score
        highest = max(highest, score)
    total = np.float32(0.0)
    for j in range(m):
        scores[j] = exp(scores[j] - highest)
        total += scores[j]
    for i in range(d):
        o[i] = np.float32(0.0)
    for j in range(m):
        copy_row(a[2] + j * a[13] + kv * a[14], is_half, d, row, np.float32(1.0))
        for i in range(d):
            o[i] += scores[j] * row[i]
    y = floats_at(a[3] + item * d * 4, 1, d)[0]
    for i in range(d):
        y[i] = o[i] / total
