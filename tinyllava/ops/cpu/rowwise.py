"""Operations on one row, or one number, at a time: norms, activations, RoPE. Chunk ``i`` of a task is some rows.

Reference of each: the method of NumpyOps with its name.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tinyllava.ops.cpu import softmax as numba_softmax
from tinyllava.ops.cpu.compile import kernel, task
from tinyllava.ops.cpu.simd.intrinsics import (
    add,
    everywhere,
    float_at,
    float_of_bits,
    fused,
    fused_one,
    load_floats,
    no_floats,
    power_of_two,
    put_half,
    put_halves,
    times,
)
from tinyllava.ops.cpu.simd.reduce import larger, largest_lane, total
from tinyllava.ops.cpu.thread_pool import floats_at, numbers_at

LOG2_E, LN2_HIGH, LN2_LOW = (np.float32(c) for c in (numba_softmax.LOG2_E, *numba_softmax.LN2))
TERMS = tuple(np.float32(c) for c in numba_softmax.TERMS)


@kernel
def exp(x: Any) -> Any:
    """e^x to 2 units in the last place, for x up to 88; below -87 it stays at e^-87. NaN stays NaN.

    x = n log(2) + r with |r| <= log(2)/2; e^r by a polynomial, 2^n by its exponent bits (Cephes library, expf.c).
    """
    if x < np.float32(-87.0):
        x = np.float32(-87.0)
    if x > np.float32(88.0):
        x = np.float32(88.0)
    n = np.rint(x * LOG2_E)
    r = fused_one(n, -LN2_HIGH, x)
    r = fused_one(n, -LN2_LOW, r)
    p = TERMS[0]
    p = fused_one(p, r, TERMS[1])
    p = fused_one(p, r, TERMS[2])
    p = fused_one(p, r, TERMS[3])
    p = fused_one(p, r, TERMS[4])
    p = fused_one(p, r, TERMS[5])
    return fused_one(p, r * r, r + np.float32(1.0)) * power_of_two(n)


@kernel
def sigmoid(x: float) -> float:
    """1 / (1 + e^-x)."""
    return np.float32(1.0) / (np.float32(1.0) + exp(-x))


# ---- norms


@kernel
def sum_of_row(row: int, d: int) -> Any:
    """The sum of d float32 at an address, as 16 sums side by side."""
    sums = no_floats()
    for i in range(0, d - 15, 16):
        sums = add(sums, load_floats(row + 4 * i))
    rest = total(sums)
    for i in range(d // 16 * 16, d):
        rest += float_at(row + 4 * i)
    return rest


@kernel
def sum_of_squares(row: int, d: int, mean: float) -> Any:
    """The sum of (x - mean)^2 over d float32 at an address."""
    sums, centre = no_floats(), everywhere(-mean)
    for i in range(0, d - 15, 16):
        x = add(load_floats(row + 4 * i), centre)
        sums = fused(x, x, sums)
    rest = total(sums)
    for i in range(d // 16 * 16, d):
        x = float_at(row + 4 * i) - mean
        rest += x * x
    return rest


@task
def peaks(args: int, chunk: int, _thread_id: int) -> None:
    """x, y, n rows, d columns, rows for each chunk: y[t] = a row's largest square over the mean of its squares."""
    a = numbers_at(args)
    n, d = a[2], a[3]
    y = floats_at(a[1], 1, n)[0]
    for t in range(chunk * a[4], min(n, (chunk + 1) * a[4])):
        row, sums, top = a[0] + 4 * t * d, no_floats(), no_floats()
        for i in range(0, d - 15, 16):
            square = times(load_floats(row + 4 * i), load_floats(row + 4 * i))
            sums, top = add(sums, square), larger(square, top)
        squares, largest = total(sums), largest_lane(top)
        for i in range(d // 16 * 16, d):
            square = float_at(row + 4 * i) * float_at(row + 4 * i)
            squares += square
            largest = max(largest, square)
        y[t] = largest * np.float32(d) / squares if squares > 0 else np.float32(0.0)


@task
def rms_norm(args: int, chunk: int, _thread_id: int) -> None:
    """x, weight, y, n rows, d columns, eps, rows for each chunk."""
    a = numbers_at(args)
    n, d, eps = a[3], a[4], float_of_bits(a[5])
    x, w, y = floats_at(a[0], n, d), floats_at(a[1], 1, d)[0], floats_at(a[2], n, d)
    for t in range(chunk * a[6], min(n, (chunk + 1) * a[6])):
        squares = sum_of_squares(a[0] + 4 * t * d, d, np.float32(0.0))
        scale = np.float32(1.0) / np.sqrt(squares / np.float32(d) + eps)
        for i in range(d):
            y[t, i] = x[t, i] * scale * w[i]


@task
def layer_norm(args: int, chunk: int, _thread_id: int) -> None:
    """x, weight, bias, y, n rows, d columns, eps, rows for each chunk."""
    a = numbers_at(args)
    n, d, eps = a[4], a[5], float_of_bits(a[6])
    x, y = floats_at(a[0], n, d), floats_at(a[3], n, d)
    w, b = floats_at(a[1], 1, d)[0], floats_at(a[2], 1, d)[0]
    for t in range(chunk * a[7], min(n, (chunk + 1) * a[7])):
        row = a[0] + 4 * t * d
        mean = sum_of_row(row, d) / np.float32(d)
        scale = np.float32(1.0) / np.sqrt(sum_of_squares(row, d, mean) / np.float32(d) + eps)
        for i in range(d):
            y[t, i] = (x[t, i] - mean) * scale * w[i] + b[i]


# ---- activations and sums: x, y, how many numbers, numbers for each chunk
#      Loops count from 0: Numba lets an index be negative, and LLVM must see that this one is not.


@kernel
def part(a: Any, which: int, chunk: int) -> Any:
    """The chunk's part of the array at address a[which]."""
    first = chunk * a[3]
    return floats_at(a[which] + 4 * first, 1, min(a[3], a[2] - first))[0]


@task
def gelu_erf(args: int, chunk: int, _thread_id: int) -> None:
    """x Phi(x)."""
    a = numbers_at(args)
    x, y = part(a, 0, chunk), part(a, 1, chunk)
    for i in range(x.shape[0]):
        y[i] = np.float32(0.5) * x[i] * (np.float32(1.0) + math.erf(x[i] * np.float32(math.sqrt(0.5))))


@task
def gelu_tanh(args: int, chunk: int, _thread_id: int) -> None:
    """(1 + tanh(u)) / 2 = sigmoid(2 u)."""
    a = numbers_at(args)
    x, y, twice = part(a, 0, chunk), part(a, 1, chunk), np.float32(2.0 * math.sqrt(2.0 / math.pi))
    for i in range(x.shape[0]):
        y[i] = x[i] * sigmoid(twice * (x[i] + np.float32(0.044715) * x[i] * x[i] * x[i]))


@task
def gelu_quick(args: int, chunk: int, _thread_id: int) -> None:
    """x sigmoid(1.702 x)."""
    a = numbers_at(args)
    x, y = part(a, 0, chunk), part(a, 1, chunk)
    for i in range(x.shape[0]):
        y[i] = x[i] * sigmoid(np.float32(1.702) * x[i])


@task
def silu(args: int, chunk: int, _thread_id: int) -> None:
    """x sigmoid(x)."""
    a = numbers_at(args)
    x, y = part(a, 0, chunk), part(a, 1, chunk)
    for i in range(x.shape[0]):
        y[i] = x[i] * sigmoid(x[i])


@task
def swiglu(args: int, chunk: int, _thread_id: int) -> None:
    """silu(gate) * up. Arguments: gate, y, count, count for each chunk, up."""
    a = numbers_at(args)
    x, y, up = part(a, 0, chunk), part(a, 1, chunk), part(a, 4, chunk)
    for i in range(x.shape[0]):
        y[i] = x[i] * sigmoid(x[i]) * up[i]


@task
def sum_of_two(args: int, chunk: int, _thread_id: int) -> None:
    """x + other, of the same shape. Arguments: x, y, count, count for each chunk, other; y may be x."""
    a = numbers_at(args)
    x, y, other = part(a, 0, chunk), part(a, 1, chunk), part(a, 4, chunk)
    for i in range(x.shape[0]):
        y[i] = x[i] + other[i]


ACTIVATIONS = {"gelu_erf": gelu_erf, "gelu_tanh": gelu_tanh, "gelu_quick": gelu_quick, "silu": silu}


# ---- position


@task
def rope(args: int, chunk: int, _thread_id: int) -> None:
    """x, cos, sin, y, tokens, heads, features of a head, pairs turned, pairs are neighbours (or halves), rows."""
    a = numbers_at(args)
    n, n_head, d, half, neighbours = a[4], a[5], a[6], a[7], a[8]
    for t in range(chunk * a[9], min(n, (chunk + 1) * a[9])):
        cos, sin = floats_at(a[1] + 4 * t * half, 1, half)[0], floats_at(a[2] + 4 * t * half, 1, half)[0]
        for h in range(n_head):
            at = 4 * (t * n_head + h) * d
            turn(a[0] + at, a[3] + at, cos, sin, neighbours)
            x, y = floats_at(a[0] + at + 8 * half, 1, d)[0], floats_at(a[3] + at + 8 * half, 1, d)[0]
            for i in range(d - 2 * half):
                y[i] = x[i]


@kernel
def turn(x: int, y: int, cos: Any, sin: Any, neighbours: int) -> None:
    """Turn the pairs of one head, from address x to address y."""
    half = cos.shape[0]
    if neighbours:
        u, v = floats_at(x, half, 2), floats_at(y, half, 2)
        for i in range(half):
            v[i, 0] = u[i, 0] * cos[i] - u[i, 1] * sin[i]
            v[i, 1] = u[i, 0] * sin[i] + u[i, 1] * cos[i]
    else:
        first, second = floats_at(x, 1, half)[0], floats_at(x + 4 * half, 1, half)[0]
        to_first, to_second = floats_at(y, 1, half)[0], floats_at(y + 4 * half, 1, half)[0]
        for i in range(half):
            to_first[i] = first[i] * cos[i] - second[i] * sin[i]
            to_second[i] = first[i] * sin[i] + second[i] * cos[i]


# ---- places in a sequence: how many are filled stands at an address


@task
def slice_at(args: int, chunk: int, _thread_id: int) -> None:
    """Row ``chunk`` of a table's (limit, d) from a place on. Arguments: table, y, d, the place's address."""
    a = numbers_at(args)
    d, place = a[2], numbers_at(a[3])[0]
    row, y = floats_at(a[0] + 4 * (place + chunk) * d, 1, d)[0], floats_at(a[1] + 4 * chunk * d, 1, d)[0]
    for i in range(d):
        y[i] = row[i]


@kernel
def kept_rows(a: Any, chunk: int, size: int) -> Any:
    """An chunk of the two tasks below: addresses of its first row and of that row's place in the cache; how many.

    Even chunks are keys and odd ones values; a number of the cache has ``size`` bytes.
    """
    which, first = chunk % 2, chunk // 2 * a[9]
    place = numbers_at(a[8])[0] + first
    return a[which] + 4 * first * a[5] * a[6], a[2 + which] + size * place * a[6], min(a[9], a[4] - first)


@task
def keep_halves(args: int, chunk: int, _thread_id: int) -> None:
    """Rows (n, g, d) of keys and of values -> half precision, where the cache (g, limit, d) holds them.

    Keys, values, the caches of both, n, g, d, limit, the address of the first row's place, rows for each chunk.
    """
    a = numbers_at(args)
    n_head, d = a[5], a[6]
    rows, cache, n = kept_rows(a, chunk, 2)
    for t in range(n):
        for h in range(n_head):
            row, to = rows + 4 * (t * n_head + h) * d, cache + 2 * (h * a[7] + t) * d
            for i in range(0, d - 15, 16):
                put_halves(to + 2 * i, load_floats(row + 4 * i))
            for i in range(d // 16 * 16, d):
                put_half(to + 2 * i, float_at(row + 4 * i))


@task
def keep_floats(args: int, chunk: int, _thread_id: int) -> None:
    """The same in float32."""
    a = numbers_at(args)
    n_head, d = a[5], a[6]
    rows, cache, n = kept_rows(a, chunk, 4)
    for t in range(n):
        for h in range(n_head):
            x = floats_at(rows + 4 * (t * n_head + h) * d, 1, d)[0]
            y = floats_at(cache + 4 * (h * a[7] + t) * d, 1, d)[0]
            for i in range(d):
                y[i] = x[i]
