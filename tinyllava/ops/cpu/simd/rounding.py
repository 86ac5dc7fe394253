"""Floats rounded to integers: what activations become before they meet quantized weights.

x is about d * q, with q of 8 bits (or 16) and one float32 step d for 32 numbers, or for 64 or 128 of a prompt's;
blocks of 32 one by one, or sixteen of them at once.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from tinyllava.ops.cpu.simd.llvm import (
    F32,
    FLOATS,
    I8,
    I16,
    I32,
    INTS,
    call,
    constant,
    emit_fused,
    instruction,
    load,
    pick,
    plus,
    splat,
    store,
)
from tinyllava.ops.cpu.simd.reduce import fold, fold_each, larger_lanes, load_sixteen, smaller_lanes, sum_lanes

# The largest words of activations and of weights, and what 64 weights may add up to: less than 2^31 / X_WORD, or
# the sum of 64 products would not fit in int32. So the two share the bits that there are.
X_WORD, W_WORD, W_WORDS = 11585.0, 32767.0, 185300.0


def _extreme(builder: Any, a: Any, b: Any) -> Any:
    """Of 32 floats, the one of largest magnitude, sign included. NaN are passed over."""
    ends = []
    for name in ("maxnum", "minnum"):
        v = call(builder, f"llvm.{name}.v16f32", FLOATS, a, b)
        for width in (8, 4, 2):
            halves = [pick(builder, v, v, lanes) for lanes in (range(width), range(width, 2 * width))]
            v = call(builder, f"llvm.{name}.v{width}f32", ir.VectorType(F32, width), *halves)
        last = [builder.extract_element(v, ir.Constant(I32, lane)) for lane in (0, 1)]
        ends.append(call(builder, f"llvm.{name}.f32", F32, *last))
    high, low = ends
    return _further(builder, high, low)


@instruction("f:i")
def extreme(builder: Any, address: Any) -> Any:
    """Of 32 floats, the one of largest magnitude, sign included; NaN if one of them is NaN or infinite."""
    a, b = load(builder, address, FLOATS), load(builder, address, FLOATS, 64)
    probe = builder.fmul(builder.fadd(a, b), constant(FLOATS, 0.0))  # 0, or NaN wherever a number is not finite
    return builder.fadd(_extreme(builder, a, b), fold(builder, probe))


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


@instruction("-:ifi")
def quantize_words(builder: Any, address: Any, inverse: Any, to: Any) -> None:
    """32 floats times ``inverse`` -> 32 x s16."""
    _quantize(builder, address, inverse, 32767.0, to, I16)


def _squared_distances(builder: Any, parts: Any, inverse: Any) -> Any:
    """(x * inverse - the nearest whole number)^2 of 32 numbers, the two halves added lane by lane."""
    squares = constant(FLOATS, 0.0)
    for part in parts:
        v = builder.fmul(part, splat(builder, inverse))
        difference = builder.fsub(v, call(builder, "llvm.rint.v16f32", FLOATS, v))
        squares = emit_fused(builder, difference, difference, squares)
    return squares


def inverse_lanes(builder: Any, v: Any) -> Any:
    """1 / v, and 0 where v is 0."""
    none = builder.fcmp_ordered("==", v, constant(FLOATS, 0.0))
    return builder.select(none, v, builder.fdiv(constant(FLOATS, 1.0), v))


def _further(builder: Any, high: Any, low: Any) -> Any:
    """Of the largest and the smallest of some numbers, the one of larger magnitude."""
    return builder.select(builder.fcmp_ordered(">", high, builder.fneg(low)), high, low)


@instruction("-:ii")
def words_of_columns(builder: Any, columns: Any, to: Any) -> None:
    """64 columns of weights, each 16 float32, one for each row -> a record of words and 16 scales (tile.py)."""
    magnitudes, most = constant(FLOATS, 0.0), constant(FLOATS, 0.0)
    for i in range(64):
        v = call(builder, "llvm.fabs.v16f32", FLOATS, load(builder, columns, FLOATS, 64 * i))
        magnitudes = builder.fadd(magnitudes, v)
        most = larger_lanes(builder, v, most)
    ends = [builder.fmul(v, constant(FLOATS, 1 / m)) for v, m in ((most, W_WORD), (magnitudes, W_WORDS))]
    scale = builder.select(builder.fcmp_ordered(">", *ends), *ends)  # the second, too, if it is not finite
    inverse = inverse_lanes(builder, scale)
    for j in range(32):
        pair = [builder.fmul(load(builder, columns, FLOATS, 128 * j + at), inverse) for at in (0, 64)]
        low, high = (builder.fptosi(call(builder, "llvm.rint.v16f32", FLOATS, v), INTS) for v in pair)
        low, high = builder.and_(low, constant(INTS, 0xFFFF)), builder.shl(high, constant(INTS, 16))
        store(builder, builder.or_(low, high), to, 64 * j)
    store(builder, scale, to, 2048)


# ---- 16 blocks of 32 numbers at once; in a vector for all of them, lane b is block b's


@instruction("-:ii")
def put_ends(builder: Any, address: Any, to: Any) -> None:
    """32 floats -> a vector with their largest among its lanes, and 16 vectors on one with their smallest."""
    parts = [load(builder, address, FLOATS, at) for at in (0, 64)]
    store(builder, larger_lanes(builder, *parts), to)
    store(builder, smaller_lanes(builder, *parts), to, 1024)


@instruction("v:i")
def extremes_of_each(builder: Any, address: Any) -> Any:
    """What put_ends wrote for 16 blocks -> of each, the number of largest magnitude, sign included."""
    high = fold_each(builder, load_sixteen(builder, address), larger_lanes)
    low = fold_each(builder, load_sixteen(builder, plus(builder, address, 1024)), smaller_lanes)
    return _further(builder, high, low)


def _join_fours(builder: Any, v: Any, join: Any) -> Any:
    """Each lane and its neighbours in a group of four, joined: all four the same."""
    for step in (1, 2):
        v = join(builder, v, pick(builder, v, v, [lane ^ step for lane in range(16)]))
    return v


@instruction("v:v")
def extremes_of_four(builder: Any, v: Any) -> Any:
    """Of four lanes each, the number of largest magnitude, sign included."""
    high, low = (_join_fours(builder, v, join) for join in (larger_lanes, smaller_lanes))
    return _further(builder, high, low)


@instruction("v:v")
def sums_of_four(builder: Any, v: Any) -> Any:
    """The sum of four lanes each."""
    return _join_fours(builder, v, sum_lanes)


@instruction("v:v")
def inverse_or_zero(builder: Any, v: Any) -> Any:
    """1 / v, and 0 where v is 0."""
    return inverse_lanes(builder, v)


@instruction("v:vvvv")
def where_less(builder: Any, a: Any, b: Any, x: Any, y: Any) -> Any:
    """x where a < b, else y."""
    return builder.select(builder.fcmp_ordered("<", a, b), x, y)


@instruction("v:if")
def rounding_errors(builder: Any, address: Any, inverse: Any) -> Any:
    """Of 32 floats times ``inverse``, the squared distances to the nearest whole numbers, two in each lane."""
    return _squared_distances(builder, [load(builder, address, FLOATS, at) for at in (0, 64)], inverse)


@instruction("-:ifii")
def put_rounded(builder: Any, address: Any, inverse: Any, to: Any, sums: Any) -> None:
    """32 floats times ``inverse`` -> 32 x s8; and as floats their first 16, and 16 vectors on the others."""
    for half, v in enumerate(_quantize(builder, address, inverse, 127.0, to, I8)):
        store(builder, builder.sitofp(v, FLOATS), sums, 1024 * half)


@instruction("-:iv")
def put_ints(builder: Any, address: Any, values: Any) -> None:
    """Store 16 whole numbers, held as floats, as int32."""
    store(builder, builder.fptosi(values, INTS), address)


@instruction("-:i")
def flip_signs(builder: Any, address: Any) -> None:
    """32 x s8, in place -> the same plus 128, as u8."""
    kind = ir.VectorType(I8, 32)
    store(builder, builder.xor(load(builder, address, kind), constant(kind, -128)), address)
