"""The same operations, faster on the CPU: matrices are multiplied straight from their memory-mapped blocks.

What is not overridden here is the reference's own code. Threads are plain Python threads over kernels that
release the GIL, so that ``threads`` means what it says and several models can run in one process.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tinyllava.ops import Activation, Array
from tinyllava.ops import numba_kernels as kernels
from tinyllava.ops.reference import DenseMatrix, NumpyOps

if TYPE_CHECKING:
    from tinyllava.files.gguf import Tensor
    from tinyllava.ops import Matrix

DOT_TOKENS = 8  # up to this many tokens dot_rows wins; beyond, unpacking once and calling sgemm does
PIECE_ELEMENTS = 1 << 22  # the largest piece of a matrix unpacked at once for sgemm (16 MiB)


class BlockMatrix:
    """A weight matrix (d_out, d_in) left in its file: ``raw`` (d_out, row bytes) is a view of the mapping."""

    def __init__(self, tensor: Tensor, kind: int) -> None:
        self.tensor = tensor
        self.kind = kind
        self.raw: npt.NDArray[np.uint8] = np.asarray(tensor.raw)  # plain: Numba knows no np.memmap

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)


class NumbaOps(NumpyOps):
    """The Numba backend: float32 only."""

    name = "numba"

    def __init__(self, threads: int | None = None) -> None:
        super().__init__("float32", threads)
        self._pool = ThreadPoolExecutor(self.threads - 1) if self.threads > 1 else None
        self._piece = np.empty(0, np.float32)

    def matrix(self, tensor: Tensor) -> Matrix:
        """Hold a 2-D tensor (d_out, d_in) in its blocks, F32 as a view; what has no kernel as the reference."""
        if tensor.type == "F32":
            floats = np.asarray(tensor.raw).view("<f4").reshape(tensor.shape)
            return DenseMatrix(tensor, floats)
        if tensor.type in kernels.FORMATS:
            return BlockMatrix(tensor, kernels.FORMATS.index(tensor.type))
        return super().matrix(tensor)

    def embed(self, table: Matrix, ids: npt.ArrayLike) -> Array:
        if isinstance(table, BlockMatrix):
            return table.tensor.rows(np.asarray(ids, dtype=np.int64))
        return super().embed(table, ids)

    def linear(self, x: Array, weight: Matrix, bias: Array | None = None) -> Array:
        if not isinstance(weight, BlockMatrix):
            return super().linear(x, weight, bias)
        rows = np.ascontiguousarray(x.reshape(-1, x.shape[-1]), dtype=np.float32)  # (n, d_in)
        if len(rows) <= DOT_TOKENS:
            y = np.empty((len(rows), weight.shape[0]), np.float32)
            self._share(weight.shape[0], kernels.dot_rows, weight.kind, weight.raw, rows, y)
        else:
            y = self._unpack_and_multiply(rows, weight)
        if bias is not None:
            y += bias
        return y.reshape(*x.shape[:-1], weight.shape[0])

    def activation(self, x: Array, kind: Activation) -> Array:
        if kind != "gelu_erf":
            return super().activation(x, kind)
        flat = np.ascontiguousarray(x).reshape(-1)
        y = np.empty_like(flat)
        self._share(flat.size, kernels.gelu_erf, flat, y)
        return y.reshape(x.shape)

    def _unpack_and_multiply(self, x: Array, weight: BlockMatrix) -> Array:
        """x (n, d_in) @ W^T, a piece of W's rows at a time: unpacked by all threads, multiplied by BLAS."""
        d_out, d_in = weight.shape
        y = np.empty((len(x), d_out), np.float32)
        step = max(1, PIECE_ELEMENTS // d_in)
        for start in range(0, d_out, step):
            count = min(step, d_out - start)
            piece = self._scratch(count, d_in)
            self._share(count, kernels.unpack_rows, weight.kind, weight.raw, piece, start)
            y[:, start : start + count] = x @ piece.T
        return y

    def _scratch(self, rows: int, columns: int) -> Array:
        if self._piece.size < rows * columns:
            self._piece = np.empty(rows * columns, np.float32)
        return self._piece[: rows * columns].reshape(rows, columns)

    def _share(self, n: int, kernel: Callable[..., Any], *args: Any) -> None:
        """Call kernel(*args, lo, hi) on equal parts of range(n), one for each thread, this one included."""
        if self._pool is None:
            kernel(*args, 0, n)
            return
        bounds = [n * i // self.threads for i in range(self.threads + 1)]
        jobs = [self._pool.submit(kernel, *args, lo, hi) for lo, hi in pairwise(bounds[1:])]
        kernel(*args, 0, bounds[1])
        for job in jobs:
            job.result()
