"""The vector instructions that kernels call, one small function each; simd.py has the picture.

Addresses are whole numbers of bytes. Numba has no float16 on the CPU: its bits are read and converted here.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from tinyllava.ops.cpu.simd.llvm import (
    BYTES,
    F32,
    FLOATS,
    HARDWARE_HALF,
    I8,
    I16,
    I32,
    I64,
    INTS,
    call,
    constant,
    emit_dot4,
    emit_fused,
    instruction,
    load,
    pick,
    splat,
    store,
)

# ---- scalars


def half_by_integers(builder: Any, half: Any) -> Any:
    """Move sign and magnitude to their places in a float32, and scale by 2^112, the difference of the biases.

    The multiplication also normalises subnormals. An exponent of all ones (infinity, NaN) is restored after.
    """
    magnitude = builder.shl(builder.and_(half, ir.Constant(I32, 0x7FFF)), ir.Constant(I32, 13))
    scaled = builder.bitcast(builder.fmul(builder.bitcast(magnitude, F32), ir.Constant(F32, 2.0**112)), I32)
    exponent = ir.Constant(I32, 0x7C00)
    special = builder.icmp_unsigned("==", builder.and_(half, exponent), exponent)
    restored = builder.or_(magnitude, ir.Constant(I32, 0x7F800000))
    sign = builder.shl(builder.and_(half, ir.Constant(I32, 0x8000)), ir.Constant(I32, 16))
    return builder.bitcast(builder.or_(builder.select(special, restored, scaled), sign), F32)


@instruction("f:i")
def half_at(builder: Any, address: Any) -> Any:
    """The half-precision number stored at an address, as float32."""
    half = load(builder, address, I16)
    if HARDWARE_HALF:
        return builder.fpext(builder.bitcast(half, ir.HalfType()), F32)
    return half_by_integers(builder, builder.zext(half, I32))


def load_half_vector(builder: Any, address: Any) -> Any:
    """16 half-precision numbers, as float32."""
    if HARDWARE_HALF:
        return builder.fpext(load(builder, address, ir.VectorType(ir.HalfType(), 16)), FLOATS)
    v = ir.Constant(FLOATS, ir.Undefined)
    for i in range(16):
        half = builder.zext(load(builder, address, I16, 2 * i), I32)
        v = builder.insert_element(v, half_by_integers(builder, half), ir.Constant(I32, i))
    return v


@instruction("v:i")
def load_halves(builder: Any, address: Any) -> Any:
    """16 half-precision numbers."""
    return load_half_vector(builder, address)


@instruction("v:i")
def load_bfloats(builder: Any, address: Any) -> Any:
    """16 bfloat16: each the upper half of a float32."""
    wide = builder.zext(load(builder, address, ir.VectorType(I16, 16)), INTS)
    return builder.bitcast(builder.shl(wide, constant(INTS, 16)), FLOATS)


@instruction("-:iv")
def put_floats(builder: Any, address: Any, values: Any) -> None:
    """Store 16 x float32."""
    store(builder, values, address)


@instruction("f:i")
def float_at(builder: Any, address: Any) -> Any:
    """The float32 at an address."""
    return load(builder, address, F32)


@instruction("-:if")
def put_float(builder: Any, address: Any, value: Any) -> None:
    """Store a float32."""
    store(builder, value, address)


@instruction("-:iv")
def put_halves(builder: Any, address: Any, values: Any) -> None:
    """Store 16 numbers in half precision, rounded to the nearest. Only with HARDWARE_HALF."""
    store(builder, builder.fptrunc(values, ir.VectorType(ir.HalfType(), 16)), address)


@instruction("-:if")
def put_half(builder: Any, address: Any, value: Any) -> None:
    """Store one of them."""
    store(builder, builder.fptrunc(value, ir.HalfType()), address)


@instruction("-:ii")
def put_int(builder: Any, address: Any, value: Any) -> None:
    """Store the lower 32 bits of an integer."""
    store(builder, builder.trunc(value, I32), address)


@instruction("-:ii")
def put_short(builder: Any, address: Any, value: Any) -> None:
    """Store the lower 16 bits of an integer."""
    store(builder, builder.trunc(value, I16), address)


@instruction("-:ib")
def put_bytes(builder: Any, address: Any, values: Any) -> None:
    """Store 64 bytes."""
    store(builder, values, address)


@instruction("-:i")
def clear_bytes(builder: Any, address: Any) -> None:
    """64 zero bytes."""
    store(builder, constant(BYTES, 0), address)


@instruction("i:i")
def word_at(builder: Any, address: Any) -> Any:
    """The unsigned 32-bit integer at an address."""
    return builder.zext(load(builder, address, I32), I64)


@instruction("f:i")
def bfloat_at(builder: Any, address: Any) -> Any:
    """The bfloat16 at an address: the upper half of a float32."""
    return builder.bitcast(builder.shl(builder.zext(load(builder, address, I16), I32), ir.Constant(I32, 16)), F32)


@instruction("f:i")
def float_of_bits(builder: Any, bits: Any) -> Any:
    """The float32 with these bits."""
    return builder.bitcast(builder.trunc(bits, I32), F32)


@instruction("f:f")
def power_of_two(builder: Any, n: Any) -> Any:
    """2^n for a whole number n of -126 to 127: n + 127 is the exponent field."""
    field = builder.add(builder.fptosi(n, I32), ir.Constant(I32, 127))
    return builder.bitcast(builder.shl(field, ir.Constant(I32, 23)), F32)


@instruction("-:i")
def prefetch(builder: Any, address: Any) -> None:
    """Ask for the cache line at an address."""
    pointer = builder.inttoptr(address, I8.as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
    name = "llvm.prefetch.p0"
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    builder.call(function, [pointer, *(ir.Constant(I32, n) for n in (0, 3, 1))])


# ---- loading


@instruction("b:i")
def load_bytes(builder: Any, address: Any) -> Any:
    """64 bytes."""
    return load(builder, address, BYTES)


@instruction("v:i")
def load_floats(builder: Any, address: Any) -> Any:
    """16 x float32."""
    return load(builder, address, FLOATS)


@instruction("b:ii")
def two_halves(builder: Any, a: Any, b: Any) -> Any:
    """| 32 bytes at a | 32 bytes at b |."""
    half = ir.VectorType(I8, 32)
    return pick(builder, load(builder, a, half), load(builder, b, half), range(64))


@instruction("b:ii")
def quarters_apart(builder: Any, address: Any, step: Any) -> Any:
    """Four times 16 bytes, ``step`` bytes apart."""
    quarter, at = ir.VectorType(I8, 16), [address]
    for _ in range(3):
        at.append(builder.add(at[-1], step))
    pairs = [pick(builder, *(load(builder, a, quarter) for a in at[i : i + 2]), range(32)) for i in (0, 2)]
    return pick(builder, *pairs, range(64))


@instruction("-:i")
def part_halves(builder: Any, address: Any) -> None:
    """Four times 32 bytes, in place -> four first halves, then four second halves."""
    parts = [builder.bitcast(load(builder, address, BYTES, at), ir.VectorType(I64, 8)) for at in (0, 64)]
    for half in range(2):
        lanes = [4 * i + 2 * half + j for i in range(4) for j in range(2)]
        store(builder, pick(builder, *parts, lanes), address, 64 * half)


@instruction("b:ii")
def four_quarters(builder: Any, a: Any, b: Any) -> Any:
    """| 16 bytes at a | the same | 16 bytes at b | the same |: nibbles of two blocks of 32."""
    quarter = ir.VectorType(I8, 16)
    lanes = [*range(16), *range(16), *range(16, 32), *range(16, 32)]
    return pick(builder, load(builder, a, quarter), load(builder, b, quarter), lanes)


# ---- taking bits apart


def _bits(builder: Any, v: Any, lanes_second: Any, first: Any, second: Any, mask: Any) -> Any:
    """Shift dwords right, by ``second`` where lanes_second is 1, else by ``first``; keep ``mask`` of each byte."""
    which = ir.Constant(ir.VectorType(ir.IntType(1), 16), list(lanes_second))
    shift = builder.select(which, *(splat(builder, builder.trunc(s, I32)) for s in (second, first)))
    shifted = builder.bitcast(builder.lshr(builder.bitcast(v, INTS), shift), BYTES)
    return builder.and_(shifted, splat(builder, builder.trunc(mask, I8), 64))


@instruction("b:biii")
def bits_by_half(builder: Any, v: Any, first: Any, second: Any, mask: Any) -> Any:
    """| (v >> first) & mask in 32 bytes | (v >> second) & mask in 32 bytes |."""
    return _bits(builder, v, [0] * 8 + [1] * 8, first, second, mask)


@instruction("b:biii")
def bits_by_quarter(builder: Any, v: Any, first: Any, second: Any, mask: Any) -> Any:
    """| >> first | >> second | >> first | >> second |, 16 bytes each, & mask."""
    return _bits(builder, v, ([0] * 4 + [1] * 4) * 2, first, second, mask)


@instruction("b:bbi")
def join_bits(builder: Any, low: Any, high: Any, shift: Any) -> Any:
    """low | high << shift, byte by byte; no bit may leave its byte."""
    shifted = builder.shl(builder.bitcast(high, INTS), splat(builder, builder.trunc(shift, I32)))
    return builder.or_(low, builder.bitcast(shifted, BYTES))


@instruction("b:bi")
def masked(builder: Any, v: Any, mask: Any) -> Any:
    """Each byte & mask."""
    return builder.and_(v, splat(builder, builder.trunc(mask, I8), 64))


@instruction("b:bb")
def either(builder: Any, a: Any, b: Any) -> Any:
    """a | b."""
    return builder.or_(a, b)


@instruction("b:ii")
def fifth_bits(builder: Any, a: Any, b: Any) -> Any:
    """64 bytes, 16 where a bit is set: those of the 32-bit word at address a, then those of the one at b."""
    words = pick(builder, *(splat(builder, load(builder, address, I32), 1) for address in (a, b)), range(2))
    flags = builder.bitcast(words, ir.VectorType(ir.IntType(1), 64))
    return builder.select(flags, constant(BYTES, 16), constant(BYTES, 0))


@instruction("b:b")
def flip_sign(builder: Any, v: Any) -> Any:
    """s8 -> u8: add 128 to each byte."""
    return builder.xor(v, constant(BYTES, -128))


# ---- sums


@instruction("n:")
def no_ints(_builder: Any) -> Any:
    """16 zeros."""
    return constant(INTS, 0)


@instruction("v:")
def no_floats(_builder: Any) -> Any:
    """16 zeros."""
    return constant(FLOATS, 0.0)


@instruction("n:nbb")
def dot4(builder: Any, sums: Any, a: Any, b: Any) -> Any:
    """The picture at the top of simd.py."""
    return emit_dot4(builder, sums, a, b)


@instruction("v:n")
def to_floats(builder: Any, v: Any) -> Any:
    """16 x int32 -> 16 x float32."""
    return builder.sitofp(v, FLOATS)


@instruction("v:vvv")
def fused(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c."""
    return emit_fused(builder, a, b, c)


@instruction("f:fff")
def fused_one(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c of three numbers, with one rounding."""
    return call(builder, "llvm.fma.f32", F32, a, b, c)


@instruction("v:vv")
def times(builder: Any, a: Any, b: Any) -> Any:
    """a * b."""
    return builder.fmul(a, b)


@instruction("v:vv")
def add(builder: Any, a: Any, b: Any) -> Any:
    """a + b."""
    return builder.fadd(a, b)


@instruction("v:f")
def everywhere(builder: Any, value: Any) -> Any:
    """The same number in all lanes."""
    return splat(builder, value)
