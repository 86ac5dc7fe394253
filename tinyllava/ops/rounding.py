"""Floats rounded to integers, 32 at a time: what activations become before they meet quantized weights.

x is about d * q, with q of 8 bits (or 16) and one float32 step d for the 32 numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir

from tinyllava.ops.compiled import kernel
from tinyllava.ops.instructions import fold
from tinyllava.ops.simd import (
    F32,
    FLOATS,
    I8,
    I16,
    I32,
    I64,
    INTS,
    call,
    constant,
    instruction,
    load,
    pick,
    splat,
    store,
)


@instruction("f:i")
def extreme(builder: Any, address: Any) -> Any:
    """Of 32 floats, the one of largest magnitude, sign included; NaN if one of them is NaN or infinite."""
    a, b = load(builder, address, FLOATS), load(builder, address, FLOATS, 64)
    ends = []
    for name in ("maxnum", "minnum"):
        v = call(builder, f"llvm.{name}.v16f32", FLOATS, a, b)
        for width in (8, 4, 2, 1):
            kind = ir.VectorType(F32, width)
            halves = [pick(builder, v, v, lanes) for lanes in (range(width), range(width, 2 * width))]
            if width == 1:
                halves = [builder.extract_element(h, ir.Constant(I32, 0)) for h in halves]
                v = call(builder, f"llvm.{name}.f32", F32, *halves)
            else:
                v = call(builder, f"llvm.{name}.v{width}f32", kind, *halves)
        ends.append(v)
    high, low = ends
    end = builder.select(builder.fcmp_ordered(">", high, builder.fneg(low)), high, low)
    probe = builder.fmul(builder.fadd(a, b), constant(FLOATS, 0.0))  # 0, or NaN wherever a number is not finite
    return builder.fadd(end, fold(builder, probe))


@instruction("f:i")
def sum_of_magnitudes(builder: Any, address: Any) -> Any:
    """Of 32 floats."""
    parts = [call(builder, "llvm.fabs.v16f32", FLOATS, load(builder, address, FLOATS, at)) for at in (0, 64)]
    return fold(builder, builder.fadd(*parts))


def _quantize(builder: Any, address: Any, inverse: Any, limit: float, to: Any, kind: Any) -> Any:
    """Round 32 floats times ``inverse`` to integers of at most ``limit``; store as ``kind``, return as i32."""
    parts = []
    for half in range(2):
        v = builder.fmul(load(builder, address, FLOATS, 64 * half), splat(builder, inverse))
        v = call(builder, "llvm.rint.v16f32", FLOATS, v)
        v = call(builder, "llvm.minnum.v16f32", FLOATS, v, constant(FLOATS, limit))
        parts.append(builder.fptosi(v, INTS))
        store(builder, builder.trunc(parts[half], ir.VectorType(kind, 16)), to, half * kind.width * 2)
    return parts


@instruction("i:ifi")
def quantize_bytes(builder: Any, address: Any, inverse: Any, to: Any) -> Any:
    """32 floats times ``inverse`` -> 32 x s8. Returns the sums of the first 16 (lower word) and of the others."""
    sums = []
    for v in _quantize(builder, address, inverse, 127.0, to, I8):
        sums.append(call(builder, "llvm.vector.reduce.add.v16i32", I32, v))
    low, high = builder.zext(sums[0], I64), builder.zext(sums[1], I64)
    return builder.or_(low, builder.shl(high, ir.Constant(I64, 32)))


@instruction("-:ifi")
def quantize_words(builder: Any, address: Any, inverse: Any, to: Any) -> None:
    """32 floats times ``inverse`` -> 32 x s16."""
    _quantize(builder, address, inverse, 32767.0, to, I16)


@instruction("f:if")
def rounding_error(builder: Any, address: Any, inverse: Any) -> Any:
    """The sum over 32 floats of (x * inverse - the nearest whole number)^2."""
    squares = constant(FLOATS, 0.0)
    for half in range(2):
        v = builder.fmul(load(builder, address, FLOATS, 64 * half), splat(builder, inverse))
        difference = builder.fsub(v, call(builder, "llvm.rint.v16f32", FLOATS, v))
        squares = builder.fadd(squares, builder.fmul(difference, difference))
    return fold(builder, squares)


@kernel
def best_step(x: int) -> Any:
    """The step d for 32 floats at an address, for which the largest becomes -128, -127, -126 or -125.

    Which of the four is chance, and the best of them has 8% less error than the last or the first alone. (The sign
    is that of -128 because 8 bits have no 128.)
    """
    end, best, least = extreme(x), np.float32(0.0), np.float32(np.inf)
    if end == np.float32(0.0):
        return end
    for top in (-128.0, -127.0, -126.0, -125.0):
        step = end / np.float32(top)
        error = rounding_error(x, np.float32(1.0) / step) * step * step
        if not error >= least:  # NaN is taken, too
            best, least = step, error
    return best
