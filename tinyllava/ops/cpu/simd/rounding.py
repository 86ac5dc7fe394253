"""Floats rounded to integers: what activations become before they meet quantized weights.

x is about d * q, with q of 8 bits (or 16) and one float32 step d for 32 numbers, or for 64 or 128 of a prompt's;
blocks of 32 one by one, or sixteen of them at once.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from tinyllava.ops.cpu.simd import llvm, reduce

# The largest words of activations and of weights, and what 64 weights may add up to: less than 2^31 / X_WORD, or
# the sum of 64 products would not fit in int32. So the two share the bits that there are.
X_INT16, W_INT16, W_INT16_SUM = 11585.0, 32767.0, 185300.0


def _emit_extreme(builder: Any, a: Any, b: Any) -> Any:
    """Of 32 floats, the one of largest magnitude, sign included. NaN are passed over."""
    ends = []
    for name in ("maxnum", "minnum"):
        v = llvm.call(builder, f"llvm.{name}.v16f32", llvm.F32X16, a, b)
        for width in (8, 4, 2):
            halves = [llvm.shuffle(builder, v, v, lanes) for lanes in (range(width), range(width, 2 * width))]
            v = llvm.call(builder, f"llvm.{name}.v{width}f32", ir.VectorType(llvm.F32, width), *halves)
        last = [builder.extract_element(v, llvm.i32(lane)) for lane in (0, 1)]
        ends.append(llvm.call(builder, f"llvm.{name}.f32", llvm.F32, *last))
    high, low = ends
    return _emit_larger_magnitude(builder, high, low)


@llvm.instruction("f:i")
def extreme(builder: Any, address: Any) -> Any:
    """Of 32 floats, the one of largest magnitude, sign included; NaN if one of them is NaN or infinite."""
    a, b = llvm.load(builder, address, llvm.F32X16), llvm.load(builder, address, llvm.F32X16, 64)
    probe = builder.fmul(builder.fadd(a, b), llvm.f32x16(0.0))  # 0, or NaN wherever a number is not finite
    return builder.fadd(_emit_extreme(builder, a, b), reduce.emit_sum(builder, probe))


def _quantize(builder: Any, address: Any, inverse: Any, limit: float, to: Any, kind: Any) -> Any:
    """Round 32 floats times ``inverse`` to integers of at most ``limit``; store as ``kind``, return as i32."""
    parts = []
    for half in range(2):
        v = builder.fmul(llvm.load(builder, address, llvm.F32X16, 64 * half), llvm.broadcast(builder, inverse))
        v = llvm.call(builder, "llvm.rint.v16f32", llvm.F32X16, v)
        v = llvm.call(builder, "llvm.minnum.v16f32", llvm.F32X16, v, llvm.f32x16(limit))
        parts.append(builder.fptosi(v, llvm.I32X16))
        llvm.store(builder, builder.trunc(parts[half], ir.VectorType(kind, 16)), to, half * kind.width * 2)
    return parts


@llvm.instruction("-:ifi")
def quantize_int16(builder: Any, address: Any, inverse: Any, to: Any) -> None:
    """32 floats times ``inverse`` -> 32 x s16."""
    _quantize(builder, address, inverse, 32767.0, to, llvm.I16)


def _squared_distances(builder: Any, parts: Any, inverse: Any) -> Any:
    """(x * inverse - the nearest whole number)^2 of 32 numbers, the two halves added lane by lane."""
    squares = llvm.f32x16(0.0)
    for part in parts:
        v = builder.fmul(part, llvm.broadcast(builder, inverse))
        difference = builder.fsub(v, llvm.call(builder, "llvm.rint.v16f32", llvm.F32X16, v))
        squares = llvm.emit_fma(builder, difference, difference, squares)
    return squares


def emit_inverse(builder: Any, v: Any) -> Any:
    """1 / v, and 0 where v is 0."""
    none = builder.fcmp_ordered("==", v, llvm.f32x16(0.0))
    return builder.select(none, v, builder.fdiv(llvm.f32x16(1.0), v))


def _emit_larger_magnitude(builder: Any, high: Any, low: Any) -> Any:
    """Of the largest and the smallest of some numbers, the one of larger magnitude."""
    return builder.select(builder.fcmp_ordered(">", high, builder.fneg(low)), high, low)


@llvm.instruction("-:ii")
def pack_int16_columns(builder: Any, columns: Any, to: Any) -> None:
    """64 columns of weights, each 16 float32, one for each row -> a record of words and 16 scales (tile.py)."""
    magnitudes, most = llvm.f32x16(0.0), llvm.f32x16(0.0)
    for i in range(64):
        v = llvm.call(builder, "llvm.fabs.v16f32", llvm.F32X16, llvm.load(builder, columns, llvm.F32X16, 64 * i))
        magnitudes = builder.fadd(magnitudes, v)
        most = reduce.emit_larger(builder, v, most)
    ends = [builder.fmul(v, llvm.f32x16(1 / m)) for v, m in ((most, W_INT16), (magnitudes, W_INT16_SUM))]
    scale = builder.select(builder.fcmp_ordered(">", *ends), *ends)  # the second, too, if it is not finite
    inverse = emit_inverse(builder, scale)
    for j in range(32):
        pair = [builder.fmul(llvm.load(builder, columns, llvm.F32X16, 128 * j + at), inverse) for at in (0, 64)]
        rounded = (llvm.call(builder, "llvm.rint.v16f32", llvm.F32X16, v) for v in pair)
        low, high = (builder.fptosi(v, llvm.I32X16) for v in rounded)
        low, high = builder.and_(low, llvm.i32x16(0xFFFF)), builder.shl(high, llvm.i32x16(16))
        llvm.store(builder, builder.or_(low, high), to, 64 * j)
    llvm.store(builder, scale, to, 2048)


# ---- 16 blocks of 32 numbers at once; in a vector for all of them, lane b is block b's


@llvm.instruction("-:ii")
def store_extremes(builder: Any, address: Any, to: Any) -> None:
    """32 floats -> a vector with their largest among its lanes, and 16 vectors on one with their smallest."""
    parts = [llvm.load(builder, address, llvm.F32X16, at) for at in (0, 64)]
    llvm.store(builder, reduce.emit_larger(builder, *parts), to)
    llvm.store(builder, reduce.emit_smaller(builder, *parts), to, 1024)


@llvm.instruction("v:i")
def extreme_of_each(builder: Any, address: Any) -> Any:
    """What store_extremes wrote for 16 blocks -> of each, the number of largest magnitude, sign included."""
    largest, smallest = (reduce.emit_load_16(builder, llvm.offset_by(builder, address, at)) for at in (0, 1024))
    high = reduce.emit_reduce_each(builder, largest, reduce.emit_larger)
    low = reduce.emit_reduce_each(builder, smallest, reduce.emit_smaller)
    return _emit_larger_magnitude(builder, high, low)


def _join_fours(builder: Any, v: Any, join: Any) -> Any:
    """Each lane and its neighbours in a group of four, joined: all four the same."""
    for step in (1, 2):
        v = join(builder, v, llvm.shuffle(builder, v, v, [lane ^ step for lane in range(16)]))
    return v


@llvm.instruction("v:v")
def extreme_of_four(builder: Any, v: Any) -> Any:
    """Of four lanes each, the number of largest magnitude, sign included."""
    high, low = (_join_fours(builder, v, join) for join in (reduce.emit_larger, reduce.emit_smaller))
    return _emit_larger_magnitude(builder, high, low)


@llvm.instruction("v:v")
def sum_of_four(builder: Any, v: Any) -> Any:
    """The sum of four lanes each."""
    return _join_fours(builder, v, reduce.emit_add)


@llvm.instruction("v:v")
def inverse(builder: Any, v: Any) -> Any:
    """1 / v, and 0 where v is 0."""
    return emit_inverse(builder, v)


@llvm.instruction("v:vvvv")
def select_less(builder: Any, a: Any, b: Any, x: Any, y: Any) -> Any:
    """x where a < b, else y."""
    return builder.select(builder.fcmp_ordered("<", a, b), x, y)


@llvm.instruction("v:if")
def rounding_errors(builder: Any, address: Any, inverse: Any) -> Any:
    """Of 32 floats times ``inverse``, the squared distances to the nearest whole numbers, two in each lane."""
    return _squared_distances(builder, [llvm.load(builder, address, llvm.F32X16, at) for at in (0, 64)], inverse)


@llvm.instruction("-:ifii")
def quantize_int8(builder: Any, address: Any, inverse: Any, to: Any, sums: Any) -> None:
    """32 floats times ``inverse`` -> 32 x s8; and as floats their first 16, and 16 vectors on the others."""
    for half, v in enumerate(_quantize(builder, address, inverse, 127.0, to, llvm.I8)):
        llvm.store(builder, builder.sitofp(v, llvm.F32X16), sums, 1024 * half)


@llvm.instruction("-:iv")
def store_as_i32(builder: Any, address: Any, values: Any) -> None:
    """Store 16 whole numbers, held as floats, as int32."""
    llvm.store(builder, builder.fptosi(values, llvm.I32X16), address)


@llvm.instruction("-:i")
def add_128_at(builder: Any, address: Any) -> None:
    """32 x s8, in place -> the same plus 128, as u8."""
    kind = ir.VectorType(llvm.I8, 32)
    llvm.store(builder, builder.xor(llvm.load(builder, address, kind), llvm.constant(kind, -128)), address)
