"""The operations on a GPU, through CuPy.

One token is multiplied by a kernel that reads the weights in their blocks (GEMV); many tokens by cuBLAS in float16
with float32 sums (GEMM), for which quantized weights are dequantized some rows at a time. All else is float32.

Where the numbers differ from the reference: one token is quantized to 16 bits, with a scale for each 16, if the
weights are quantized. Many tokens, and weights dequantized for them, are rounded to float16 unless the weights are
float32; so are keys and values of such models, and weights in a format without a kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import cupy
import numpy as np
import numpy.typing as npt

from tinyllava.errors import UsageError
from tinyllava.ops import Activation, Array, Ops, Position, RopeKind
from tinyllava.ops.gpu import constants, device
from tinyllava.ops.gpu.blas import Blas
from tinyllava.ops.gpu.capture import CapturedStep
from tinyllava.ops.gpu.constants import ACTIVATIONS, ROW_THREADS
from tinyllava.ops.gpu.kernels import kernels
from tinyllava.ops.gpu.position import DeferredSlice, DevicePosition, defer
from tinyllava.ops.gpu.weights import DeviceMatrix, upload
from tinyllava.ops.threads import physical_cores

if TYPE_CHECKING:
    from tinyllava.files.gguf import Tensor
    from tinyllava.ops import Matrix

# Of dequantized weights at once, and their rows a multiple of this: cuBLAS is slow at odd sizes.
DEQUANTIZED_BYTES, DEQUANTIZED_ROWS = 1 << 27, 128


class CupyOps:
    """The CuPy backend: float32 only. ``threads`` is what the host may use; the computing is the device's."""

    name = "cupy"
    batch = 1536
    memory = device

    def __init__(self, threads: int | None = None) -> None:
        self.dtype: np.dtype[Any] = np.dtype(np.float32)
        self.threads = threads or physical_cores()
        self.kernels = kernels()
        self.blas = Blas()
        self.capturing: list[tuple[DevicePosition, int]] | None = None  # the advances of a step, during capture
        self._half = False  # whether any weights are less than float32
        self._done = cupy.zeros(1024, cupy.int32)  # counters of cuda/attention_token.cu, one for each head

    def layer(self, i: int) -> Ops:  # noqa: ARG002
        return self

    def to_layer(self, i: int | None, x: Array) -> Array:  # noqa: ARG002
        return x

    # ---- between the file, NumPy and the backend

    def matrix(self, tensor: Tensor) -> Matrix:
        """Copy a 2-D tensor (d_out, d_in) to the device, in its blocks; in float16 if its format has no kernel."""
        weight = upload(tensor)
        self._half = self._half or weight.type.name != "F32"
        return weight

    def vector(self, tensor: Tensor) -> Array:
        return self.array(tensor.dequantize())

    def array(self, values: npt.ArrayLike) -> Array:
        if isinstance(values, cupy.ndarray):  # during capture, a step's input is on the device already
            return values
        return cupy.asarray(np.ascontiguousarray(values, dtype=np.float32))

    def numpy(self, values: Array) -> Array:
        """The only operation that waits for the device."""
        return np.asarray(cupy.asnumpy(values), dtype=np.float32)

    def zeros(self, shape: tuple[int, ...]) -> Array:
        return cupy.zeros(shape, cupy.float32)

    def cache(self, shape: tuple[int, ...]) -> Array:
        """float16 if any weights are quantized or float16; float32 beside float32."""
        return cupy.zeros(shape, cupy.float16 if self._half else cupy.float32)

    # ---- positions in a sequence, and captured steps

    def position(self, limit: int) -> Position:
        return DevicePosition(limit)

    def advance(self, position: Position, n: int) -> None:
        assert isinstance(position, DevicePosition)
        position.value += n
        self.kernels.launch("advance", 1, 1, position.device, n)
        if self.capturing is not None:
            self.capturing.append((position, n))

    def slice_at(self, table: Array, start: Position, n: int) -> Array:
        if self.capturing is not None:
            assert isinstance(start, DevicePosition)
            return defer(table, start)
        return table[start.value : start.value + n]

    def append_kv(
        self, held: tuple[Array, Array], rows: tuple[Array, Array], start: Position
    ) -> tuple[Array, Array]:
        assert isinstance(start, DevicePosition)
        (keys, values), (k, v) = held, (_as_float32(x) for x in rows)
        n, n_head, head_dim = k.shape
        capturing = self.capturing is not None
        position = (start.device, 0) if capturing else (None, start.value)
        self.kernels.launch(
            "append_kv", (_ceil_div(n_head * head_dim, 4 * ROW_THREADS), n, 2), ROW_THREADS,
            k, v, keys, values, *position, n_head, keys.shape[1], head_dim, keys.dtype == np.float16,
        )  # fmt: skip
        if capturing:
            return defer(keys, start), defer(values, start)
        stop = start.value + n
        return keys[:, :stop].transpose(1, 0, 2), values[:, :stop].transpose(1, 0, 2)

    def capture(self, step: Callable[[Any], Array]) -> Callable[[Any], Array]:
        return CapturedStep(step, self)

    # ---- weights

    def embed(self, table: Matrix, ids: npt.ArrayLike) -> Array:
        table, index = _on_device(table), cupy.asarray(ids, dtype=cupy.int32)
        y = _empty((len(index), table.shape[1]))
        self.kernels.launch(
            "embed", len(index), ROW_THREADS, table.data, table.n_blocks, table.type.id, index, table.shape[1], y
        )
        return y

    def linear(self, x: Array, weight: Matrix, bias: Array | None = None) -> Array:
        return self.linears(x, (weight, bias))[0]

    def linears(self, x: Array, *layers: tuple[Matrix, Array | None]) -> list[Array]:
        rows = x.reshape(-1, x.shape[-1])  # (n, d_in)
        weights = [(_on_device(weight), bias) for weight, bias in layers]
        if len(rows) == 1 and len(layers) <= 3 and all(weight.rows_are_aligned for weight, _ in weights):
            products = self._matvec(rows, *weights)
        else:
            half = self._as_float16(rows) if any(weight.type.name != "F32" for weight, _ in weights) else None
            products = [self._gemm(rows, half, weight, bias) for weight, bias in weights]
        return [y.reshape(*x.shape[:-1], y.shape[-1]) for y in products]

    def _matvec(self, x: Array, *layers: tuple[DeviceMatrix, Array | None]) -> list[Array]:
        """x (1, d_in) @ W^T + b for up to three W in one launch -> (1, d_out) each, contiguous in memory."""
        x = _as_float32(x)
        weights = [weight for weight, _ in layers]
        d_in, d_out = x.shape[1], [weight.shape[0] for weight in weights]
        y = _empty((1, sum(d_out)))
        n_blocks = self._share_blocks(weights)
        products: list[Any] = []
        for (weight, bias), blocks in zip(layers, n_blocks, strict=True):
            products += [weight.data, bias, weight.shape[0], weight.type.id, blocks]
        products += [None, None, 0, 0, 0] * (3 - len(layers))
        # Floats take 4 bytes each; quantized, 128 numbers take 2 each and 8 groups of 16 take 8 each: 320.
        shared = max(4 * d_in if w.type.is_scalar else 320 * _ceil_div(d_in, 128) for w in weights)
        threads = 32 * constants.MATVEC_WARPS
        self.kernels.launch("matvec", sum(n_blocks), threads, x, d_in, y, *products, shared=shared)
        ends = np.cumsum(d_out).tolist()
        return [y[:, end - rows : end] for rows, end in zip(d_out, ends, strict=True)]

    def _share_blocks(self, weights: list[DeviceMatrix]) -> list[int]:
        """Thread blocks for each matrix: one per multiprocessor in all, in proportion to the matrices' bytes."""
        total = sum(weight.data.nbytes for weight in weights)
        shares = [max(1, self.kernels.n_multiprocessors * weight.data.nbytes // total) for weight in weights]
        most = [_ceil_div(weight.shape[0], constants.MATVEC_WARPS * constants.MATVEC_ROWS) for weight in weights]
        return [min(pair) for pair in zip(shares, most, strict=True)]

    def _gemm(self, x: Array, half: Any, weight: DeviceMatrix, bias: Array | None) -> Array:
        """x (n, d_in) @ W^T + b -> (n, d_out), by cuBLAS. ``half`` is x in float16 unless W is float32."""
        d_out, d_in = weight.shape
        y = _empty((len(x), d_out))
        if weight.type.is_scalar:
            x = _as_float32(x) if weight.type.name == "F32" else half
            self.blas.multiply(x, weight.data.view(x.dtype), y, 0, d_out)
        else:
            step = max(1, DEQUANTIZED_BYTES // (2 * d_in * DEQUANTIZED_ROWS)) * DEQUANTIZED_ROWS
            for start in range(0, d_out, step):
                stop = min(start + step, d_out)
                self.blas.multiply(half, self._dequantize(weight, start, stop), y, start, stop)
        if bias is not None:
            self.kernels.launch("add_bias", (_ceil_div(d_out, ROW_THREADS), len(x)), ROW_THREADS, y, bias, d_out)
        return y

    def _dequantize(self, weight: DeviceMatrix, start: int, stop: int) -> Array:
        """Rows start..stop of a quantized matrix in float16."""
        n = weight.shape[1] // weight.type.block_size  # blocks of a row
        y = _empty((stop - start, weight.shape[1]), np.float16)
        count = (stop - start) * n
        self.kernels.launch(
            "dequantize", min(_ceil_div(count * 8, ROW_THREADS), 64 * self.kernels.n_multiprocessors), ROW_THREADS,
            weight.data, weight.n_blocks, weight.type.id, np.uint64(start * n), np.uint64(count), y,
        )  # fmt: skip
        return y

    def _as_float16(self, x: Array) -> Array:
        if x.dtype == np.float16:
            return cupy.ascontiguousarray(x)
        x = _as_float32(x)
        if x.size % 4:
            return x.astype(np.float16)
        y = _empty(x.shape, np.float16)
        n_blocks = _ceil_div(x.size, 4 * ROW_THREADS)
        self.kernels.launch("to_float16", n_blocks, ROW_THREADS, x, y, np.uint64(x.size))
        return y

    # ---- sums, norms and activations

    def add(self, x: Array, y: Array) -> Array:
        return x + y

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        x = _as_float32(x)
        y, d = _empty(x.shape), x.shape[-1]
        self.kernels.launch("layer_norm", x.size // d, ROW_THREADS, x, weight, bias, y, d, eps)
        return y

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        x = _as_float32(x)
        n, d = x.size // x.shape[-1], x.shape[-1]
        y, vec4 = self._empty_factor(x, n), d % 4 == 0 and d <= 32 * ROW_THREADS and _is_aligned(x)
        name = "rms_norm_vec4" if vec4 else "rms_norm"
        self.kernels.launch(name, n, ROW_THREADS, x, weight, y, d, eps, y.dtype == np.float16)
        return y

    def activation(self, x: Array, kind: Activation) -> Array:
        x = _as_float32(x)
        y, n_blocks = self._empty_factor(x, len(x)), _ceil_div(x.size, ROW_THREADS)
        number, half = ACTIVATIONS.index(kind), y.dtype == np.float16
        self.kernels.launch("activation", n_blocks, ROW_THREADS, x, y, np.uint64(x.size), number, half)
        return y

    def swiglu(self, gate: Array, up: Array) -> Array:
        gate, up = _as_float32(gate), _as_float32(up)
        vec4 = self._half and len(gate) > 1 and gate.size % 4 == 0
        name, each = ("swiglu_float16", 4) if vec4 else ("swiglu", 1)
        y = _empty(gate.shape, np.float16 if vec4 else np.float32)
        n_blocks = _ceil_div(gate.size, each * ROW_THREADS)
        self.kernels.launch(name, n_blocks, ROW_THREADS, gate, up, y, np.uint64(gate.size))
        return y

    def _empty_factor(self, x: Array, n: int) -> Array:
        """An output that is only multiplied next: float16 for many tokens, as cuBLAS needs it; else float32."""
        return _empty(x.shape, np.float16 if n > 1 and self._half else np.float32)

    # ---- attention

    def rope(self, x: Array, cos: Array, sin: Array, kind: RopeKind) -> Array:
        x = _as_float32(x)
        y, position = _empty(x.shape), None
        if isinstance(cos, DeferredSlice) and isinstance(sin, DeferredSlice):
            position, cos, sin = cos.position.device, cos.array, sin.array
        n, n_head, head_dim = x.shape
        pairs = cos.shape[-1]
        self.kernels.launch(
            "rope", (_ceil_div(n_head * (head_dim - pairs), ROW_THREADS), n), ROW_THREADS,
            x, _as_float32(cos), _as_float32(sin), y, position, 0, n_head, head_dim, pairs, kind == "norm",
        )  # fmt: skip
        return y

    def attention(self, q: Array, k: Array, v: Array, *, causal: bool) -> Array:
        q, position = _as_float32(q), None
        n, _, head_dim = q.shape
        if isinstance(k, DeferredSlice) and isinstance(v, DeferredSlice):
            position, k, v = k.position.device, k.array.transpose(1, 0, 2), v.array.transpose(1, 0, 2)
        if head_dim > constants.MAX_HEAD_DIM:
            wanted, hint = f"at most {constants.MAX_HEAD_DIM}", "Use another backend"
            raise UsageError("backend cupy", f"heads of {head_dim} features", wanted=wanted, hint=hint)
        k, v = _rows_contiguous(k), _rows_contiguous(v)
        if n == 1 and head_dim in (64, 128) and k.strides == v.strides and k.strides[0] == k.itemsize * head_dim:
            return self._attend_token(q, k, v, position)
        if n > 1 and head_dim in (64, 128) and self._half:
            return self._attend_flash(q, k, v, causal)
        return self._attend_any(q, k, v, position, causal)

    def _attend_token(self, q: Array, k: Array, v: Array, position: Any) -> Array:
        """One token; its keys and values (m, g, k) are views of the cache."""
        (_, n_head, head_dim), (m, n_head_kv, _) = q.shape, k.shape
        n_ctx = k.strides[1] // k.strides[0]  # rows between one head's first and the next one's
        blocks = min(_ceil_div(n_ctx, constants.DECODE_KEYS), max(1, 4 * self.kernels.n_multiprocessors // n_head))
        y = _empty(q.shape)
        partial = _empty((n_head, blocks, head_dim + 2))
        self.kernels.launch(
            f"attend_token_{k.dtype}_{head_dim}", (blocks, n_head), constants.DECODE_THREADS,
            q, k, v, y, partial, self._done, position, m, n_head // n_head_kv, n_ctx, 1 / math.sqrt(head_dim),
        )  # fmt: skip
        return y

    def _attend_flash(self, q: Array, k: Array, v: Array, causal: bool) -> Array:
        """Many tokens at once, on tensor cores."""
        (n, n_head, head_dim), (m, n_head_kv, _) = q.shape, k.shape
        k, v = (x if x.dtype == np.float16 else self._as_float16(x) for x in (k, v))
        y = _empty(q.shape, np.float16)
        queries = 16 * constants.FLASH_WARPS  # of a block of threads with one row tile for each warp
        row_tiles = 1 if n_head * _ceil_div(n, 2 * queries) < 2 * self.kernels.n_multiprocessors else 2
        queries *= row_tiles
        self.kernels.launch(
            f"flash_attention_{head_dim}_{row_tiles}", (n_head, _ceil_div(n, queries)), 32 * constants.FLASH_WARPS,
            q, k, v, y, n, n_head, n_head_kv, m, *_strides(k, v), causal, 1 / math.sqrt(head_dim),
            shared=(2 * constants.FLASH_KEYS + queries) * (2 * head_dim + constants.FLASH_PADDING),
        )  # fmt: skip
        return y

    def _attend_any(self, q: Array, k: Array, v: Array, position: Any, causal: bool) -> Array:
        (n, n_head, head_dim), (m, n_head_kv, _) = q.shape, k.shape
        y = _empty(q.shape)
        self.kernels.launch(
            "attend_any", _ceil_div(n * n_head, 4), 128,
            q, k, v, y, position, n, n_head, n_head // n_head_kv, m, head_dim, *_strides(k, v),
            k.dtype == np.float16, causal, 1 / math.sqrt(head_dim),
        )  # fmt: skip
        return y

    def attention_weights(self, q: Array, k: Array, *, causal: bool) -> Array:
        n, n_head, head_dim = q.shape
        m, n_head_kv, _ = k.shape
        groups = q.transpose(1, 0, 2).reshape(n_head_kv, -1, head_dim)  # (g, h/g * n, k)
        scores = groups @ k.astype(cupy.float32).transpose(1, 2, 0)  # (g, h/g * n, m)
        scores = scores.reshape(n_head, n, m) / math.sqrt(head_dim)
        if causal:
            visible = cupy.arange(m) <= cupy.arange(m - n, m)[:, None]  # (n, m)
            scores = cupy.where(visible, scores, -np.inf)
        weights = cupy.exp(scores - scores.max(axis=-1, keepdims=True))
        return weights / weights.sum(axis=-1, keepdims=True)


def _empty(shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> Array:
    """An uninitialized array on the device."""
    return cupy.empty(shape, dtype)


def _as_float32(x: Array) -> Array:
    """x as float32 in C order; x itself if it is so already."""
    if x.dtype == np.float32 and x.flags.c_contiguous:
        return x
    return cupy.ascontiguousarray(x, dtype=cupy.float32)


def _rows_contiguous(x: Array) -> Array:
    """Keys or values whose features lie one after the other; a copy only if they do not."""
    return x if x.strides[-1] == x.itemsize else cupy.ascontiguousarray(x)


def _strides(k: Array, v: Array) -> list[int]:
    """From row to row and from head to head of keys, and of values, in numbers."""
    return [stride // x.itemsize for x in (k, v) for stride in x.strides[:2]]


def _is_aligned(x: Any) -> bool:
    """Whether x can be read 16 bytes at a time."""
    return bool(x.data.ptr % 16 == 0)


def _on_device(weight: Matrix) -> DeviceMatrix:
    assert isinstance(weight, DeviceMatrix)
    return weight


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
