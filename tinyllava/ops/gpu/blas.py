"""Matrix products by cuBLAS: half precision or float32 in, float32 sums and results.

Called directly, not through CuPy, which refuses to while a stream records (cupy_graph.py). What is recorded must
not ask for memory either, so cuBLAS gets its workspace here.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import cupy
import numpy as np
from cupy_backends.cuda.libs import cublas

WORKSPACE = 32 << 20  # bytes: what NVIDIA recommends for its largest devices
TYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 2}  # cudaDataType_t
NO, YES = 0, 1  # cublasOperation_t: as it is, or transposed
FLOAT32 = 68  # CUBLAS_COMPUTE_32F
ANY = -1  # CUBLAS_GEMM_DEFAULT
INT, POINTER = ctypes.c_int, ctypes.c_void_p


class Blas:
    """cuBLAS for one device."""

    def __init__(self) -> None:
        self._handle = cublas.create()  # by CuPy, which has found and loaded the library
        self._library = ctypes.CDLL(_name())
        self._gemm = self._library.cublasGemmEx
        self._gemm.argtypes = [
            POINTER, INT, INT, INT, INT, INT,
            POINTER, POINTER, INT, INT, POINTER, INT, INT,
            POINTER, POINTER, INT, INT, INT, INT,
        ]  # fmt: skip
        self._workspace = cupy.empty(WORKSPACE, cupy.uint8)
        self._stream: int | None = None
        self._one, self._zero = ctypes.c_float(1), ctypes.c_float(0)

    def multiply(self, x: Any, weight: Any, y: Any, start: int, stop: int) -> None:
        """y[:, start:stop] = x (n, d_in) @ weight^T, for weight (stop - start, d_in) of x's type and float32 y.

        cuBLAS counts along columns first: to it, each of these is its own transpose.
        """
        self._follow_stream()
        (n, d_in), kind = x.shape, TYPES[x.dtype]
        status = self._gemm(
            self._handle, YES, NO, stop - start, n, d_in,
            ctypes.addressof(self._one), weight.data.ptr, kind, d_in, x.data.ptr, kind, d_in,
            ctypes.addressof(self._zero), y.data.ptr + 4 * start, TYPES[y.dtype], y.shape[1], FLOAT32, ANY,
        )  # fmt: skip
        _check(status, "cublasGemmEx")

    def _follow_stream(self) -> None:
        """Work on CuPy's current stream."""
        stream = cupy.cuda.get_current_stream().ptr
        if stream == self._stream:
            return
        _check(self._library.cublasSetStream_v2(POINTER(self._handle), POINTER(stream)), "cublasSetStream")
        # A change of stream gives cuBLAS its own workspace back.
        room = POINTER(self._workspace.data.ptr), ctypes.c_size_t(WORKSPACE)
        _check(self._library.cublasSetWorkspace_v2(POINTER(self._handle), *room), "cublasSetWorkspace")
        self._stream = stream


def _name() -> str:
    """The file name of the library that CuPy uses."""
    version = cupy.cuda.runtime.runtimeGetVersion() // 1000
    return f"cublas64_{version}.dll" if sys.platform == "win32" else f"libcublas.so.{version}"


def _check(status: int, name: str) -> None:
    if status:
        raise RuntimeError(f"{name}: status {status}")
