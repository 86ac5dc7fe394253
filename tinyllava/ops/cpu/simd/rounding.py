"""Floats rounded to integers, x to about d * q: the steps of quantize_activations.py and pack_weights.py.

Of 16 blocks of 32 numbers, what is decided for each block is decided for all 16 in one vector: its lane b is block
b's.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from tinyllava.ops.cpu.simd import llvm, reduce
from tinyllava.ops.cpu.simd.llvm import F32X16, I32X16, instruction

# The largest int16 of activations and of weights, and what those of 64 weights may add up to: less than
# 2^31 / X_INT16, or the sum of 64 products would not fit in int32. So the two share the bits that there are.
X_INT16, W_INT16, W_INT16_SUM = 11585.0, 32767.0, 185300.0
SECOND_AT = 1024  # bytes from 16 vectors, one for each block, to 16 more


def emit_round(builder: Any, v: Any) -> Any:
    """The nearest whole numbers, ties to even."""
    return llvm.call(builder, "llvm.rint.v16f32", F32X16, v)


def emit_inverse(builder: Any, v: Any) -> Any:
    """1 / v, and 0 where v is 0."""
    none = builder.fcmp_ordered("==", v, llvm.f32x16(0.0))
    return builder.select(none, v, builder.fdiv(llvm.f32x16(1.0), v))


def _halves(builder: Any, address: Any) -> list[Any]:
    """32 floats."""
    return [llvm.load(builder, address, F32X16, at) for at in (0, 64)]


def _larger_magnitude(builder: Any, high: Any, low: Any) -> Any:
    """Of the largest and the smallest of some numbers, the one of larger magnitude."""
    return builder.select(builder.fcmp_ordered(">", high, builder.fneg(low)), high, low)


def _emit_quantize(builder: Any, address: Any, inverse: Any, limit: float, to: Any, kind: Any) -> Any:
    """Round 32 floats times ``inverse`` to integers of at most ``limit``; store as ``kind``, return as i32."""
    parts = []
    for half, x in enumerate(_halves(builder, address)):
        v = emit_round(builder, builder.fmul(x, llvm.broadcast(builder, inverse)))
        v = llvm.call(builder, "llvm.minnum.v16f32", F32X16, v, llvm.f32x16(limit))
        parts.append(builder.fptosi(v, I32X16))
        llvm.store(builder, builder.trunc(parts[half], ir.VectorType(kind, 16)), to, half * kind.width * 2)
    return parts


# ---- the best scale of 16 blocks


@instruction("-:ii")
def store_extremes(builder: Any, address: Any, to: Any) -> None:
    """32 floats -> a vector with their largest among its lanes, and SECOND_AT bytes on one with their smallest."""
    parts = _halves(builder, address)
    llvm.store(builder, reduce.emit_larger(builder, *parts), to)
    llvm.store(builder, reduce.emit_smaller(builder, *parts), to, SECOND_AT)


@instruction("v:i")
def extreme_of_each(builder: Any, address: Any) -> Any:
    """What store_extremes wrote for 16 blocks -> of each, the number of largest magnitude, sign included."""
    addresses = (llvm.offset_by(builder, address, at) for at in (0, SECOND_AT))
    largest, smallest = (reduce.emit_load_16(builder, at) for at in addresses)
    high = reduce.emit_reduce_each(builder, largest, reduce.emit_larger)
    return _larger_magnitude(builder, high, reduce.emit_reduce_each(builder, smallest, reduce.emit_smaller))


def _join_fours(builder: Any, v: Any, join: Any) -> Any:
    """Each lane and its neighbours in a group of four, joined: all four the same."""
    for step in (1, 2):
        v = join(builder, v, llvm.shuffle(builder, v, v, [lane ^ step for lane in range(16)]))
    return v


@instruction("v:v")
def extreme_of_four(builder: Any, v: Any) -> Any:
    """Of four lanes each, the number of largest magnitude, sign included."""
    high, low = (_join_fours(builder, v, join) for join in (reduce.emit_larger, reduce.emit_smaller))
    return _larger_magnitude(builder, high, low)


@instruction("v:v")
def sum_of_four(builder: Any, v: Any) -> Any:
    """The sum of four lanes each."""
    return _join_fours(builder, v, reduce.emit_add)


inverse = instruction("v:v")(emit_inverse)


@instruction("v:vvvv")
def select_less(builder: Any, a: Any, b: Any, x: Any, y: Any) -> Any:
    """x where a < b, else y."""
    return builder.select(builder.fcmp_ordered("<", a, b), x, y)


@instruction("v:if")
def rounding_errors(builder: Any, address: Any, inverse: Any) -> Any:
    """Of 32 floats times ``inverse``, the squared distances to the nearest whole numbers, two in each lane."""
    squares = llvm.f32x16(0.0)
    for x in _halves(builder, address):
        v = builder.fmul(x, llvm.broadcast(builder, inverse))
        distance = builder.fsub(v, emit_round(builder, v))
        squares = llvm.emit_fma(builder, distance, distance, squares)
    return squares


# ---- int8


@instruction("-:ifii")
def quantize_int8(builder: Any, address: Any, inverse: Any, to: Any, sums: Any) -> None:
    """32 floats times ``inverse`` -> 32 x int8; as floats their first 16, and SECOND_AT bytes on the others."""
    for half, v in enumerate(_emit_quantize(builder, address, inverse, 127.0, to, llvm.I8)):
        llvm.store(builder, builder.sitofp(v, F32X16), sums, SECOND_AT * half)


@instruction("-:i")
def add_128_at(builder: Any, address: Any) -> None:
    """32 x int8, in place -> the same plus 128, unsigned."""
    kind = ir.VectorType(llvm.I8, 32)
    llvm.store(builder, builder.xor(llvm.load(builder, address, kind), llvm.constant(kind, -128)), address)


@instruction("-:iv")
def store_as_i32(builder: Any, address: Any, values: Any) -> None:
    """Store 16 whole numbers, held as floats, as int32."""
    llvm.store(builder, builder.fptosi(values, I32X16), address)


# ---- int16


@instruction("f:i")
def extreme(builder: Any, address: Any) -> Any:
    """Of 32 floats, the one of largest magnitude, sign included; NaN if one of them is NaN or infinite."""
    parts, joins = _halves(builder, address), (reduce.emit_larger, reduce.emit_smaller)
    probe = builder.fmul(builder.fadd(*parts), llvm.f32x16(0.0))  # 0, or NaN wherever a number is not finite
    ends = [reduce.emit_reduce(builder, join(builder, *parts), join) for join in joins]
    return builder.fadd(_larger_magnitude(builder, *ends), reduce.emit_reduce(builder, probe, reduce.emit_add))


@instruction("-:ifi")
def quantize_int16(builder: Any, address: Any, inverse: Any, to: Any) -> None:
    """32 floats times ``inverse`` -> 32 x int16."""
    _emit_quantize(builder, address, inverse, 32767.0, to, llvm.I16)


@instruction("-:ii")
def pack_int16_columns(builder: Any, columns: Any, to: Any) -> None:
    """64 columns of weights, each 16 float32, one for each row -> a packed block of int16 and 16 scales."""
    magnitudes, most = llvm.f32x16(0.0), llvm.f32x16(0.0)
    for i in range(64):
        v = llvm.call(builder, "llvm.fabs.v16f32", F32X16, llvm.load(builder, columns, F32X16, 64 * i))
        magnitudes = builder.fadd(magnitudes, v)
        most = reduce.emit_larger(builder, v, most)
    ends = [builder.fmul(v, llvm.f32x16(1 / m)) for v, m in ((most, W_INT16), (magnitudes, W_INT16_SUM))]
    scale = builder.select(builder.fcmp_ordered(">", *ends), *ends)  # the second, too, if it is not finite
    inverse = emit_inverse(builder, scale)
    for j in range(32):
        pair = [builder.fmul(llvm.load(builder, columns, F32X16, 128 * j + at), inverse) for at in (0, 64)]
        low, high = (builder.fptosi(emit_round(builder, v), I32X16) for v in pair)
        low, high = builder.and_(low, llvm.i32x16(0xFFFF)), builder.shl(high, llvm.i32x16(16))
        llvm.store(builder, builder.or_(low, high), to, 64 * j)
    llvm.store(builder, scale, to, 2048)
