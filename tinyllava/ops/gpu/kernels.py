"""The CUDA kernels in cuda/*.cu: compiled when first needed, and launched by name.

CuPy caches what it has compiled (in ~/.cupy), so that only the first run on a machine waits.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

import cupy
import numpy as np

from tinyllava.ops import compiling
from tinyllava.ops.gpu.constants import source

SERIALIZE = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
STATIC_SHARED = 48 << 10  # bytes of shared memory that a block gets without asking


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: its number, and a value of up to 64 bytes."""

    _fields_ = (("id", ctypes.c_int), ("_", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("n_attributes", ctypes.c_uint),
    )


class Kernels:
    """The compiled kernels of one device, launched by the driver's own function, as CuPy's takes no attributes.

    With ``overlap``, a kernel may start before the one before it has ended (programmatic dependent launch, from
    Hopper on): each calls await_previous_kernel (cuda/common.cu) before it needs the other's results.
    """

    def __init__(self, code: str | None = None) -> None:
        module = cupy.RawModule(code=code or source(), options=("--std=c++17",), backend="nvrtc")
        self._function = cache(module.get_function)
        device = cupy.cuda.Device()
        self.n_multiprocessors: int = device.attributes["MultiProcessorCount"]
        self._max_shared: int = device.attributes["MaxSharedMemoryPerBlockOptin"]
        self._can_overlap = int(device.compute_capability) >= 90
        self.overlap = False
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        self._launch = driver.cuLaunchKernelEx
        self._attribute = _Attribute(SERIALIZE, 0, (ctypes.c_int * 16)(1))

    def launch(
        self, name: str, grid: int | tuple[int, ...], threads: int, *arguments: Any, shared: int = 0
    ) -> None:
        """Start a kernel on a grid of blocks of ``threads``, each with ``shared`` bytes of dynamic shared memory.

        An int is passed as a C int, a float as a float, np.uint64 as a size_t, an array as a pointer to its first
        element and None as a null pointer.
        """
        function = self._function(name)
        if shared > STATIC_SHARED and function.max_dynamic_shared_size_bytes < shared:
            function.max_dynamic_shared_size_bytes = self._max_shared - function.shared_size_bytes
        blocks = (*grid, 1, 1)[:3] if isinstance(grid, tuple) else (grid, 1, 1)
        overlap = self.overlap and self._can_overlap
        config = _Config(
            blocks, (threads, 1, 1), shared, cupy.cuda.get_current_stream().ptr,
            ctypes.addressof(self._attribute), int(overlap),
        )  # fmt: skip
        values = [_as_c(value) for value in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        status = self._launch(ctypes.byref(config), ctypes.c_void_p(function.kernel.ptr), pointers, None)
        if status:
            raise RuntimeError(f"cuLaunchKernelEx of {name}: status {status}")


def _as_c(value: Any) -> Any:
    if isinstance(value, int):  # bool, too
        return ctypes.c_int(value)
    if type(value) is float:
        return ctypes.c_float(value)
    if type(value) is np.uint64:
        return ctypes.c_size_t(int(value))
    return ctypes.c_void_p(None if value is None else value.data.ptr)


@cache
def kernels() -> Kernels:
    """The kernels, compiled now if they have not been."""
    compiling.announce()
    return Kernels()
