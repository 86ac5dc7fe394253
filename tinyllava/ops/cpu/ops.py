"""The operations on the CPU, compiled by Numba: matrices are multiplied straight from their memory-mapped blocks.

Arrays are NumPy's; what is not overridden here is the reference's own code. An operation runs a task on the thread
pool, giving it the addresses of its arrays and the number of chunks that the work is cut into. It does so through
a TaskRunner, which captures steps that are taken again and again (capture.py); where it does anything else in a
step, it says abandon_capture().

Where the numbers differ from the reference: against quantized weights, activations are rounded to 8 bits, 32 of
them with one scale (128 of a prompt's against formats with super-blocks); a prompt's against 16-bit floats to 14
bits, 64 with one scale (quantized.py); keys and values of models with such weights are kept in half precision.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tinyllava.ops import Activation, Array, RopeKind
from tinyllava.ops.cpu import attention, matmul, rowwise
from tinyllava.ops.cpu.capture import CapturedStep, MemoryPosition, TaskRunner
from tinyllava.ops.cpu.matmul import CHUNK_NUMBERS, GEMV_TOKENS, HeldMatrix, chunk_size, sum_call
from tinyllava.ops.cpu.microkernel import NR_F32
from tinyllava.ops.cpu.simd import llvm
from tinyllava.ops.cpu.thread_pool import ThreadPool
from tinyllava.ops.cpu.unpack import FORMATS
from tinyllava.ops.reference import NumpyOps

if TYPE_CHECKING:
    from tinyllava.files.gguf import Tensor
    from tinyllava.ops import Matrix, Position

FLOAT, BITS = struct.Struct("f"), struct.Struct("i")

Pair = tuple[Array, Array]  # keys and values


class NumbaOps(NumpyOps):
    """The Numba backend: float32 only."""

    name = "numba"

    def __init__(self, threads: int | None = None) -> None:
        super().__init__("float32", threads)
        self.pool = ThreadPool(self.threads)
        self.runner = TaskRunner(self.pool)
        self._half_cache = False

    # ---- between NumPy and the backend. A capture cannot know whether the next call would bring the same numbers

    def array(self, values: npt.ArrayLike) -> Array:
        self.runner.abandon_capture()
        return super().array(values)

    def numpy(self, values: Array) -> Array:
        self.runner.abandon_capture()
        return super().numpy(values)

    # ---- places in a sequence, and steps that are taken again and again

    def cache(self, shape: tuple[int, ...]) -> Array:
        """Half precision beside quantized or half-precision weights, as llama.cpp does; float32 beside float32."""
        return np.zeros(shape, np.float16 if self._half_cache else np.float32)

    def position(self, limit: int) -> Position:
        return MemoryPosition(limit)

    def advance(self, position: Position, n: int) -> None:
        if (capturing := self.runner.capturing) is None:
            super().advance(position, n)
            return
        assert isinstance(position, MemoryPosition)
        capturing.reserve(position, n, position.limit)
        capturing.call(partial(super().advance, position, n))

    def slice_at(self, table: Array, start: Position, n: int) -> Array:
        if (capturing := self.runner.capturing) is None:
            return super().slice_at(table, start, n)
        assert isinstance(start, MemoryPosition) and start.value + n <= len(table)
        capturing.reserve(start, n, len(table))
        table, y, at = self.runner.contiguous(table), self.runner.empty(n, *table.shape[1:]), self.runner.address
        self.runner.run(rowwise.slice_at, n, at(table), at(y), y.size // n, start.address)
        return y

    def append_kv(self, held: Pair, rows: Pair, start: Position) -> Pair:
        """NumPy converts a number to half precision in 10 ns, a vector instruction in less than one."""
        is_half, (n, n_head, d), limit = held[0].dtype == np.float16, rows[0].shape, held[0].shape[1]
        if is_half and not llvm.HARDWARE_HALF:
            self.runner.abandon_capture()
            return super().append_kv(held, rows, start)
        assert isinstance(start, MemoryPosition) and start.value + n <= limit
        if (capturing := self.runner.capturing) is not None:
            capturing.reserve(start, n, limit)
        k, v = (self.runner.contiguous(x) for x in rows)
        step, at = max(1, CHUNK_NUMBERS // (n_head * d)), self.runner.address
        self.runner.run(
            rowwise.append_kv_half if is_half else rowwise.append_kv_float, 2 * -(-n // step),
            at(k), at(v), at(held[0]), at(held[1]), n, n_head, d, limit, start.address, step,
        )  # fmt: skip
        stop = start.value + n
        k, v = (self.runner.cache_slice(x[:, :stop].transpose(1, 0, 2), start) for x in held)
        return k, v

    def capture(self, step: Callable[[Any], Array]) -> Callable[[Any], Array]:
        return CapturedStep(step, self.runner)

    # ---- weights

    def matrix(self, tensor: Tensor) -> Matrix:
        """Hold a 2-D tensor (d_out, d_in) as its file does; a format that has no kernels as the reference does."""
        self._half_cache = self._half_cache or tensor.type != "F32"
        return HeldMatrix(tensor) if tensor.type in FORMATS else super().matrix(tensor)

    def vector(self, tensor: Tensor) -> Array:
        return np.array(super().vector(tensor))  # a copy: of a writable array, the address is found faster

    def embed(self, table: Matrix, ids: npt.ArrayLike) -> Array:
        if not isinstance(table, HeldMatrix):
            self.runner.abandon_capture()
            return super().embed(table, ids)
        index, rows, capturing = np.asarray(ids, dtype=np.int64), table.tensor.rows, self.runner.capturing
        if capturing is None:
            return rows(index)
        if index is not capturing.token_ids:  # a replay would embed these ids again and not its own
            self.runner.abandon_capture()
        y = self.runner.empty(len(index), table.shape[1])
        capturing.call(lambda: np.copyto(y, rows(index)))
        return y

    def linear(self, x: Array, weight: Matrix, bias: Array | None = None) -> Array:
        if isinstance(weight, HeldMatrix):
            return matmul.linears(self.runner, x, [(weight, bias)])[0]
        self.runner.abandon_capture()
        return super().linear(x, weight, bias)

    def linears(self, x: Array, *layers: tuple[Matrix, Array | None]) -> list[Array]:
        """x is quantized once for all that want the same; one token meets all matrices in one task."""
        held = [(w, bias) for w, bias in layers if isinstance(w, HeldMatrix)]
        if len(held) < len(layers):
            return super().linears(x, *layers)
        return matmul.linears(self.runner, x, held)

    # ---- sums, norms and activations

    def add(self, x: Array, y: Array) -> Array:
        assert x.shape == y.shape
        x, y = self.runner.contiguous(x), self.runner.contiguous(y)
        to = self.runner.empty(*x.shape)
        self.runner.run_several([sum_call(self.runner, x, y, to)])
        return to

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        x, w = self.runner.contiguous(x), self.runner.contiguous(weight)
        y, n, d = self.runner.empty(*x.shape), x.size // x.shape[-1], x.shape[-1]
        step, at = max(1, CHUNK_NUMBERS // d), self.runner.address
        self.runner.run(rowwise.rms_norm, -(-n // step), at(x), at(w), at(y), n, d, _bits(eps), step)
        return y

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        x, w, b = self.runner.contiguous(x), self.runner.contiguous(weight), self.runner.contiguous(bias)
        y, n, d = self.runner.empty(*x.shape), x.size // x.shape[-1], x.shape[-1]
        step, at = max(1, CHUNK_NUMBERS // d), self.runner.address
        self.runner.run(rowwise.layer_norm, -(-n // step), at(x), at(w), at(b), at(y), n, d, _bits(eps), step)
        return y

    def activation(self, x: Array, kind: Activation) -> Array:
        x = self.runner.contiguous(x)
        y, at = self.runner.empty(*x.shape), self.runner.address
        task, step = rowwise.ACTIVATIONS[kind], chunk_size(x.size)
        self.runner.run(task, -(-x.size // step), at(x), at(y), x.size, step, at(x))
        return y

    def swiglu(self, gate: Array, up: Array) -> Array:
        gate, up = self.runner.contiguous(gate), self.runner.contiguous(up)
        y, count, step, at = self.runner.empty(*gate.shape), gate.size, chunk_size(gate.size), self.runner.address
        self.runner.run(rowwise.swiglu, -(-count // step), at(gate), at(y), count, step, at(up))
        return y

    # ---- attention

    def rope(self, x: Array, cos: Array, sin: Array, kind: RopeKind) -> Array:
        x, cos, sin = self.runner.contiguous(x), self.runner.contiguous(cos), self.runner.contiguous(sin)
        y, (n, n_head, d) = self.runner.empty(*x.shape), x.shape
        step, at = max(1, CHUNK_NUMBERS // (n_head * d)), self.runner.address
        self.runner.run(
            rowwise.ROPE[kind], -(-n // step), at(x), at(cos), at(sin), at(y),
            n, n_head, d, cos.shape[-1], step,
        )  # fmt: skip
        return y

    def attention(self, q: Array, k: Array, v: Array, *, causal: bool) -> Array:
        q, k, v = self.runner.contiguous(q), self._rows(k), self._rows(v)
        (n, n_head, d), n_head_kv, (m, place, most) = q.shape, k.shape[1], self.runner.kv_length(k, v)
        y, at = self.runner.empty(*q.shape), self.runner.address
        few = n <= GEMV_TOKENS
        # Heads that share keys go together, unless that leaves too few chunks for the threads.
        heads = n_head // n_head_kv if n_head_kv >= 2 * self.threads else 1
        size = int(attention.token_scratch(d, most, heads) if few else attention.block_scratch(d))
        size = -(-4 * size // 64) * 64
        scratch = self.runner.scratch("attention", size * self.threads)
        task = attention.attend_token if few else attention.attend_block
        n_blocks = -(-n // attention.Q_BLOCK)
        queries = -(-n // (n_blocks * NR_F32)) * NR_F32  # of a block: the last shall not be small
        n_chunks = n * n_head // heads if few else n_head * -(-n // queries)
        self.runner.run(
            task, n_chunks, at(q), at(k), at(v), at(y),
            n, n_head, n_head_kv, d, m, int(causal), int(k.dtype == np.float16),
            k.strides[0], k.strides[1], v.strides[0], v.strides[1], scratch, size,
            heads if few else queries, place,
        )  # fmt: skip
        return y

    def attention_weights(self, q: Array, k: Array, *, causal: bool) -> Array:
        self.runner.abandon_capture()
        return super().attention_weights(q, k, causal=causal)

    def _rows(self, x: Array) -> Array:
        """Keys or values with features side by side, float32 or half precision; copied only if they are not so."""
        is_so = x.dtype in (np.float16, np.float32) and x.strides[-1] == x.itemsize
        return x if is_so else self.runner.contiguous(x)


def _bits(value: float) -> int:
    """The bits of a float32, as tasks take whole numbers only."""
    return int(BITS.unpack(FLOAT.pack(value))[0])
