"""Scales as vectors: for each of dot4's 16 sums, the number that its weights are multiplied by.

One dot4 over 64 bytes covers two blocks of 32, or four groups of 16: lanes of one group stand side by side.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from tinyllava.ops.cpu.simd import intrinsics as simd
from tinyllava.ops.cpu.simd import llvm
from tinyllava.ops.cpu.simd.llvm import F32X16, instruction


@instruction("v:ii")
def load_8_f16(builder: Any, address: Any, step: Any) -> Any:
    """| 8 half-precision numbers, ``step`` bytes apart | the same |: the scales of 8 blocks."""
    words = ir.Constant(ir.VectorType(llvm.I64, 2), ir.Undefined)
    for w in range(2):  # put together as whole numbers, since vector instructions are what is scarce
        word = llvm.i64(0)
        for i in range(4):
            here = builder.add(address, builder.mul(step, llvm.i64(4 * w + i)))
            half = builder.zext(llvm.load(builder, here, llvm.I16), llvm.I64)
            word = builder.or_(word, builder.shl(half, llvm.i64(16 * i)))
        words = builder.insert_element(words, word, llvm.i32(w))
    v = builder.bitcast(words, ir.VectorType(llvm.I16, 8))
    return simd.emit_f16s_to_f32(builder, llvm.shuffle(builder, v, v, [*range(8), *range(8)]))


@instruction("v:vv")
def lower_upper(builder: Any, a: Any, b: Any) -> Any:
    """| lower half of a | upper half of b |."""
    return llvm.shuffle(builder, a, b, [*range(8), *range(24, 32)])


@instruction("v:ff")
def two_values(builder: Any, first: Any, second: Any) -> Any:
    """| first x 8 | second x 8 |."""
    return llvm.shuffle(builder, llvm.broadcast(builder, first, 8), llvm.broadcast(builder, second, 8), range(16))


@instruction("v:i")
def load_d_minus_dmin(builder: Any, address: Any) -> Any:
    """| first half-precision number x 8 | second, negated, x 8 |, of two side by side."""
    both = builder.xor(llvm.load(builder, address, llvm.I32), llvm.i32(-(1 << 31)))
    v = simd.emit_f16s_to_f32(builder, builder.bitcast(both, ir.VectorType(llvm.I16, 2)))
    return llvm.shuffle(builder, v, v, [0] * 8 + [1] * 8)


@instruction("v:iiii")
def bytes_to_f32(builder: Any, *words: Any) -> Any:
    """The 16 unsigned bytes of four 32-bit words, as floats."""
    v = ir.Constant(ir.VectorType(llvm.I64, 2), ir.Undefined)
    for i in range(2):
        both = builder.or_(words[2 * i], builder.shl(words[2 * i + 1], llvm.i64(32)))
        v = builder.insert_element(v, both, llvm.i32(i))
    return builder.uitofp(builder.zext(builder.bitcast(v, ir.VectorType(llvm.I8, 16)), llvm.I32X16), F32X16)


@instruction("v:i")
def load_16_i8(builder: Any, address: Any) -> Any:
    """16 signed bytes, as floats."""
    v = llvm.load(builder, address, ir.VectorType(llvm.I8, 16))
    return builder.sitofp(builder.sext(v, llvm.I32X16), F32X16)


def _spread(lanes_each: int, first: int, step: int = 1) -> Any:
    """An instruction that repeats lanes first, first + step, ... of a vector, each lanes_each times."""
    lanes = [first + i // lanes_each * step for i in range(16)]

    def emit(builder: Any, v: Any) -> Any:
        return llvm.shuffle(builder, v, v, lanes)

    return instruction("v:v")(emit)


# Of 8 scales for 32 weights each, the two that dot4 over 64 weights needs; of 16 for 16 weights each, the four.
scales_01, scales_23, scales_45, scales_67 = (_spread(8, i) for i in (0, 2, 4, 6))
scales_02, scales_13, scales_46, scales_57 = (_spread(8, i, 2) for i in (0, 1, 4, 5))
scales_0123, scales_4567, scales_89ab, scales_cdef = (_spread(4, i) for i in (0, 4, 8, 12))
