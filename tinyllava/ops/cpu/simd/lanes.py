"""Scales as vectors: for each of dot4's 16 sums, the number that its weights are multiplied by.

One dot4 over 64 bytes covers two blocks of 32, or four groups of 16: lanes of one group stand side by side.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from tinyllava.ops.cpu.simd.intrinsics import half_by_integers
from tinyllava.ops.cpu.simd.llvm import (
    F32,
    FLOATS,
    HARDWARE_HALF,
    I8,
    I16,
    I32,
    I64,
    INTS,
    instruction,
    load,
    pick,
    splat,
)


@instruction("v:ii")
def halves_apart(builder: Any, address: Any, step: Any) -> Any:
    """| 8 half-precision numbers, ``step`` bytes apart | the same |: the scales of 8 blocks."""
    words = ir.Constant(ir.VectorType(I64, 2), ir.Undefined)
    for w in range(2):  # put together as whole numbers, since vector instructions are what is scarce
        word = ir.Constant(I64, 0)
        for i in range(4):
            here = builder.add(address, builder.mul(step, ir.Constant(I64, 4 * w + i)))
            half = builder.zext(load(builder, here, I16), I64)
            word = builder.or_(word, builder.shl(half, ir.Constant(I64, 16 * i)))
        words = builder.insert_element(words, word, ir.Constant(I32, w))
    v = builder.bitcast(words, ir.VectorType(I16, 8))
    v = pick(builder, v, v, [*range(8), *range(8)])
    if HARDWARE_HALF:
        return builder.fpext(builder.bitcast(v, ir.VectorType(ir.HalfType(), 16)), FLOATS)
    floats = ir.Constant(FLOATS, ir.Undefined)
    for i in range(16):
        half = builder.zext(builder.extract_element(v, ir.Constant(I32, i)), I32)
        floats = builder.insert_element(floats, half_by_integers(builder, half), ir.Constant(I32, i))
    return floats


@instruction("v:vv")
def lower_and_upper(builder: Any, a: Any, b: Any) -> Any:
    """| lower half of a | upper half of b |."""
    return pick(builder, a, b, [*range(8), *range(24, 32)])


@instruction("v:ff")
def by_half(builder: Any, first: Any, second: Any) -> Any:
    """| first x 8 | second x 8 |."""
    return pick(builder, splat(builder, first, 8), splat(builder, second, 8), range(16))


@instruction("v:i")
def two_halves_at(builder: Any, address: Any) -> Any:
    """| first half-precision number x 8 | second, with its sign turned, x 8 |, of two side by side."""
    both = builder.xor(load(builder, address, I32), ir.Constant(I32, -(1 << 31)))
    if HARDWARE_HALF:
        v = builder.fpext(builder.bitcast(both, ir.VectorType(ir.HalfType(), 2)), ir.VectorType(F32, 2))
        return pick(builder, v, v, [0] * 8 + [1] * 8)
    bits = builder.and_(both, ir.Constant(I32, 0xFFFF)), builder.lshr(both, ir.Constant(I32, 16))
    return pick(builder, *(splat(builder, half_by_integers(builder, b), 8) for b in bits), range(16))


@instruction("v:ffff")
def by_quarter(builder: Any, *values: Any) -> Any:
    """| first x 4 | second x 4 | third x 4 | fourth x 4 |."""
    halves = [pick(builder, *(splat(builder, v, 4) for v in values[i : i + 2]), range(8)) for i in (0, 2)]
    return pick(builder, *halves, range(16))


@instruction("v:iiii")
def floats_of_bytes(builder: Any, *words: Any) -> Any:
    """The 16 unsigned bytes of four 32-bit words, as floats."""
    v = ir.Constant(ir.VectorType(I64, 2), ir.Undefined)
    for i in range(2):
        both = builder.or_(words[2 * i], builder.shl(words[2 * i + 1], ir.Constant(I64, 32)))
        v = builder.insert_element(v, both, ir.Constant(I32, i))
    return builder.uitofp(builder.zext(builder.bitcast(v, ir.VectorType(I8, 16)), INTS), FLOATS)


@instruction("v:i")
def floats_of_signed_bytes_at(builder: Any, address: Any) -> Any:
    """16 signed bytes, as floats."""
    return builder.sitofp(builder.sext(load(builder, address, ir.VectorType(I8, 16)), INTS), FLOATS)


def _spread(lanes_each: int, first: int, step: int = 1) -> Any:
    """An instruction that repeats lanes first, first + step, ... of a vector, each lanes_each times."""
    lanes = [first + i // lanes_each * step for i in range(16)]

    def emit(builder: Any, v: Any) -> Any:
        return pick(builder, v, v, lanes)

    return instruction("v:v")(emit)


# Of 8 scales for 32 weights each, the two that dot4 over 64 weights needs; of 16 for 16 weights each, the four.
scales_01, scales_23, scales_45, scales_67 = (_spread(8, i) for i in (0, 2, 4, 6))
scales_02, scales_13, scales_46, scales_57 = (_spread(8, i, 2) for i in (0, 1, 4, 5))
scales_0123, scales_4567, scales_89ab, scales_cdef = (_spread(4, i) for i in (0, 4, 8, 12))
