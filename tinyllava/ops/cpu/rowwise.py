"""Operations on rows and on single numbers: norms, activations, sums, RoPE, appending to the KV cache.

Each is a task; a chunk of it is some of the rows, or of the numbers. Arrays are contiguous float32, and tasks get
their addresses. Reference of each: the method of NumpyOps with its name.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tinyllava.ops.cpu.compile import kernel, specialize, task
from tinyllava.ops.cpu.simd import intrinsics as simd
from tinyllava.ops.cpu.simd import reduce
from tinyllava.ops.cpu.softmax import LN2_HIGH, LN2_LOW, LOG2_E, TERMS
from tinyllava.ops.cpu.thread_pool import arguments_at, floats_at, int64_at, row_at


@kernel
def exp(x: Any) -> Any:
    """e^x to 2 units in the last place, for x up to 88; below -87 it stays at e^-87. NaN stays NaN.

    By the steps that softmax.py explains; 2^n by its exponent bits.
    """
    if x < np.float32(-87.0):
        x = np.float32(-87.0)
    if x > np.float32(88.0):
        x = np.float32(88.0)
    n = np.rint(x * LOG2_E)
    r = simd.fma_f32(n, -LN2_HIGH, x)
    r = simd.fma_f32(n, -LN2_LOW, r)
    p = TERMS[0]
    p = simd.fma_f32(p, r, TERMS[1])
    p = simd.fma_f32(p, r, TERMS[2])
    p = simd.fma_f32(p, r, TERMS[3])
    p = simd.fma_f32(p, r, TERMS[4])
    p = simd.fma_f32(p, r, TERMS[5])
    return simd.fma_f32(p, r * r, r + np.float32(1.0)) * simd.exp2(n)


@kernel
def sigmoid(x: Any) -> Any:
    """1 / (1 + e^-x)."""
    return np.float32(1.0) / (np.float32(1.0) + exp(-x))


# ---- norms


@kernel
def sum_of_row(row: int, d: int) -> Any:
    """The sum of d float32 at an address, as 16 sums side by side."""
    sums = simd.zeros()
    for i in range(0, d - 15, 16):
        sums = sums + simd.load_f32x16(row + 4 * i)
    rest = reduce.sum_lanes(sums)
    for i in range(d // 16 * 16, d):
        rest += simd.load_f32(row + 4 * i)
    return rest


@kernel
def sum_of_squares(row: int, d: int, mean: float) -> Any:
    """The sum of (x - mean)^2 over d float32 at an address."""
    sums, centre = simd.zeros(), simd.broadcast(-mean)
    for i in range(0, d - 15, 16):
        x = simd.load_f32x16(row + 4 * i) + centre
        sums = simd.fma(x, x, sums)
    rest = reduce.sum_lanes(sums)
    for i in range(d // 16 * 16, d):
        x = simd.load_f32(row + 4 * i) - mean
        rest += x * x
    return rest


@task
def outlier_ratio(args: int, chunk: int, _thread_id: int) -> None:
    """y (n,): of each row of x (n, d), the largest square over the mean of the squares; ``rows`` rows a chunk."""
    x, y, n, d, rows = arguments_at(args, 5)
    ratios = row_at(y, n)
    for t in range(chunk * rows, min(n, (chunk + 1) * rows)):
        row, sums, top = x + 4 * t * d, simd.zeros(), simd.zeros()
        for i in range(0, d - 15, 16):
            square = simd.load_f32x16(row + 4 * i) * simd.load_f32x16(row + 4 * i)
            sums, top = sums + square, reduce.larger(square, top)
        squares, largest = reduce.sum_lanes(sums), reduce.largest_lane(top)
        for i in range(d // 16 * 16, d):
            square = simd.load_f32(row + 4 * i) * simd.load_f32(row + 4 * i)
            squares += square
            largest = max(largest, square)
        ratios[t] = largest * np.float32(d) / squares if squares > 0 else np.float32(0.0)


@task
def rms_norm(args: int, chunk: int, _thread_id: int) -> None:
    """y = x / sqrt(mean of x^2 + eps) * weight, for x and y (n, d); ``rows`` rows a chunk, eps by its bits."""
    x, weight, y, n, d, eps, rows = arguments_at(args, 7)
    w = row_at(weight, d)
    for t in range(chunk * rows, min(n, (chunk + 1) * rows)):
        row, result = row_at(x + 4 * t * d, d), row_at(y + 4 * t * d, d)
        squares = sum_of_squares(x + 4 * t * d, d, np.float32(0.0))
        scale = np.float32(1.0) / np.sqrt(squares / np.float32(d) + simd.f32_of_bits(eps))
        for i in range(d):
            result[i] = row[i] * scale * w[i]


@task
def layer_norm(args: int, chunk: int, _thread_id: int) -> None:
    """y = (x - mean of x) / sqrt(variance of x + eps) * weight + bias, as above."""
    x, weight, bias, y, n, d, eps, rows = arguments_at(args, 8)
    w, b = row_at(weight, d), row_at(bias, d)
    for t in range(chunk * rows, min(n, (chunk + 1) * rows)):
        row, result = row_at(x + 4 * t * d, d), row_at(y + 4 * t * d, d)
        mean = sum_of_row(x + 4 * t * d, d) / np.float32(d)
        squares = sum_of_squares(x + 4 * t * d, d, mean)
        scale = np.float32(1.0) / np.sqrt(squares / np.float32(d) + simd.f32_of_bits(eps))
        for i in range(d):
            result[i] = (row[i] - mean) * scale * w[i] + b[i]


# ---- activations and sums: formulas of x, or of x and another number, and one loop for all of them


@kernel
def gelu_erf(x: Any, _: Any) -> Any:
    """x Phi(x)."""
    return np.float32(0.5) * x * (np.float32(1.0) + math.erf(x * np.float32(math.sqrt(0.5))))


@kernel
def gelu_tanh(x: Any, _: Any) -> Any:
    """x (1 + tanh(u)) / 2 = x sigmoid(2 u), with u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    return x * sigmoid(np.float32(2.0 * math.sqrt(2.0 / math.pi)) * (x + np.float32(0.044715) * x * x * x))


@kernel
def gelu_quick(x: Any, _: Any) -> Any:
    """x sigmoid(1.702 x)."""
    return x * sigmoid(np.float32(1.702) * x)


@kernel
def silu(x: Any, _: Any) -> Any:
    """x sigmoid(x)."""
    return x * sigmoid(x)


@kernel
def gated_silu(gate: Any, up: Any) -> Any:
    """silu(gate) * up."""
    return gate * sigmoid(gate) * up


@kernel
def sum_of_two(x: Any, y: Any) -> Any:
    """x + y."""
    return x + y


FORMULA = sum_of_two  # of the loop below; its copies have their own


def elementwise(args: int, chunk: int, _thread_id: int) -> None:
    """y = FORMULA(x, other) for ``count`` numbers, ``size`` of them a chunk; y may be x.

    For a formula of x alone, ``other`` may be any array of this size. The loop counts from 0, since Numba lets an
    index be negative: LLVM must see that it is not, to use vectors.
    """
    x, y, count, size, other = arguments_at(args, 5)
    first, n = 4 * chunk * size, min(size, count - chunk * size)
    u, v, result = row_at(x + first, n), row_at(other + first, n), row_at(y + first, n)
    for i in range(n):
        result[i] = FORMULA(u[i], v[i])


ACTIVATIONS = {
    formula.__name__: task(specialize(elementwise, "all_" + formula.__name__, FORMULA=formula))
    for formula in (gelu_erf, gelu_tanh, gelu_quick, silu)
}
swiglu = task(specialize(elementwise, "swiglu", FORMULA=gated_silu))
add_arrays = task(specialize(elementwise, "add_arrays", FORMULA=sum_of_two))


# ---- position


@kernel
def copy_floats(x: int, y: int, n: int) -> None:
    """n float32 from address x to address y."""
    row, result = row_at(x, n), row_at(y, n)
    for i in range(n):
        result[i] = row[i]


@kernel
def adjacent_pairs(x: int, n: int) -> Any:
    """Features 2 i and 2 i + 1 of the head at address x, as (n, 2)."""
    return floats_at(x, n, 2)


@kernel
def split_pairs(x: int, n: int) -> Any:
    """Features i and n + i, as (n, 2)."""
    return floats_at(x, 2, n).T


PAIRS = adjacent_pairs  # of the loop below; a copy of it has split_pairs


def rope(args: int, chunk: int, _thread_id: int) -> None:
    """y = x (n, n_head, d) with n_pairs pairs of each head rotated; cos and sin of the angles are (n, n_pairs)."""
    x, cos, sin, y, n, n_head, d, n_pairs, rows = arguments_at(args, 9)
    for t in range(chunk * rows, min(n, (chunk + 1) * rows)):
        c, s = row_at(cos + 4 * t * n_pairs, n_pairs), row_at(sin + 4 * t * n_pairs, n_pairs)
        for at in range(4 * t * n_head * d, 4 * (t + 1) * n_head * d, 4 * d):
            pairs, rotated = PAIRS(x + at, n_pairs), PAIRS(y + at, n_pairs)
            for i in range(n_pairs):
                rotated[i, 0] = pairs[i, 0] * c[i] - pairs[i, 1] * s[i]
                rotated[i, 1] = pairs[i, 0] * s[i] + pairs[i, 1] * c[i]
            copy_floats(x + at + 8 * n_pairs, y + at + 8 * n_pairs, d - 2 * n_pairs)


ROPE = {"norm": task(rope), "neox": task(specialize(rope, "rope_neox", PAIRS=split_pairs))}


# ---- the KV cache, and tables by position: the position's value stands at an address (capture.py)


@task
def slice_at(args: int, chunk: int, _thread_id: int) -> None:
    """y (n, d) = rows of table (limit, d) from a position on; each chunk is a row."""
    table, y, d, position = arguments_at(args, 4)
    copy_floats(table + 4 * (int64_at(position) + chunk) * d, y + 4 * chunk * d, d)


@kernel
def floats_to_halves(x: int, y: int, n: int) -> None:
    """n float32 at address x -> float16 at address y."""
    for i in range(0, n - 15, 16):
        simd.store_f16x16(y + 2 * i, simd.load_f32x16(x + 4 * i))
    for i in range(n // 16 * 16, n):
        simd.store_f16(y + 2 * i, simd.load_f32(x + 4 * i))


ITEM_BYTES, STORE_ROW = 4, copy_floats  # of a cache in float32; a copy of the loop has those of float16


def append_kv(args: int, chunk: int, _thread_id: int) -> None:
    """Keys and values (n, n_head, d) -> their caches (n_head, limit, d), from a position on.

    Even chunks are ``rows`` rows of the keys, odd chunks the same of the values.
    """
    keys, values, key_cache, value_cache, n, n_head, d, limit, position, rows = arguments_at(args, 10)
    x, cache = (values, value_cache) if chunk % 2 else (keys, key_cache)
    start, first = int64_at(position), chunk // 2 * rows
    for t in range(first, min(n, first + rows)):
        for h in range(n_head):
            STORE_ROW(x + 4 * (t * n_head + h) * d, cache + ITEM_BYTES * (h * limit + start + t) * d, d)


append_kv_float = task(append_kv)
append_kv_half = task(specialize(append_kv, "append_kv_half", ITEM_BYTES=2, STORE_ROW=floats_to_halves))
