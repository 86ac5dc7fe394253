"""Softmax in vectors of 16: of one row, and the running softmax of 16 rows (attention.py has its formulas).

A row of scores is padded with minus infinity to whole vectors; its exponential is 0.
Reference: softmax in reference.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinyllava.ops.cpu.compile import kernel
from tinyllava.ops.cpu.simd import intrinsics as simd
from tinyllava.ops.cpu.simd import llvm, reduce

# e^x = 2^n e^r with n = round(x log2(e)), r = x - n log(2), |r| <= log(2) / 2 (the Cephes library, expf.c).
# log(2) is a sum of two numbers, of which the first has so few digits that n times it is exact.
LOG2_E, LN2_HIGH, LN2_LOW = (np.float32(c) for c in (1.44269504088896, 0.693359375, -2.12194440e-4))
TERMS = tuple(
    np.float32(c) for c in (1.9875691e-4, 1.3981999e-3, 8.3334519e-3, 4.1665796e-2, 1.6666665e-1, 0.5)
)  # of the polynomial for e^r, highest power first
LEAST = -87.0  # below it e^x is no normal float32


def emit_exp(builder: Any, x: Any) -> Any:
    """e^x of 16 numbers that are not above 0, by the steps of rowwise.exp; 0 below e^-87."""
    n = llvm.call(builder, "llvm.rint.v16f32", llvm.F32X16, builder.fmul(x, llvm.f32x16(LOG2_E)))
    r = llvm.emit_fma(builder, n, llvm.f32x16(-LN2_HIGH), x)
    r = llvm.emit_fma(builder, n, llvm.f32x16(-LN2_LOW), r)
    p = llvm.f32x16(TERMS[0])
    for term in TERMS[1:]:
        p = llvm.emit_fma(builder, p, r, llvm.f32x16(term))
    y = llvm.emit_fma(builder, p, builder.fmul(r, r), builder.fadd(r, llvm.f32x16(1.0)))
    exponent = builder.add(builder.fptosi(n, llvm.I32X16), llvm.i32x16(127))
    y = builder.fmul(y, builder.bitcast(builder.shl(exponent, llvm.i32x16(23)), llvm.F32X16))
    return builder.select(builder.fcmp_ordered("<", x, llvm.f32x16(LEAST)), llvm.f32x16(0.0), y)


@llvm.instruction("v:vv")
def exp_difference(builder: Any, v: Any, w: Any) -> Any:
    """e^(v - w), lane by lane, for v not larger than w; v may be minus infinity."""
    return emit_exp(builder, builder.fsub(v, w))


@llvm.instruction("v:i")
def largest_of_each(builder: Any, address: Any) -> Any:
    """16 vectors at an address -> the largest lane of each."""
    return reduce.emit_reduce_each(builder, reduce.emit_load_16(builder, address), reduce.emit_larger)


@kernel
def pad(row: int, n: int, padded: int) -> None:
    """Minus infinity for the elements n to ``padded`` of a row."""
    for i in range(n, padded):
        simd.store_f32(row + 4 * i, np.float32(-np.inf))


@kernel
def largest_lanes(row: int, n: int) -> Any:
    """A vector whose largest lane is the largest of n numbers; n a multiple of 16, as below."""
    highest = simd.broadcast(np.float32(-np.inf))
    for i in range(0, n, 16):
        highest = reduce.larger(simd.load_f32x16(row + 4 * i), highest)
    return highest


@kernel
def exponentials(row: int, n: int, largest: float) -> Any:
    """x becomes e^(x - largest) in a row of n numbers. Returns a vector whose lanes add up to their sum."""
    sums = simd.zeros()
    for i in range(0, n, 16):
        powers = exp_difference(simd.load_f32x16(row + 4 * i), simd.broadcast(largest))
        simd.store_f32x16(row + 4 * i, powers)
        sums = sums + powers
    return sums


@kernel
def scale_row(row: int, n: int, factor: float) -> None:
    """n numbers times a factor."""
    for i in range(0, n, 16):
        simd.store_f32x16(row + 4 * i, simd.load_f32x16(row + 4 * i) * simd.broadcast(factor))


@kernel
def softmax(row: int, m: int, n: int) -> None:
    """The softmax of m scores, in place; zeros after them, up to n."""
    pad(row, m, n)
    sums = exponentials(row, n, reduce.largest_lane(largest_lanes(row, n)))
    scale_row(row, n, np.float32(1.0) / reduce.sum_lanes(sums))


@kernel
def running_softmax(scores: int, stride: int, n: int, largest: int, sums: int, scratch: int) -> Any:
    """The next n scores of 16 rows, ``stride`` bytes from row to row: s becomes e^(s - the row's largest so far).

    At ``largest`` and ``sums`` stand 16 floats each, which are updated: every row's largest score so far, and the
    sum of its e^(s - largest). Returns the factors e^(old largest - new largest), which correct what was computed
    with the old ones. Scratch holds 16 vectors, one for each row, which are reduced together.
    """
    for t in range(16):
        simd.store_f32x16(scratch + 64 * t, largest_lanes(scores + t * stride, n))
    before = simd.load_f32x16(largest)
    highest = reduce.larger(largest_of_each(scratch), before)
    simd.store_f32x16(largest, highest)
    for t in range(16):
        simd.store_f32x16(scratch + 64 * t, exponentials(scores + t * stride, n, simd.load_f32(largest + 4 * t)))
    correction = exp_difference(before, highest)
    simd.store_f32x16(sums, simd.fma(simd.load_f32x16(sums), correction, reduce.sum_each(scratch)))
    return correction
