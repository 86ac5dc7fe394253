"""The vector instructions that kernels call, ``simd.`` in their code; llvm.py has the picture.

Addresses are whole numbers of bytes, and need not be aligned. Names tell types as in LLVM: f32x16 is 16 x float32.
Numba has no float16 on the CPU: its bits are read and converted here.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from tinyllava.ops.cpu.simd import llvm
from tinyllava.ops.cpu.simd.llvm import F32X16, I8X64, I32X16, instruction

F16X16 = ir.VectorType(ir.HalfType(), 16)
I16X16 = ir.VectorType(llvm.I16, 16)  # bits of float16, or of bfloat16: the upper half of a float32

# ---- float16 to float32


def emit_f16s_to_f32(builder: Any, bits: Any) -> Any:
    """A vector of the bits of float16 (i16) -> float32."""
    count = bits.type.count
    if llvm.HARDWARE_HALF:
        halves = builder.bitcast(bits, ir.VectorType(ir.HalfType(), count))
        return builder.fpext(halves, ir.VectorType(llvm.F32, count))
    v = ir.Constant(ir.VectorType(llvm.F32, count), ir.Undefined)
    for i in range(count):
        half = builder.zext(builder.extract_element(bits, llvm.i32(i)), llvm.I32)
        v = builder.insert_element(v, _f16_to_f32(builder, half), llvm.i32(i))
    return v


def _f16_to_f32(builder: Any, half: Any) -> Any:
    """Move sign and magnitude to their places in a float32, and scale by 2^112, the difference of the biases.

    The multiplication also normalises subnormals. An exponent of all ones (infinity, NaN) is restored after.
    """
    magnitude = builder.shl(builder.and_(half, llvm.i32(0x7FFF)), llvm.i32(13))
    scaled = builder.fmul(builder.bitcast(magnitude, llvm.F32), llvm.f32(2.0**112))
    exponent = llvm.i32(0x7C00)
    special = builder.icmp_unsigned("==", builder.and_(half, exponent), exponent)
    restored = builder.or_(magnitude, llvm.i32(0x7F800000))
    sign = builder.shl(builder.and_(half, llvm.i32(0x8000)), llvm.i32(16))
    number = builder.select(special, restored, builder.bitcast(scaled, llvm.I32))
    return builder.bitcast(builder.or_(number, sign), llvm.F32)


def emit_load_f16x16(builder: Any, address: Any) -> Any:
    """16 float16, as float32."""
    return emit_f16s_to_f32(builder, llvm.load(builder, address, I16X16))


# ---- loading


def _load(signature: str, kind: Any) -> Any:
    """load(address) of an LLVM type."""

    def emit(builder: Any, address: Any) -> Any:
        return llvm.load(builder, address, kind)

    return instruction(signature)(emit)


load_f32, load_f32x16, load_i8x64 = _load("f:i", llvm.F32), _load("v:i", F32X16), _load("b:i", I8X64)
load_f16x16 = instruction("v:i")(emit_load_f16x16)


@instruction("f:i")
def load_f16(builder: Any, address: Any) -> Any:
    """A float16, as float32."""
    bits = llvm.load(builder, address, ir.VectorType(llvm.I16, 1))
    return builder.extract_element(emit_f16s_to_f32(builder, bits), llvm.i32(0))


@instruction("v:i")
def load_bf16x16(builder: Any, address: Any) -> Any:
    """16 bfloat16, as float32."""
    wide = builder.zext(llvm.load(builder, address, I16X16), I32X16)
    return builder.bitcast(builder.shl(wide, llvm.i32x16(16)), F32X16)


@instruction("f:i")
def load_bf16(builder: Any, address: Any) -> Any:
    """A bfloat16, as float32."""
    wide = builder.zext(llvm.load(builder, address, llvm.I16), llvm.I32)
    return builder.bitcast(builder.shl(wide, llvm.i32(16)), llvm.F32)


@instruction("i:i")
def load_u32(builder: Any, address: Any) -> Any:
    """An unsigned 32-bit integer."""
    return builder.zext(llvm.load(builder, address, llvm.I32), llvm.I64)


@instruction("b:ii")
def load_2x32(builder: Any, a: Any, b: Any) -> Any:
    """| 32 bytes at a | 32 bytes at b |."""
    half = ir.VectorType(llvm.I8, 32)
    return llvm.shuffle(builder, llvm.load(builder, a, half), llvm.load(builder, b, half), range(64))


@instruction("b:ii")
def load_4x16(builder: Any, address: Any, stride: Any) -> Any:
    """Four times 16 bytes, ``stride`` bytes apart."""
    parts = []
    for _ in range(4):
        parts.append(llvm.load(builder, address, ir.VectorType(llvm.I8, 16)))
        address = builder.add(address, stride)
    pairs = [llvm.shuffle(builder, *parts[i : i + 2], range(32)) for i in (0, 2)]
    return llvm.shuffle(builder, *pairs, range(64))


@instruction("b:ii")
def load_2x16_twice(builder: Any, a: Any, b: Any) -> Any:
    """| 16 bytes at a | the same | 16 bytes at b | the same |: nibbles of two blocks of 32."""
    quarter = ir.VectorType(llvm.I8, 16)
    lanes = [*range(16), *range(16), *range(16, 32), *range(16, 32)]
    return llvm.shuffle(builder, llvm.load(builder, a, quarter), llvm.load(builder, b, quarter), lanes)


@instruction("-:i")
def prefetch(builder: Any, address: Any) -> None:
    """Ask for the cache line at an address."""
    pointer = builder.inttoptr(address, llvm.I8.as_pointer())
    llvm.call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, *(llvm.i32(n) for n in (0, 3, 1)))


# ---- storing


def _store(signature: str, convert: Any = lambda _builder, value: value) -> Any:
    """store(address, value), converted first."""

    def emit(builder: Any, address: Any, value: Any) -> None:
        llvm.store(builder, convert(builder, value), address)

    return instruction(signature)(emit)


store_f32, store_f32x16, store_i8x64 = _store("-:if"), _store("-:iv"), _store("-:ib")
store_i32, store_i16 = (_store("-:ii", lambda b, v, kind=kind: b.trunc(v, kind)) for kind in (llvm.I32, llvm.I16))
# Rounded to the nearest; only with HARDWARE_HALF.
store_f16 = _store("-:if", lambda builder, value: builder.fptrunc(value, ir.HalfType()))
store_f16x16 = _store("-:iv", lambda builder, values: builder.fptrunc(values, F16X16))
store_zeros = instruction("-:i")(lambda builder, address: llvm.store(builder, llvm.i8x64(0), address))  # 64 bytes


@instruction("-:i")
def split_halves(builder: Any, address: Any) -> None:
    """Four times 32 bytes, in place -> four first halves, then four second halves."""
    kind = ir.VectorType(llvm.I64, 8)
    parts = [builder.bitcast(llvm.load(builder, address, I8X64, at), kind) for at in (0, 64)]
    for half in range(2):
        lanes = [4 * i + 2 * half + j for i in range(4) for j in range(2)]
        llvm.store(builder, llvm.shuffle(builder, *parts, lanes), address, 64 * half)


# ---- bits


def _shift_and_mask(builder: Any, v: Any, lanes_second: Any, first: Any, second: Any, mask: Any) -> Any:
    """Shift dwords right, by ``second`` where lanes_second is 1, else by ``first``; keep ``mask`` of each byte."""
    which = ir.Constant(ir.VectorType(ir.IntType(1), 16), list(lanes_second))
    shifts = (llvm.broadcast(builder, builder.trunc(s, llvm.I32)) for s in (second, first))
    shifted = builder.lshr(builder.bitcast(v, I32X16), builder.select(which, *shifts))
    return builder.and_(builder.bitcast(shifted, I8X64), llvm.broadcast(builder, builder.trunc(mask, llvm.I8), 64))


@instruction("b:biii")
def bits_2x32(builder: Any, v: Any, first: Any, second: Any, mask: Any) -> Any:
    """| (v >> first) & mask in 32 bytes | (v >> second) & mask in 32 bytes |."""
    return _shift_and_mask(builder, v, [0] * 8 + [1] * 8, first, second, mask)


@instruction("b:biii")
def bits_4x16(builder: Any, v: Any, first: Any, second: Any, mask: Any) -> Any:
    """| >> first | >> second | >> first | >> second |, 16 bytes each, & mask."""
    return _shift_and_mask(builder, v, ([0] * 4 + [1] * 4) * 2, first, second, mask)


@instruction("b:bbi")
def or_shifted(builder: Any, low: Any, high: Any, shift: Any) -> Any:
    """low | high << shift, byte by byte; no bit may leave its byte."""
    shifts = llvm.broadcast(builder, builder.trunc(shift, llvm.I32))
    return builder.or_(low, builder.bitcast(builder.shl(builder.bitcast(high, I32X16), shifts), I8X64))


@instruction("b:bi")
def and_mask(builder: Any, v: Any, mask: Any) -> Any:
    """Each byte & mask."""
    return builder.and_(v, llvm.broadcast(builder, builder.trunc(mask, llvm.I8), 64))


@instruction("b:ii")
def fifth_bits(builder: Any, a: Any, b: Any) -> Any:
    """64 bytes, 16 where a bit is set: those of the 32-bit word at address a, then those of the one at b."""
    words = (llvm.broadcast(builder, llvm.load(builder, at, llvm.I32), 1) for at in (a, b))
    flags = builder.bitcast(llvm.shuffle(builder, *words, range(2)), ir.VectorType(ir.IntType(1), 64))
    return builder.select(flags, llvm.i8x64(16), llvm.i8x64(0))


add_128 = instruction("b:b")(lambda builder, v: builder.xor(v, llvm.i8x64(-128)))  # signed bytes -> unsigned


# ---- arithmetic


zeros = instruction("v:")(lambda _builder: llvm.f32x16(0.0))
zeros_i32 = instruction("n:")(lambda _builder: llvm.i32x16(0))
broadcast = instruction("v:f")(llvm.broadcast)
dot4 = instruction("n:nbb")(llvm.emit_dot4)
to_f32 = instruction("v:n")(lambda builder, v: builder.sitofp(v, F32X16))  # of int32
fma = instruction("v:vvv")(llvm.emit_fma)  # a * b + c with one rounding, of vectors and of numbers
fma_f32 = instruction("f:fff")(lambda builder, *abc: llvm.call(builder, "llvm.fma.f32", llvm.F32, *abc))
f32_of_bits = instruction("f:i")(lambda builder, bits: builder.bitcast(builder.trunc(bits, llvm.I32), llvm.F32))


@instruction("f:f")
def exp2(builder: Any, n: Any) -> Any:
    """2^n for a whole number n of -126 to 127: n + 127 is the exponent field."""
    field = builder.add(builder.fptosi(n, llvm.I32), llvm.i32(127))
    return builder.bitcast(builder.shl(field, llvm.i32(23)), llvm.F32)
