"""Kernels as plain Python: the same code objects, with what they call un-jitted, too.

Numba's intrinsics have no Python form. Those that read or compute single numbers are replaced by functions of this
file. Kernels that hold vectors in registers (simd/) cannot run so.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from numba.core.dispatcher import Dispatcher

from tinyllava.ops.cpu.compile import Task


def _arguments_at(address: int, count: int) -> tuple[int, ...]:
    return tuple((ctypes.c_int64 * count).from_address(address))


def _fma(a: Any, b: Any, c: Any) -> np.float32:
    return np.float32(np.float64(a) * np.float64(b) + np.float64(c))


STAND_INS: dict[str, Callable[..., Any]] = {
    "_pointer": ctypes.c_void_p,
    "arguments_at": _arguments_at,
    "int64_at": lambda address: ctypes.c_int64.from_address(address).value,
    "load_f32": lambda address: np.float32(ctypes.c_float.from_address(address).value),
    "f32_of_bits": lambda bits: np.float32(struct.unpack("f", struct.pack("i", bits))[0]),
    "fma_f32": _fma,
    "exp2": lambda n: np.float32(2.0) ** n,
}


def unjitted(function: Any, **stand_ins: Callable[..., Any]) -> Callable[..., Any]:
    """A task's or kernel's Python function, calling Python functions only: the kernels' own, or ``stand_ins``."""
    known: dict[int, Callable[..., Any]] = {}

    def plain(function: Any) -> Callable[..., Any]:
        source = function.python if isinstance(function, Task) else getattr(function, "py_func", function)
        if id(source) not in known:
            names = dict(source.__globals__)
            known[id(source)] = FunctionType(source.__code__, names, source.__name__)
            for name in source.__code__.co_names:
                if name in stand_ins or name in STAND_INS:
                    names[name] = stand_ins.get(name) or STAND_INS[name]
                elif isinstance(names.get(name), ModuleType) and "simd" in names[name].__name__:
                    names[name] = SimpleNamespace(**STAND_INS)  # ``simd.load_f32(...)``
                elif isinstance(names.get(name), Dispatcher | Task):
                    names[name] = plain(names[name])
        return known[id(source)]

    return plain(function)
