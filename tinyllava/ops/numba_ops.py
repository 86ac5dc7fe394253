"""The same operations, faster on the CPU: matrices are multiplied straight from their memory-mapped blocks.

Arrays are NumPy's; what is not overridden here is the reference's own code. Each operation hands a job (team.py)
the addresses of its arrays and a way to cut the work into items.

Where the numbers differ from the reference: against quantized weights, activations are rounded to 8 bits for each
32 of them; against 16-bit floats to 15 bits; keys and values of such models are kept in half precision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tinyllava.ops import Activation, Array, RopeKind
from tinyllava.ops import numba_attention as attention
from tinyllava.ops import numba_dot as dots
from tinyllava.ops import numba_linear as products
from tinyllava.ops import numba_rows as rowwise
from tinyllava.ops.buffers import Buffers
from tinyllava.ops.compiled import Job
from tinyllava.ops.formats import FORMATS
from tinyllava.ops.reference import NumpyOps
from tinyllava.ops.team import Team
from tinyllava.ops.tile import BLOCK, LAYOUTS, ROWS, TOKENS

if TYPE_CHECKING:
    from tinyllava.files.gguf import Tensor
    from tinyllava.ops import Matrix

DOT_TOKENS = 2  # up to this many tokens are multiplied one by one
TILE_BYTES = 400_000  # of a panel's tiles: they stay in the second-level cache (1 MiB a core, and less elsewhere)
ITEM_BYTES = 1 << 16  # of weights that a thread reads at a time when decoding
ITEM_NUMBERS = 1 << 14  # of an array that a thread treats at a time


class BlockMatrix:
    """A weight matrix (d_out, d_in) left in its file: ``raw`` (d_out, row bytes) is a view of the mapping."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.raw: npt.NDArray[np.uint8] = np.ascontiguousarray(tensor.raw)
        self.shape = tuple(tensor.shape)
        self.address, self.row_bytes = self.raw.ctypes.data, self.raw.shape[1]
        self.format = FORMATS[tensor.type]
        keys = [(layout.sums, layout.groups) for layout in LAYOUTS]
        self.layout = keys.index((self.format.sums, self.format.groups))
        self.job, self.form = self._dot(tensor.type, self.shape[1])

    def _dot(self, kind: str, d_in: int) -> tuple[Job, int]:
        """The job for one token, and the form in which it wants it."""
        if kind in ("F16", "BF16"):
            return (dots.dot_f16 if kind == "F16" else dots.dot_bf16), dots.FLOATS
        job, form = dots.JOBS.get(kind, (dots.dot_levels, dots.SIXTEENS))
        if d_in % (2 * BLOCK):  # an odd number of blocks
            return dots.dot_levels, dots.SIXTEENS
        return job, form


class FloatMatrix:
    """A float32 matrix (d_out, d_in), a view of the mapping."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.floats = np.ascontiguousarray(np.asarray(tensor.raw)).view("<f4").reshape(tensor.shape)
        self.shape = tuple(tensor.shape)
        self.address, self.row_bytes = self.floats.ctypes.data, 4 * self.shape[1]
        self.job, self.form = dots.dot_f32, dots.FLOATS


class NumbaOps(NumpyOps):
    """The Numba backend: float32 only."""

    name = "numba"

    def __init__(self, threads: int | None = None) -> None:
        super().__init__("float32", threads)
        self.team = Team(self.threads)
        self._buffers = Buffers()
        self._scratch: dict[str, npt.NDArray[np.uint8]] = {}
        self._half_cache = False

    # ---- weights

    def matrix(self, tensor: Tensor) -> Matrix:
        """Hold a 2-D tensor (d_out, d_in) in its blocks, F32 as a view; what has no kernel as the reference."""
        if tensor.type == "F32":
            return FloatMatrix(tensor)
        self._half_cache = True
        return BlockMatrix(tensor) if tensor.type in FORMATS else super().matrix(tensor)

    def embed(self, table: Matrix, ids: npt.ArrayLike) -> Array:
        if isinstance(table, BlockMatrix | FloatMatrix):
            return table.tensor.rows(np.asarray(ids, dtype=np.int64))
        return super().embed(table, ids)

    def linear(self, x: Array, weight: Matrix, bias: Array | None = None) -> Array:
        if not isinstance(weight, BlockMatrix | FloatMatrix):
            return super().linear(x, weight, bias)
        rows = np.ascontiguousarray(x.reshape(-1, x.shape[-1]), dtype=np.float32)  # (n, d_in)
        if len(rows) <= DOT_TOKENS:
            y = self._buffers.empty(len(rows), weight.shape[0])
            for token, answer in zip(rows, y, strict=True):
                self._dot(token, weight, answer)
        elif isinstance(weight, FloatMatrix):
            y = self._multiply_floats(rows, weight)
        else:
            y = self._multiply_blocks(rows, weight, bias)
            bias = None
        if bias is not None:
            y += bias
        return y.reshape(*x.shape[:-1], weight.shape[0])

    def _dot(self, x: Array, w: BlockMatrix | FloatMatrix, y: Array) -> None:
        """y (d_out,) = W x, for one token x (d_in,)."""
        d_out, d_in = w.shape
        token, scales = x.ctypes.data, 0
        extra: tuple[int, ...] = ()
        if isinstance(w, BlockMatrix) and w.form != dots.FLOATS:
            scales = self._room("scales", d_in + 512)
            token = self._room("token", d_in + 64)
            dots.quantize_token(x.ctypes.data, d_in, w.form, w.format.offset, token, scales)
            if w.job is dots.dot_levels:
                size = 300 * (d_in // BLOCK + 2)  # as dot_levels lays it out
                scratch = self._room("levels", size * self.threads)
                extra = (w.format.number, w.format.groups, int(w.format.sums == "minimum"), scratch, size)
        rows = max(1, min(ITEM_BYTES // w.row_bytes, -(-d_out // (4 * self.threads))))
        self.team.run(
            w.job, -(-d_out // rows),
            w.address, w.row_bytes, d_out, d_in, token, scales, y.ctypes.data, rows, *extra,
        )  # fmt: skip

    def _multiply_blocks(self, x: Array, w: BlockMatrix, bias: Array | None) -> Array:
        """x (n, d_in) @ W^T + bias -> (n, d_out)."""
        n, (d_out, d_in) = len(x), w.shape
        layout, n_records, n_groups = LAYOUTS[w.layout], -(-d_in // BLOCK), -(-n // TOKENS)
        if d_in % BLOCK:
            x = np.pad(x, ((0, 0), (0, -d_in % BLOCK)))
        records = self._room("records", n_groups * n_records * layout.x_size)
        self.team.run(
            products.quantize_tokens, n_groups, x.ctypes.data, n, x.shape[1], w.layout, w.format.offset, records
        )
        n_tiles, tile_size = -(-d_out // ROWS), n_records * layout.w_size
        panel = max(1, min(TILE_BYTES // tile_size, n_tiles // (4 * self.threads), 8))
        size = panel * tile_size + products.ROOM
        size = -(-size // 64) * 64
        scratch = self._room("tiles", size * self.threads)
        bias = None if bias is None else _floats(bias)
        y = self._buffers.empty(n_groups * TOKENS, n_tiles * ROWS)
        self.team.run(
            products.multiply_blocks, -(-n_tiles // panel),
            w.format.number, w.layout, w.address, w.row_bytes, d_out, d_in, panel,
            records, n_groups, y.ctypes.data, 4 * y.shape[1], scratch, size,
            0 if bias is None else bias.ctypes.data,
        )  # fmt: skip
        return y[:n, :d_out]

    def _multiply_floats(self, x: Array, w: FloatMatrix) -> Array:
        """The same in float32."""
        n, (d_out, d_in) = len(x), w.shape
        n_groups, n_tiles, size = -(-n // TOKENS), -(-d_out // ROWS), 4 * ROWS * d_in
        if n % TOKENS:
            x = np.pad(x, ((0, -n % TOKENS), (0, 0)))
        y = self._buffers.empty(n_groups * TOKENS, n_tiles * ROWS)
        scratch = self._room("tiles", size * self.threads)
        self.team.run(
            products.multiply_floats, n_tiles,
            w.address, d_out, d_in, x.ctypes.data, n_groups, y.ctypes.data, 4 * y.shape[1], scratch, size,
        )  # fmt: skip
        return y[:n, :d_out]

    def _room(self, name: str, size: int) -> int:
        """The address of at least ``size`` bytes, on a cache line's start. Used again under the same name."""
        held = self._scratch.get(name)
        if held is None or held.size < size + 64:
            held = self._scratch[name] = np.empty(size + 64, np.uint8)
        address: int = held.ctypes.data
        return -(-address // 64) * 64

    # ---- norms and activations

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        x, w = _floats(x), _floats(weight)
        y, n, d = self._buffers.empty(*x.shape), x.size // x.shape[-1], x.shape[-1]
        step = max(1, ITEM_NUMBERS // d)
        self.team.run(
            rowwise.rms_norm, -(-n // step), x.ctypes.data, w.ctypes.data, y.ctypes.data, n, d, _bits(eps), step
        )
        return y

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        x, w, b = _floats(x), _floats(weight), _floats(bias)
        y, n, d = self._buffers.empty(*x.shape), x.size // x.shape[-1], x.shape[-1]
        step = max(1, ITEM_NUMBERS // d)
        self.team.run(
            rowwise.layer_norm, -(-n // step),
            x.ctypes.data, w.ctypes.data, b.ctypes.data, y.ctypes.data, n, d, _bits(eps), step,
        )  # fmt: skip
        return y

    def activation(self, x: Array, kind: Activation) -> Array:
        x = _floats(x)
        y = self._buffers.empty(*x.shape)
        job = rowwise.ACTIVATIONS[kind]
        self.team.run(job, -(-x.size // ITEM_NUMBERS), x.ctypes.data, y.ctypes.data, x.size, ITEM_NUMBERS)
        return y

    def swiglu(self, gate: Array, up: Array) -> Array:
        gate, up = _floats(gate), _floats(up)
        y, count = self._buffers.empty(*gate.shape), gate.size
        self.team.run(
            rowwise.swiglu, -(-count // ITEM_NUMBERS),
            gate.ctypes.data, y.ctypes.data, count, ITEM_NUMBERS, up.ctypes.data,
        )  # fmt: skip
        return y

    # ---- attention

    def rope(self, x: Array, cos: Array, sin: Array, kind: RopeKind) -> Array:
        x, cos, sin = _floats(x), _floats(cos), _floats(sin)
        y, (n, n_head, d) = self._buffers.empty(*x.shape), x.shape
        step = max(1, ITEM_NUMBERS // (n_head * d))
        self.team.run(
            rowwise.rope, -(-n // step), x.ctypes.data, cos.ctypes.data, sin.ctypes.data, y.ctypes.data,
            n, n_head, d, cos.shape[-1], int(kind == "norm"), step,
        )  # fmt: skip
        return y

    def cache(self, shape: tuple[int, ...]) -> Array:
        """Half precision beside quantized or half-precision weights, as llama.cpp does; float32 beside float32."""
        return np.zeros(shape, np.float16 if self._half_cache else np.float32)

    def attention(self, q: Array, k: Array, v: Array, *, causal: bool) -> Array:
        q, k, v = _floats(q), _rows(k), _rows(v)
        (n, n_head, d), (m, n_head_kv, _) = q.shape, k.shape
        y = self._buffers.empty(*q.shape)
        few = n <= DOT_TOKENS
        size = 4 * (m + 16 + d) if few else 4 * int(attention.scratch_floats(d))
        size = -(-size // 64) * 64
        scratch = self._room("attention", size * self.threads)
        job = attention.attend_token if few else attention.attend_block
        # Heads that share keys go together, unless that leaves too few items for the threads.
        heads = n_head // n_head_kv if n_head_kv >= 2 * self.threads else 1
        n_blocks = -(-n // attention.QUERIES)
        queries = -(-n // (n_blocks * TOKENS)) * TOKENS  # of a block: the last shall not be a small one
        n_items = n * n_head // heads if few else n_head * -(-n // queries)
        self.team.run(
            job, n_items, q.ctypes.data, k.ctypes.data, v.ctypes.data, y.ctypes.data,
            n, n_head, n_head_kv, d, m, int(causal), int(k.dtype == np.float16),
            k.strides[0], k.strides[1], v.strides[0], v.strides[1], scratch, size,
            heads if few else queries,
        )  # fmt: skip
        return y


def _floats(x: Array) -> Array:
    """x as float32, one number after the other."""
    return np.ascontiguousarray(x, dtype=np.float32)


def _rows(x: Array) -> Array:
    """Keys or values with features side by side, in float32 or half precision; copied only if they are not so."""
    if x.dtype not in (np.float16, np.float32) or x.strides[-1] != x.itemsize:
        return _floats(x)
    return x


def _bits(value: float) -> int:
    """The bits of a float32, as jobs take whole numbers only."""
    return int(np.float32(value).view(np.int32))


