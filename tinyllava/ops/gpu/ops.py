"""The same operations on a GPU, through CuPy.

One token is multiplied by kernels that read the weights straight from their blocks; many tokens by cuBLAS in half
precision with float32 sums, quantized weights being dequantized for it piece by piece. All else is float32.

Where the numbers differ from the reference: one token is rounded to 16 bits for each 16 numbers when its weights
are quantized; many tokens, and weights dequantized for them, to half precision unless the weights are float32;
keys and values of such models are kept in half precision; formats without a kernel are held in half precision.
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
from tinyllava.ops.gpu.blas import Blas
from tinyllava.ops.gpu.capture import CapturedStep, DevicePosition, Window
from tinyllava.ops.gpu.kernels import kernels
from tinyllava.ops.gpu.weights import DeviceMatrix, upload
from tinyllava.ops.threads import physical_cores

if TYPE_CHECKING:
    from tinyllava.files.gguf import Tensor
    from tinyllava.ops import Matrix

ACTIVATIONS: dict[Activation, int] = {"gelu_erf": 0, "gelu_tanh": 1, "gelu_quick": 2, "silu": 3}  # cuda/rows.cu
ROWS_OF_BLOCK, THREADS = 32, 512  # WARPS * ROWS and 32 * WARPS in cuda/matvec.cu
BLOCKS = 1  # of its blocks that a processor of the device runs at once
WIDEST = 256  # features of a head in cuda/attention_token.cu
CHUNK = 64  # keys for each block in cuda/attention_token.cu
QUERIES, TILE = 128, 64  # for each block, and keys for each step, in cuda/attention.cu
TILE_BYTES, TILE_ROWS = 1 << 27, 128  # of dequantized weights at once: cuBLAS is slow at odd places


class CupyOps:
    """The CuPy backend: float32 only. ``threads`` is for those who ask: the work is the device's."""

    name = "cupy"
    batch = 1536

    def __init__(self, threads: int | None = None) -> None:
        self.dtype: np.dtype[Any] = np.dtype(np.float32)
        self.threads = threads or physical_cores()
        self.kernels = kernels()
        self.blas = Blas()
        self.capturing: list[tuple[DevicePosition, int]] | None = None  # cupy_graph.py's, while it records
        self._half = False  # whether any weights are less than float32
        self._done = cupy.zeros(1024, cupy.int32)  # counters of cuda/attention_token.cu, one for each head

    def layer(self, i: int) -> Ops:  # noqa: ARG002
        return self

    def to_layer(self, i: int | None, x: Array) -> Array:  # noqa: ARG002
        return x

    # ---- between the file, NumPy and the backend

    def matrix(self, tensor: Tensor) -> Matrix:
        """Hold a 2-D tensor (d_out, d_in) on the device, in its blocks; what has no kernel in half precision."""
        weight = upload(tensor)
        self._half = self._half or weight.kind != "F32"
        return weight

    def vector(self, tensor: Tensor) -> Array:
        return self.array(tensor.dequantize())

    def array(self, values: npt.ArrayLike) -> Array:
        if isinstance(values, cupy.ndarray):  # what a recorded step is given
            return _array(values)
        return _array(cupy.asarray(np.ascontiguousarray(values, dtype=np.float32)))

    def numpy(self, values: Array) -> Array:
        """The only operation that waits for the device."""
        return np.asarray(cupy.asnumpy(values), dtype=np.float32)

    def zeros(self, shape: tuple[int, ...]) -> Array:
        return _array(cupy.zeros(shape, cupy.float32))

    def cache(self, shape: tuple[int, ...]) -> Array:
        """Half precision beside quantized or half-precision weights; float32 beside float32."""
        return _array(cupy.zeros(shape, cupy.float16 if self._half else cupy.float32))

    # ---- places in a sequence, and steps that are taken again and again

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
            return _array(Window(table, start))
        return table[start.value : start.value + n]

    def append_kv(
        self, held: tuple[Array, Array], rows: tuple[Array, Array], start: Position
    ) -> tuple[Array, Array]:
        assert isinstance(start, DevicePosition)
        (keys, values), (k, v) = held, (_floats(x) for x in rows)
        n, n_head, width = k.shape
        place = self._place(start)
        self.kernels.launch(
            "append_kv", (-(-n_head * width // 1024), n, 2), 256,
            k, v, keys, values, *place, n_head, keys.shape[1], width, keys.dtype == np.float16,
        )  # fmt: skip
        if self.capturing is not None:
            return _array(Window(keys, start)), _array(Window(values, start))
        stop = start.value + n
        return keys[:, :stop].transpose(1, 0, 2), values[:, :stop].transpose(1, 0, 2)

    def capture(self, step: Callable[[Any], Array]) -> Callable[[Any], Array]:
        return CapturedStep(step, self)

    def _place(self, start: DevicePosition) -> tuple[Any, int]:
        """Where a position is, as kernels are told: on the device while a step is recorded, else by number."""
        return (None, start.value) if self.capturing is None else (start.device, 0)

    # ---- weights

    def embed(self, table: Matrix, ids: npt.ArrayLike) -> Array:
        assert isinstance(table, DeviceMatrix)
        index = cupy.asarray(ids, dtype=cupy.int32)
        y = cupy.empty((len(index), table.shape[1]), cupy.float32)
        self.kernels.launch(
            "embed", len(index), 256, table.data, table.n_blocks, table.format, index, table.shape[1], y
        )
        return _array(y)

    def linear(self, x: Array, weight: Matrix, bias: Array | None = None) -> Array:
        return self.linears(x, (weight, bias))[0]

    def linears(self, x: Array, *layers: tuple[Matrix, Array | None]) -> list[Array]:
        rows = x.reshape(-1, x.shape[-1])  # (n, d_in)
        if len(rows) == 1 and len(layers) <= 3 and all(_device(w).rows_are_aligned for w, _ in layers):
            products = self._multiply_token(rows, *layers)
        else:
            products = self._multiply_rows(rows, *layers)
        return [y.reshape(*x.shape[:-1], y.shape[-1]) for y in products]

    def _multiply_token(self, x: Any, *layers: tuple[Matrix, Array | None]) -> list[Any]:
        """x (1, d_in) @ W^T + b for up to three W at once -> (1, d_out) each, side by side in memory."""
        x = _floats(x)
        weights = [_device(weight) for weight, _ in layers]
        d_in, d_out = x.shape[1], [weight.shape[0] for weight in weights]
        y = cupy.empty((1, sum(d_out)), cupy.float32)
        n_blocks = self._share_blocks(weights)
        products: list[Any] = []
        for weight, (_, bias), blocks in zip(weights, layers, n_blocks, strict=True):
            products += [weight.data, bias, weight.shape[0], weight.format, blocks]
        products += [None, None, 0, 0, 0] * (3 - len(layers))
        shared = max(4 * d_in if w.is_float else 320 * -(-d_in // 128) for w in weights)
        self.kernels.launch("matvec", sum(n_blocks), THREADS, x, d_in, y, *products, shared=shared)
        ends = np.cumsum(d_out).tolist()
        return [y[:, end - rows : end] for rows, end in zip(d_out, ends, strict=True)]

    def _share_blocks(self, weights: list[DeviceMatrix]) -> list[int]:
        """How many blocks multiply each of some matrices: as many together as run at once, shared out by bytes."""
        total = sum(weight.data.nbytes for weight in weights)
        room = BLOCKS * self.kernels.processors
        fair = [max(1, room * weight.data.nbytes // total) for weight in weights]
        return [min(n, -(-w.shape[0] // ROWS_OF_BLOCK)) for n, w in zip(fair, weights, strict=True)]

    def _multiply_rows(self, x: Any, *layers: tuple[Matrix, Array | None]) -> list[Any]:
        """x (n, d_in) @ W^T + b -> (n, d_out) each, by cuBLAS."""
        products = []
        half: Any = self._halves(x) if any(_device(weight).kind != "F32" for weight, _ in layers) else None
        for matrix, bias in layers:
            weight = _device(matrix)
            d_out, d_in = weight.shape
            y = cupy.empty((len(x), d_out), cupy.float32)
            if weight.is_float:
                given = _floats(x) if weight.kind == "F32" else half
                self.blas.multiply(given, weight.data.view(given.dtype), y, 0, d_out)
            else:
                step = max(1, TILE_BYTES // (2 * d_in * TILE_ROWS)) * TILE_ROWS
                for start in range(0, d_out, step):
                    stop = min(start + step, d_out)
                    self.blas.multiply(half, self._dequantize(weight, start, stop), y, start, stop)
            if bias is not None:
                self.kernels.launch("add_bias", (-(-d_out // 256), len(x)), 256, y, bias, d_out)
            products.append(y)
        return products

    def _dequantize(self, weight: DeviceMatrix, start: int, stop: int) -> Any:
        """Rows start..stop of a quantized matrix in half precision."""
        n = weight.shape[1] // weight.type.block_size  # blocks of a row
        y = cupy.empty((stop - start, weight.shape[1]), cupy.float16)
        count = (stop - start) * n
        self.kernels.launch(
            "dequantize", min(-(-count * 8 // 256), 64 * self.kernels.processors), 256,
            weight.data, weight.n_blocks, weight.format, np.uint64(start * n), np.uint64(count), y,
        )  # fmt: skip
        return y

    def _halves(self, x: Any) -> Any:
        """x in half precision."""
        if x.dtype == np.float16:
            return cupy.ascontiguousarray(x)
        x = _floats(x)
        if x.size % 4:
            return x.astype(cupy.float16)
        y = cupy.empty(x.shape, cupy.float16)
        self.kernels.launch("halve", -(-x.size // 1024), 256, x, y, np.uint64(x.size))
        return y

    # ---- sums, norms and activations

    def add(self, x: Array, y: Array) -> Array:
        return x + y

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        x = _floats(x)
        y = cupy.empty_like(x)
        d = x.shape[-1]
        self.kernels.launch("layer_norm", x.size // d, 256, x, weight, bias, y, d, eps)
        return _array(y)

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        x = _floats(x)
        n, d = x.size // x.shape[-1], x.shape[-1]
        y, fours = self._for_products(x, n), d % 4 == 0 and d <= 32 * 256 and _is_aligned(x)
        self.kernels.launch(
            "rms_norm_fours" if fours else "rms_norm", n, 256, x, weight, y, d, eps, y.dtype == np.float16
        )
        return _array(y)

    def activation(self, x: Array, kind: Activation) -> Array:
        x = _floats(x)
        y = self._for_products(x, len(x))
        self.kernels.launch(
            "activation", -(-x.size // 256), 256, x, y, np.uint64(x.size), ACTIVATIONS[kind], y.dtype == np.float16
        )
        return _array(y)

    def swiglu(self, gate: Array, up: Array) -> Array:
        gate, up = _floats(gate), _floats(up)
        y, count = self._for_products(gate, len(gate)), np.uint64(gate.size)
        if y.dtype == np.float16 and gate.size % 4 == 0:
            self.kernels.launch("swiglu_halves", -(-gate.size // 1024), 256, gate, up, y, count)
        else:
            y = cupy.empty_like(gate)
            self.kernels.launch("swiglu", -(-gate.size // 256), 256, gate, up, y, count)
        return _array(y)

    def _for_products(self, x: Any, n: int) -> Any:
        """Room for what is only multiplied next: of many tokens in half precision, as cuBLAS wants them."""
        return cupy.empty(x.shape, cupy.float16 if n > 1 and self._half else cupy.float32)

    # ---- attention

    def rope(self, x: Array, cos: Array, sin: Array, kind: RopeKind) -> Array:
        x = _floats(x)
        y = cupy.empty_like(x)
        place: tuple[Any, int] = (None, 0)
        if isinstance(cos, Window) and isinstance(sin, Window):
            place = (cos.position.device, 0)
            cos, sin = cos.array, sin.array
        n, n_head, width = x.shape
        pairs = cos.shape[-1]
        self.kernels.launch(
            "rope", (-(-n_head * (width - pairs) // 256), n), 256,
            x, _floats(cos), _floats(sin), y, *place, n_head, width, pairs, kind == "norm",
        )  # fmt: skip
        return _array(y)

    def attention(self, q: Array, k: Array, v: Array, *, causal: bool) -> Array:
        q = _floats(q)
        n, _, width = q.shape
        position = None
        if isinstance(k, Window) and isinstance(v, Window):
            position = k.position.device
            k, v = k.array.transpose(1, 0, 2), v.array.transpose(1, 0, 2)
        if width > WIDEST:
            hint = "Use another backend"
            raise UsageError("backend cupy", f"heads of {width} features", wanted=f"at most {WIDEST}", hint=hint)
        k, v = _side_by_side(k), _side_by_side(v)
        if n == 1 and width in (64, 128) and k.strides == v.strides and k.strides[0] == k.itemsize * width:
            return self._attend_token(q, k, v, position)
        if n > 1 and width in (64, 128) and self._half:
            return self._attend_block(q, k, v, causal)
        return self._attend_any(q, k, v, position, causal)

    def _attend_token(self, q: Any, k: Any, v: Any, position: Any) -> Array:
        """One token, its keys and values (m, g, k) where the cache holds them."""
        (_, n_head, width), (m, n_head_kv, _) = q.shape, k.shape
        n_ctx = k.strides[1] // k.strides[0]  # rows between one head's first and the next one's
        blocks = min(-(-n_ctx // CHUNK), max(1, 4 * self.kernels.processors // n_head))
        y = cupy.empty_like(q)
        partial = cupy.empty((n_head, blocks, width + 2), cupy.float32)
        name = f"attend_token_{'h' if k.dtype == np.float16 else 'f'}{width}"
        self.kernels.launch(
            name, (blocks, n_head), 128,
            q, k, v, y, partial, self._done, position, m, n_head // n_head_kv, n_ctx, 1 / math.sqrt(width),
        )  # fmt: skip
        return _array(y)

    def _attend_block(self, q: Any, k: Any, v: Any, causal: bool) -> Array:
        """Many tokens at once, keys and values in half precision."""
        (n, n_head, width), (m, n_head_kv, _) = q.shape, k.shape
        k, v = (x if x.dtype == np.float16 else self._halves(x) for x in (k, v))
        y = cupy.empty(q.shape, cupy.float16)
        strides = [stride // x.itemsize for x in (k, v) for stride in x.strides[:2]]
        few = n_head * -(-n // QUERIES) < 2 * self.kernels.processors
        queries = QUERIES // 2 if few else QUERIES
        self.kernels.launch(
            f"flash_attention_h{width}{'_few' * few}", (n_head, -(-n // queries)), 128,
            q, k, v, y, n, n_head, n_head_kv, m, *strides, causal, 1 / math.sqrt(width),
            shared=(2 * TILE + queries) * (2 * width + 16),
        )  # fmt: skip
        return _array(y)

    def _attend_any(self, q: Any, k: Any, v: Any, position: Any, causal: bool) -> Array:
        y = cupy.empty_like(q)
        (n, n_head, width), (m, n_head_kv, _) = q.shape, k.shape
        strides = [stride // x.itemsize for x in (k, v) for stride in x.strides[:2]]
        self.kernels.launch(
            "attend_any", -(-n * n_head // 4), 128,
            q, k, v, y, position, n, n_head, n_head // n_head_kv, m, width, *strides,
            k.dtype == np.float16, causal, 1 / math.sqrt(width),
        )  # fmt: skip
        return _array(y)

    def attention_weights(self, q: Array, k: Array, *, causal: bool) -> Array:
        n, n_head, width = q.shape
        m, n_head_kv, _ = k.shape
        groups = q.transpose(1, 0, 2).reshape(n_head_kv, -1, width)  # (g, h/g * n, k)
        scores = groups @ k.astype(cupy.float32).transpose(1, 2, 0)  # (g, h/g * n, m)
        scores = scores.reshape(n_head, n, m) / math.sqrt(width)
        if causal:
            visible = cupy.arange(m) <= cupy.arange(m - n, m)[:, None]  # (n, m)
            scores = cupy.where(visible, scores, -np.inf)
        weights = cupy.exp(scores - scores.max(axis=-1, keepdims=True))
        return _array(weights / weights.sum(axis=-1, keepdims=True))


def _array(x: Any) -> Array:
    """x, which is CuPy's: to those who check types, arrays are NumPy's."""
    array: Array = x
    return array


def _device(weight: Matrix) -> DeviceMatrix:
    assert isinstance(weight, DeviceMatrix)
    return weight


def _floats(x: Any) -> Any:
    """x as float32, one number after the other."""
    if x.dtype == np.float32 and x.flags.c_contiguous:
        return x
    return cupy.ascontiguousarray(x, dtype=cupy.float32)


def _is_aligned(x: Any) -> bool:
    """Whether x can be read 16 bytes at a time."""
    return bool(x.data.ptr % 16 == 0)


def _side_by_side(x: Any) -> Any:
    """Keys or values whose features lie side by side; copied only if they do not."""
    return x if x.strides[-1] == x.itemsize else cupy.ascontiguousarray(x)
