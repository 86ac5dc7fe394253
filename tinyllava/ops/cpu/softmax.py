"""The vector code of softmax: of one row its largest and its exponentials; of sixteen rows the running softmax.

Rows are padded to whole vectors of 16 by minus infinity, whose exponential is 0 here.
Reference: softmax in reference.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinyllava.ops.cpu.compile import kernel
from tinyllava.ops.cpu.simd.intrinsics import (
    add,
    everywhere,
    float_at,
    fused,
    load_floats,
    no_floats,
    put_float,
    put_floats,
)
from tinyllava.ops.cpu.simd.llvm import FLOATS, INTS, call, constant, emit_fused, instruction, splat
from tinyllava.ops.cpu.simd.reduce import (
    fold_each,
    larger,
    larger_lanes,
    largest_lane,
    load_sixteen,
    sums_of_each,
    total,
)

LOG2_E, LN2 = 1.44269504088896, (0.693359375, -2.12194440e-4)  # log(2) in two parts: Cephes library, expf.c
TERMS = (1.9875691e-4, 1.3981999e-3, 8.3334519e-3, 4.1665796e-2, 1.6666665e-1, 0.5)
LEAST = -87.0  # of a logarithm; below it e^x is no normal number


def emit_exp(builder: Any, x: Any) -> Any:
    """e^x of 16 numbers that are not above 0, as numba_rows.exp; 0 below e^-87."""
    n = call(builder, "llvm.rint.v16f32", FLOATS, builder.fmul(x, constant(FLOATS, LOG2_E)))
    r = emit_fused(builder, n, constant(FLOATS, -LN2[0]), x)
    r = emit_fused(builder, n, constant(FLOATS, -LN2[1]), r)
    p = constant(FLOATS, TERMS[0])
    for term in TERMS[1:]:
        p = emit_fused(builder, p, r, constant(FLOATS, term))
    y = emit_fused(builder, p, builder.fmul(r, r), builder.fadd(r, constant(FLOATS, 1.0)))
    exponent = builder.add(builder.fptosi(n, INTS), constant(INTS, 127))
    y = builder.fmul(y, builder.bitcast(builder.shl(exponent, constant(INTS, 23)), FLOATS))
    return builder.select(builder.fcmp_ordered("<", x, constant(FLOATS, LEAST)), constant(FLOATS, 0.0), y)


@instruction("v:vf")
def exp_less(builder: Any, v: Any, less: Any) -> Any:
    """e^(v - less) of 16 numbers that are not larger than ``less``."""
    return emit_exp(builder, builder.fsub(v, splat(builder, less)))


@instruction("v:vv")
def exp_difference(builder: Any, v: Any, less: Any) -> Any:
    """e^(v - less), lane by lane; v may be minus infinity."""
    return emit_exp(builder, builder.fsub(v, less))


@instruction("v:i")
def largest_of_each(builder: Any, address: Any) -> Any:
    """16 vectors at an address -> the largest of each."""
    return fold_each(builder, load_sixteen(builder, address), larger_lanes)


@kernel
def pad(row: int, n: int, to: int) -> None:
    """Minus infinity for the numbers n .. to of a row."""
    for i in range(n, to):
        put_float(row + 4 * i, np.float32(-np.inf))


@kernel
def largest_lanes(row: int, n: int, least: float) -> Any:
    """16 numbers, of which the largest is that of n numbers and ``least``; n a multiple of 16."""
    highest = everywhere(least)
    for i in range(0, n, 16):
        highest = larger(load_floats(row + 4 * i), highest)
    return highest


@kernel
def largest(row: int, n: int, least: float) -> Any:
    """The largest of n numbers and ``least``."""
    return largest_lane(largest_lanes(row, n, least))


@kernel
def exponential_lanes(row: int, n: int, less: float) -> Any:
    """e^(x - less) in place of n numbers, a multiple of 16. Returns 16 numbers whose sum is theirs."""
    sums = no_floats()
    for i in range(0, n, 16):
        powers = exp_less(load_floats(row + 4 * i), less)
        put_floats(row + 4 * i, powers)
        sums = add(sums, powers)
    return sums


@kernel
def exponentials(row: int, n: int, less: float) -> Any:
    """The same. Returns the sum."""
    return total(exponential_lanes(row, n, less))


@kernel
def soften_rows(scores: int, step: int, n: int, top: int, sums: int, room: int) -> Any:
    """The running softmax of 16 rows, ``step`` bytes apart, over their next n scores, a multiple of 16.

    At ``top`` and ``sums`` stand 16 numbers: the largest score so far, and the sum of e^(score - that). Scores
    become e^(score - the new largest). Returns by what earlier sums are multiplied: e^(old largest - new largest).
    There is room for 16 vectors, so that 16 rows are folded at once.
    """
    for t in range(16):
        put_floats(room + 64 * t, largest_lanes(scores + t * step, n, np.float32(-np.inf)))
    before = load_floats(top)
    highest = larger(largest_of_each(room), before)
    put_floats(top, highest)
    for t in range(16):
        put_floats(room + 64 * t, exponential_lanes(scores + t * step, n, float_at(top + 4 * t)))
    correction = exp_difference(before, highest)
    put_floats(sums, fused(load_floats(sums), correction, sums_of_each(room)))
    return correction
