"""What Numba lacks for vector code: vectors as types, and a way to write an instruction as LLVM code.

Kernels hold vectors of 512 bits in local variables; LLVM splits them where the machine's are shorter.

    bytes64   64 x i8     one register of quantized numbers       load_i8x64, load_2x32, bits_2x32, ...
    ints16    16 x i32    sums of products                        dot4
    floats16  16 x f32    sums of sums, times the blocks' scales  a + b, a * b, fma; reduce.py adds up their lanes

The picture to have in mind, of the one instruction that does the work (AVX-512 VNNI's ``vpdpbusd``):

    weights      u8 | a0 a1 a2 a3 | b0 b1 b2 b3 | ... 16 lanes of four bytes
    activations  s8 | x0 x1 x2 x3 | y0 y1 y2 y3 | ...
    dot4        i32 | += a0*x0 + a1*x1 + a2*x2 + a3*x3 | += b0*y0 + ... | ... 16 sums

(Intel's Architecture Instruction Set Extensions Programming Reference, chapter 2.) Without that instruction the
same sums are made from 16-bit products, so results are equal on every machine.
"""

from __future__ import annotations

import operator
import platform
from collections.abc import Callable
from functools import partial
from inspect import Parameter, Signature
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import config
from numba.core.datamodel import models
from numba.core.typing import signature
from numba.core.typing.templates import ConcreteTemplate, infer_global
from numba.extending import intrinsic, lower_builtin, register_model

I8, I16, I32, I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
F32 = ir.FloatType()
I8X64, I16X32, I32X16, F32X16 = (ir.VectorType(t, n) for t, n in ((I8, 64), (I16, 32), (I32, 16), (F32, 16)))


def cpu_features() -> set[str]:
    """The features that code is generated for: the host's, or those that NUMBA_CPU_FEATURES allows."""
    allowed: str | None = getattr(config, "CPU_FEATURES", None)  # "+avx2,-avx512f,..."
    if allowed is not None:
        return {name[1:] for name in allowed.split(",") if name.startswith("+")}
    return {name for name, there in binding.get_host_cpu_features().items() if there}


FEATURES = cpu_features()
# x86 converts in hardware with F16C, 64-bit ARM always; elsewhere LLVM calls a C function that a JIT lacks.
HARDWARE_HALF = "f16c" in FEATURES or platform.machine() in ("aarch64", "arm64")
VNNI = {"avx512f", "avx512vnni"} <= FEATURES


# ---- vectors as Numba types


class Vector(types.Type):
    """A value that lives in vector registers; ``llvm`` is its type there."""

    def __init__(self, name: str, llvm: Any) -> None:
        super().__init__(name)
        self.llvm = llvm


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    """Tells Numba how to hold a Vector."""

    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, kind.llvm)


bytes64, ints16, floats16 = Vector("bytes64", I8X64), Vector("ints16", I32X16), Vector("floats16", F32X16)
Emitter = Callable[..., Any]
KINDS = {"i": types.int64, "f": types.float32, "b": bytes64, "n": ints16, "v": floats16, "-": types.void}


def instruction(signature: str) -> Callable[[Emitter], Any]:
    """Make emit(builder, *values) callable from kernels. "n:nbb": ints of ints, bytes, bytes (KINDS)."""
    result, wanted = signature.split(":")

    def wrap(emit: Emitter) -> Any:
        def typed(_context: Any, *_arguments: Any) -> Any:
            def codegen(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
                value = emit(builder, *values)
                return context.get_dummy_value() if value is None else value

            return KINDS[result](*(KINDS[letter] for letter in wanted)), codegen

        typed.__name__, typed.__doc__ = emit.__name__, emit.__doc__
        names = ["context", *(f"v{i}" for i in range(len(wanted)))]  # Numba folds *arguments into a tuple
        typed.__signature__ = Signature([Parameter(n, Parameter.POSITIONAL_ONLY) for n in names])
        return intrinsic(typed)

    return wrap


def _operator(operation: Any, kind: Vector, method: str) -> None:
    """Let kernels write an operation of two vectors as Python does."""

    def lower(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return getattr(builder, method)(*values)

    infer_global(operation)(type(method, (ConcreteTemplate,), {"cases": [signature(kind, kind, kind)]}))
    lower_builtin(operation, kind, kind)(lower)


_operator(operator.add, floats16, "fadd")
_operator(operator.mul, floats16, "fmul")
_operator(operator.or_, bytes64, "or_")


# ---- what emitters share: constants, memory, lanes, products


def constant(kind: Any, values: Any) -> Any:
    """A vector constant: one number for all lanes, or a list."""
    return ir.Constant(kind, list(values) if isinstance(values, (list, range)) else [values] * kind.count)


i64, i32, f32 = (partial(ir.Constant, kind) for kind in (I64, I32, F32))
i8x64, i16x32, i32x16, f32x16 = (partial(constant, kind) for kind in (I8X64, I16X32, I32X16, F32X16))


def call(builder: Any, name: str, result: Any, *values: Any) -> Any:
    """Call an LLVM intrinsic by its full name, declaring it at first use."""
    function = builder.module.globals.get(name)
    if function is None:
        function = ir.Function(builder.module, ir.FunctionType(result, [v.type for v in values]), name)
    return builder.call(function, values)


def load(builder: Any, address: Any, kind: Any, offset: int = 0) -> Any:
    """A value of any type from a byte address that need not be aligned."""
    value = builder.load(builder.inttoptr(offset_by(builder, address, offset), kind.as_pointer()))
    value.align = 1
    return value


def store(builder: Any, value: Any, address: Any, offset: int = 0) -> None:
    """The inverse of load."""
    builder.store(value, builder.inttoptr(offset_by(builder, address, offset), value.type.as_pointer())).align = 1


def offset_by(builder: Any, address: Any, offset: int) -> Any:
    """address + offset."""
    return builder.add(address, i64(offset)) if offset else address


def shuffle(builder: Any, a: Any, b: Any, lanes: Any) -> Any:
    """The lanes of a (0, 1, ...) and b (after a's) in a new order."""
    lanes = list(lanes)
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def broadcast(builder: Any, value: Any, lanes: int = 16) -> Any:
    """One number in all lanes."""
    empty = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    return shuffle(builder, builder.insert_element(empty, value, i32(0)), empty, [0] * lanes)


def emit_dot2(builder: Any, sums: Any, a: Any, b: Any) -> Any:
    """sums (16 x i32) + a0 * b0 + a1 * b1 in each lane, for a and b of 32 x i16 (``vpdpwssd``)."""
    if VNNI:
        return call(builder, "llvm.x86.avx512.vpdpwssd.512", I32X16, sums, a, b)
    if "avx2" in FEATURES:
        halves = []
        for lanes in (range(16), range(16, 32)):
            parts = [shuffle(builder, v, v, lanes) for v in (a, b)]
            halves.append(call(builder, "llvm.x86.avx2.pmadd.wd", ir.VectorType(I32, 8), *parts))
        return builder.add(sums, shuffle(builder, *halves, range(16)))
    a, b, half = builder.bitcast(a, I32X16), builder.bitcast(b, I32X16), i32x16(16)
    high = builder.mul(builder.ashr(a, half), builder.ashr(b, half))
    low = [builder.ashr(builder.shl(v, half), half) for v in (a, b)]
    return builder.add(sums, builder.add(high, builder.mul(*low)))


def emit_dot4(builder: Any, sums: Any, a: Any, b: Any) -> Any:
    """sums (16 x i32) + four products in each lane, for a of 64 x u8 and b of 64 x s8 (``vpdpbusd``)."""
    if VNNI:
        return call(builder, "llvm.x86.avx512.vpdpbusd.512", I32X16, sums, a, b)
    a, b, byte = builder.bitcast(a, I16X32), builder.bitcast(b, I16X32), i16x32(8)
    even = builder.and_(a, i16x32(255)), builder.ashr(builder.shl(b, byte), byte)
    odd = builder.lshr(a, byte), builder.ashr(b, byte)
    return emit_dot2(builder, emit_dot2(builder, sums, *even), *odd)


def emit_fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c with one rounding."""
    return call(builder, "llvm.fma.v16f32", F32X16, a, b, c)
