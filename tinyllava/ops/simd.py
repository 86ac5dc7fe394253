"""The few instructions that kernels need and Numba does not offer, as intrinsics over LLVM.

Numba has no float16 on the CPU, so kernels read its bits as uint16 and call :func:`half_to_float`.
"""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import config
from numba.extending import intrinsic

I32 = ir.IntType(32)


def cpu_features() -> set[str]:
    """The features that code is generated for: the host's, or those that NUMBA_CPU_FEATURES allows."""
    allowed: str | None = getattr(config, "CPU_FEATURES", None)  # "+avx2,-avx512f,..."
    if allowed is not None:
        return {name[1:] for name in allowed.split(",") if name.startswith("+")}
    return {name for name, there in binding.get_host_cpu_features().items() if there}


# x86 converts in hardware with F16C, 64-bit ARM always; elsewhere LLVM calls a C function that a JIT lacks.
HARDWARE_HALF = "f16c" in cpu_features() or platform.machine() in ("aarch64", "arm64")


@intrinsic
def half_to_float(_typing: Any, bits: Any) -> Any:
    """The float32 whose IEEE half-precision bits are ``bits`` (uint16); exact for every value."""
    if not isinstance(bits, types.Integer):
        return None

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        half = builder.trunc(args[0], ir.IntType(16))
        if HARDWARE_HALF:
            return builder.fpext(builder.bitcast(half, ir.HalfType()), ir.FloatType())
        return _half_by_integers(builder, builder.zext(half, I32))

    return types.float32(bits), codegen


def _half_by_integers(builder: Any, half: Any) -> Any:
    """Move sign and magnitude to their places in a float32, and scale by 2^112, the difference of the biases.

    The multiplication also normalises subnormals. An exponent of all ones (infinity, NaN) is restored after.
    """
    magnitude = builder.shl(builder.and_(half, ir.Constant(I32, 0x7FFF)), ir.Constant(I32, 13))
    scale = ir.Constant(ir.FloatType(), 2.0**112)
    scaled = builder.bitcast(builder.fmul(builder.bitcast(magnitude, ir.FloatType()), scale), I32)
    exponent = ir.Constant(I32, 0x7C00)
    special = builder.icmp_unsigned("==", builder.and_(half, exponent), exponent)
    restored = builder.or_(magnitude, ir.Constant(I32, 0x7F800000))
    sign = builder.shl(builder.and_(half, ir.Constant(I32, 0x8000)), ir.Constant(I32, 16))
    return builder.bitcast(builder.or_(builder.select(special, restored, scaled), sign), ir.FloatType())
