"""Matrix products (GEMM) by cuBLAS: float16 or float32 in, float32 sums and results.

Called directly, as CuPy refuses to call cuBLAS while a stream is captured (capture.py). Memory cannot be allocated
during capture either, so cuBLAS gets its workspace beforehand.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import cupy
import numpy as np
from cupy_backends.cuda.libs import cublas

WORKSPACE_BYTES = 32 << 20  # what NVIDIA recommends for its largest devices
TYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 2}  # cudaDataType_t
NO_TRANSPOSE, TRANSPOSE = 0, 1  # cublasOperation_t
COMPUTE_FLOAT32 = 68  # CUBLAS_COMPUTE_32F
DEFAULT_ALGORITHM = -1  # CUBLAS_GEMM_DEFAULT
INT, POINTER = ctypes.c_int, ctypes.c_void_p


class Blas:
    """cuBLAS for one device."""

    def __init__(self) -> None:
        self._handle = cublas.create()  # CuPy: it has found and loaded the library
        self._library = ctypes.CDLL(_name())
        self._gemm = self._library.cublasGemmEx
        self._gemm.argtypes = [
            POINTER, INT, INT, INT, INT, INT,
            POINTER, POINTER, INT, INT, POINTER, INT, INT,
            POINTER, POINTER, INT, INT, INT, INT,
        ]  # fmt: skip
        self._workspace = cupy.empty(WORKSPACE_BYTES, cupy.uint8)
        self._stream: int | None = None
        self._one, self._zero = ctypes.c_float(1), ctypes.c_float(0)

    def multiply(self, x: Any, weight: Any, y: Any, start: int, stop: int) -> None:
        """y[:, start:stop] = x (n, d_in) @ weight^T, for weight (stop - start, d_in) of x's type and float32 y.

        cuBLAS takes arrays as column-major, that is each of these as its transpose.
        """
        self._follow_stream()
        (n, d_in), kind = x.shape, TYPES[x.dtype]
        status = self._gemm(
            self._handle, TRANSPOSE, NO_TRANSPOSE, stop - start, n, d_in,
            ctypes.addressof(self._one), weight.data.ptr, kind, d_in, x.data.ptr, kind, d_in,
            ctypes.addressof(self._zero), y.data.ptr + 4 * start, TYPES[y.dtype], y.shape[1],
            COMPUTE_FLOAT32, DEFAULT_ALGORITHM,
        )  # fmt: skip
        _check(status, "cublasGemmEx")

    def _follow_stream(self) -> None:
        """Work on CuPy's current stream."""
        stream = cupy.cuda.get_current_stream().ptr
        if stream == self._stream:
            return
        _check(self._library.cublasSetStream_v2(POINTER(self._handle), POINTER(stream)), "cublasSetStream")
        # A change of stream resets the workspace to cuBLAS's own.
        workspace = POINTER(self._workspace.data.ptr), ctypes.c_size_t(WORKSPACE_BYTES)
        _check(self._library.cublasSetWorkspace_v2(POINTER(self._handle), *workspace), "cublasSetWorkspace")
        self._stream = stream


def _name() -> str:
    """The file name of the library that CuPy uses."""
    version = cupy.cuda.runtime.runtimeGetVersion() // 1000
    return f"cublas64_{version}.dll" if sys.platform == "win32" else f"libcublas.so.{version}"


def _check(status: int, name: str) -> None:
    if status:
        raise RuntimeError(f"{name}: status {status}")
