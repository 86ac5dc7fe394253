"""The same operations, faster on the CPU: matrices are multiplied straight from their memory-mapped blocks.

Arrays are NumPy's; what is not overridden here is the reference's own code. Each operation hands a task
(thread_pool.py) the addresses of its arrays and a way to cut the work into chunks. It does so through a runner
(numba_replay.py), and says abandon_capture() where it does anything else.

Where the numbers differ from the reference: against quantized weights, activations are rounded to 8 bits, 32 of
them with one step (128 of a prompt's against formats with super-blocks); a prompt's against 16-bit floats to 14
bits, 64 with one step; keys and values of models with such weights are kept in half precision.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tinyllava.ops import Activation, Array, RopeKind
from tinyllava.ops.cpu import attention as attention
from tinyllava.ops.cpu import gemm as products
from tinyllava.ops.cpu import gemv as dots
from tinyllava.ops.cpu import rowwise as rowwise
from tinyllava.ops.cpu.capture import CapturedStep, MemoryPosition, TaskRunner
from tinyllava.ops.cpu.microkernel import BLOCK, FLOAT_TOKENS, LAYOUTS, ROWS, SIDES, TOKENS
from tinyllava.ops.cpu.quantize_activations import QUANTIZE_ROOM, quantize_others, quantize_tokens
from tinyllava.ops.cpu.simd.llvm import HARDWARE_HALF
from tinyllava.ops.cpu.thread_pool import TaskCall, ThreadPool
from tinyllava.ops.cpu.unpack import FORMATS
from tinyllava.ops.cpu.weights import BlockMatrix, FloatMatrix
from tinyllava.ops.reference import NumpyOps

if TYPE_CHECKING:
    from tinyllava.files.gguf import Tensor
    from tinyllava.ops import Matrix, Position

HUGE = 20.0  # times the root mean square of its row: a number that is multiplied apart from the others
FEW = 2  # rows that may have one, or a sixteenth of all
DOT_TOKENS = 2  # up to this many tokens are multiplied one by one
TILE_BYTES = 400_000  # of a panel's tiles: they stay in the second-level cache (1 MiB a core, and less elsewhere)
CHUNK_BYTES = 1 << 16  # of weights that a thread reads at a time when decoding
CHUNK_NUMBERS = 1 << 14  # of an array that a thread treats at a time
FLOAT, BITS = struct.Struct("f"), struct.Struct("i")

Pair = tuple[Array, Array]  # keys and values
Layers = list[tuple[BlockMatrix | FloatMatrix, Array | None]]  # matrices, perhaps with a bias


class NumbaOps(NumpyOps):
    """The Numba backend: float32 only."""

    name = "numba"

    def __init__(self, threads: int | None = None) -> None:
        super().__init__("float32", threads)
        self.pool = ThreadPool(self.threads)
        self.runner = TaskRunner(self.pool)
        self._half_cache = False

    # ---- between NumPy and the backend: nobody knows where numbers come from and what will be done with them

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
        """NumPy takes 10 ns to make a number half as long; a vector instruction, less than one."""
        is_half, (n, n_head, d), limit = held[0].dtype == np.float16, rows[0].shape, held[0].shape[1]
        if is_half and not HARDWARE_HALF:
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
        """Hold a 2-D tensor (d_out, d_in) in its blocks, F32 as a view; what has no kernel as the reference."""
        if tensor.type == "F32":
            return FloatMatrix(tensor)
        self._half_cache = True
        return BlockMatrix(tensor) if tensor.type in FORMATS else super().matrix(tensor)

    def vector(self, tensor: Tensor) -> Array:
        return np.array(super().vector(tensor))  # one's own: floats() and address() take the short way

    def embed(self, table: Matrix, ids: npt.ArrayLike) -> Array:
        if not isinstance(table, BlockMatrix | FloatMatrix):
            self.runner.abandon_capture()
            return super().embed(table, ids)
        index, rows, capturing = np.asarray(ids, dtype=np.int64), table.tensor.rows, self.runner.capturing
        if capturing is None:
            return rows(index)
        if index is not capturing.token_ids:  # they will not be others when the step is
            self.runner.abandon_capture()
        y = self.runner.empty(len(index), table.shape[1])
        capturing.call(lambda: np.copyto(y, rows(index)))
        return y

    def linear(self, x: Array, weight: Matrix, bias: Array | None = None) -> Array:
        if isinstance(weight, BlockMatrix | FloatMatrix):
            return self._multiply(x, [(weight, bias)])[0]
        self.runner.abandon_capture()
        return super().linear(x, weight, bias)

    def linears(self, x: Array, *layers: tuple[Matrix, Array | None]) -> list[Array]:
        """What has to be done to x is done once; one token meets all matrices in one task."""
        known = [(w, bias) for w, bias in layers if isinstance(w, BlockMatrix | FloatMatrix)]
        return self._multiply(x, known) if len(known) == len(layers) else super().linears(x, *layers)

    def _multiply(self, x: Array, layers: Layers) -> list[Array]:
        """x (..., d_in) @ W^T + b -> (..., d_out) for each W."""
        rows = self.runner.contiguous(x).reshape(-1, x.shape[-1])  # (n, d_in)
        if len(rows) <= DOT_TOKENS:
            answers = self._dots(rows, layers)
        else:
            self.runner.abandon_capture()
            answers = self._products(rows, layers)
        return [y.reshape(*x.shape[:-1], y.shape[-1]) for y in answers]

    def _dots(self, x: Array, layers: Layers) -> list[Array]:
        """x (n, d_in) @ W^T + b -> (n, d_out) for each W, one token after the other."""
        answers = [self.runner.empty(len(x), w.shape[0]) for w, _ in layers]
        given = [(y, b) for y, (_, b) in zip(answers, layers, strict=True) if b is not None]
        added = [(y, self.runner.contiguous(b)) for y, b in given]
        for t in range(len(x)):
            tokens = {w.token: self._token(x[t], *w.token) for w, _ in layers}  # x in the forms that they ask for
            forms = [chunk for chunk in tokens.items() if chunk[0][0] != dots.FLOATS]
            self.runner.run_several([self._quantize(x[t], *form, *rooms) for form, rooms in forms])
            parts = [self._dot(w, tokens[w.token], y[t]) for (w, _), y in zip(layers, answers, strict=True)]
            self.runner.run_several(parts)
            self.runner.run_several([self._sum(y[t], bias, y[t]) for y, bias in added])
        return answers

    def _token(self, x: Array, form: int, offset: int) -> tuple[int, int]:
        """The addresses of one token x (d_in,) and of its scales, in one of the forms of numba_dot.py."""
        if form == dots.FLOATS:
            return self.runner.address(x), 0
        token = self.runner.scratch(f"token {form} {offset}", len(x) + 64)
        return token, self.runner.scratch(f"scales {form} {offset}", len(x) + 512)

    def _quantize(self, x: Array, form: int, offset: int, token: int, scales: int) -> TaskCall:
        """The task that writes a token x (d_in,) there."""
        arguments = self.runner.address(x), len(x), form, offset, token, scales
        return dots.quantize_token, -(-len(x) // dots.PART), arguments

    def _dot(self, w: BlockMatrix | FloatMatrix, token: tuple[int, int], y: Array) -> TaskCall:
        """The task y (d_out,) = W x, for one token x (d_in,)."""
        d_out, d_in = w.shape
        extra: tuple[int, ...] = ()
        if isinstance(w, BlockMatrix) and w.task is dots.dot_levels:
            size = 576 * (d_in // (2 * BLOCK) + 1)  # as dot_levels lays it out
            scratch = self.runner.scratch("levels", size * self.threads)
            extra = (w.format.number, int(w.format.sums == "minimum"), scratch, size)
        rows = max(1, min(CHUNK_BYTES // w.row_bytes, -(-d_out // (4 * self.threads))))
        self.runner.keep_alive(w)
        arguments = w.address, w.row_bytes, d_out, d_in, *token, self.runner.address(y), rows, *extra
        return w.task, -(-d_out // rows), arguments

    def _products(self, x: Array, layers: Layers) -> list[Array]:
        """The same for many tokens: x becomes records, once for matrices in a row that want the same."""
        bytes_ = [isinstance(w, BlockMatrix) and LAYOUTS[w.layout].word_bytes == 1 for w, _ in layers]
        apart = self._apart(x) if any(bytes_) else None
        answers: list[Array] = []
        before, records = (-1, -1), 0
        for (w, bias), is_bytes in zip(layers, bytes_, strict=True):
            if isinstance(w, FloatMatrix):
                y = self._multiply_floats(x, w)
                answers.append(y if bias is None else y + bias)
                continue
            kind, parts = (w.layout, w.format.offset), apart if is_bytes else None
            if kind != before:
                before, records = kind, self._records(x, *kind, parts)
            y = self._multiply_blocks(len(x) + (0 if parts is None else len(parts[0])), records, w, bias)
            if parts is not None:
                more = y[len(x) :] if bias is None else y[len(x) :] - bias
                y[parts[0]] += more
            answers.append(y[: len(x)])
        return answers

    def _apart(self, x: Array) -> tuple[Array, Array] | None:
        """Of x (n, d), the rows that have huge numbers (k,): without these, and after that these alone (2 k, d).

        Among numbers rounded to 8 bits, one that is huge takes the digits of its 31 neighbours. LLaMA has such
        numbers, in few tokens and features (Sun et al. 2024, "Massive Activations"): they get a row of their own.
        None if no row has any, and where many rows have: there they are the long tail of all numbers, and a row
        more for each costs more time than it gains.
        """
        (n, d), peaks, step = x.shape, np.empty(len(x), np.float32), max(1, CHUNK_NUMBERS // x.shape[1])
        at = self.runner.address
        self.runner.run(rowwise.outlier_ratio, -(-n // step), at(x), at(peaks), n, d, step)
        rows = np.flatnonzero(peaks > HUGE**2)
        if not 0 < len(rows) <= max(FEW, n // 16):
            return None
        squares = x[rows] ** 2
        usual = squares <= HUGE**2 * squares.mean(axis=1, keepdims=True)  # (k, d)
        return rows, np.concatenate([np.where(usual, x[rows], 0), np.where(usual, 0, x[rows])])

    def _records(self, x: Array, layout: int, offset: int, apart: tuple[Array, Array] | None = None) -> int:
        """The address of x (n, d_in), quantized; rows that come in two parts have the second after all others."""
        columns = LAYOUTS[layout].columns
        if x.shape[1] % columns:
            x = np.pad(x, ((0, 0), (0, -x.shape[1] % columns)))
        n, d = x.shape
        n_groups = -(-(n + (0 if apart is None else len(apart[0]))) // TOKENS)
        records = self.runner.scratch("records", n_groups * (d // columns) * LAYOUTS[layout].x_size)
        scratch, at = self.runner.scratch("rounding", QUANTIZE_ROOM * self.threads), self.runner.address
        self.runner.run(quantize_tokens, n_groups, at(x), n, d, layout, offset, records, scratch, n_groups)
        if apart is not None:
            rows, parts = apart
            places = np.concatenate([rows, np.arange(n, n + len(rows))])
            more = at(parts), len(parts), d, layout, offset, records, scratch, n_groups, at(places)
            self.runner.run(quantize_others, len(parts), *more)
        return records

    def _multiply_blocks(self, n: int, records: int, w: BlockMatrix, bias: Array | None) -> Array:
        """n tokens, already records, @ W^T + bias -> (n, d_out)."""
        d_out, d_in = w.shape
        layout, n_groups = LAYOUTS[w.layout], -(-n // TOKENS)
        n_tiles, tile_size = -(-d_out // ROWS), -(-min(d_in, products.WIDTH) // layout.columns) * layout.w_size
        # Tiles of a panel: at most four, what the cache holds, some panels for each thread; whole SIDES.
        panel = min(TILE_BYTES // tile_size, n_tiles // (4 * self.threads), 4) // SIDES * SIDES or SIDES
        size = panel * tile_size + products.ROOM
        size = -(-size // 64) * 64
        scratch = self.runner.scratch("tiles", size * self.threads)
        bias, at = None if bias is None else self.runner.contiguous(bias), self.runner.address
        y = self.runner.empty(n_groups * TOKENS, -(-n_tiles // SIDES) * SIDES * ROWS)
        self.runner.run(
            products.multiply_blocks, -(-n_tiles // panel),
            w.format.number, w.layout, w.address, w.row_bytes, d_out, d_in, panel,
            records, n_groups, at(y), 4 * y.shape[1], scratch, size,
            0 if bias is None else at(bias),
        )  # fmt: skip
        return y[:n, :d_out]

    def _multiply_floats(self, x: Array, w: FloatMatrix) -> Array:
        """The same in float32."""
        n, (d_out, d_in) = len(x), w.shape
        n_groups, n_chunks, columns = -(-n // FLOAT_TOKENS), -(-d_out // (SIDES * ROWS)), SIDES * ROWS
        if n % FLOAT_TOKENS:
            x = np.pad(x, ((0, -n % FLOAT_TOKENS), (0, 0)))
        y, size = self.runner.empty(n_groups * FLOAT_TOKENS, n_chunks * columns), 4 * columns * d_in
        scratch, at = self.runner.scratch("tiles", size * self.threads), self.runner.address
        self.runner.run(
            products.multiply_floats, n_chunks,
            w.address, d_out, d_in, at(x), n_groups, at(y), 4 * y.shape[1], scratch, size,
        )  # fmt: skip
        return y[:n, :d_out]

    # ---- sums, norms and activations

    def add(self, x: Array, y: Array) -> Array:
        assert x.shape == y.shape
        x, y = self.runner.contiguous(x), self.runner.contiguous(y)
        to = self.runner.empty(*x.shape)
        self.runner.run_several([self._sum(x, y, to)])
        return to

    def _sum(self, x: Array, y: Array, to: Array) -> TaskCall:
        """The task to = x + y, of float32 in a row; ``to`` may be x."""
        step, at = _step(x.size), self.runner.address
        return rowwise.add_arrays, -(-x.size // step), (at(x), at(to), x.size, step, at(y))

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
        task, step = rowwise.ACTIVATIONS[kind], _step(x.size)
        self.runner.run(task, -(-x.size // step), at(x), at(y), x.size, step, at(x))
        return y

    def swiglu(self, gate: Array, up: Array) -> Array:
        gate, up = self.runner.contiguous(gate), self.runner.contiguous(up)
        y, count, step, at = self.runner.empty(*gate.shape), gate.size, _step(gate.size), self.runner.address
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
        few = n <= DOT_TOKENS
        # Heads that share keys go together, unless that leaves too few chunks for the threads.
        heads = n_head // n_head_kv if n_head_kv >= 2 * self.threads else 1
        size = int(attention.token_scratch(d, most, heads) if few else attention.block_scratch(d))
        size = -(-4 * size // 64) * 64
        scratch = self.runner.scratch("attention", size * self.threads)
        task = attention.attend_token if few else attention.attend_block
        n_blocks = -(-n // attention.Q_BLOCK)
        queries = -(-n // (n_blocks * FLOAT_TOKENS)) * FLOAT_TOKENS  # of a block: the last shall not be small
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


def _step(count: int) -> int:
    """Into how large pieces ``count`` numbers are cut: one token's shall be enough for some threads."""
    return CHUNK_NUMBERS if count > 4 * CHUNK_NUMBERS else CHUNK_NUMBERS // 8


def _bits(value: float) -> int:
    """The bits of a float32, as tasks take whole numbers only."""
    return int(BITS.unpack(FLOAT.pack(value))[0])


