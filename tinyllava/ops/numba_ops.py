"""The same operations, faster on the CPU: matrices are multiplied straight from their memory-mapped blocks.

Arrays are NumPy's; what is not overridden here is the reference's own code. Each operation hands a job (team.py)
the addresses of its arrays and a way to cut the work into items.

Where the numbers differ from the reference: against quantized weights, activations are rounded to 8 bits for each
32 of them; against 16-bit floats to 14 bits; keys and values of such models are kept in half precision.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tinyllava.ops import Activation, Array, RopeKind
from tinyllava.ops import numba_attention as attention
from tinyllava.ops import numba_dot as dots
from tinyllava.ops import numba_linear as products
from tinyllava.ops import numba_rows as rowwise
from tinyllava.ops.buffers import Buffers
from tinyllava.ops.formats import FORMATS
from tinyllava.ops.numba_matrix import BlockMatrix, FloatMatrix, address, floats
from tinyllava.ops.reference import NumpyOps
from tinyllava.ops.simd import HARDWARE_HALF
from tinyllava.ops.team import Part, Team
from tinyllava.ops.tile import BLOCK, LAYOUTS, ROWS, TOKENS

if TYPE_CHECKING:
    from tinyllava.files.gguf import Tensor
    from tinyllava.ops import Matrix, Position

HUGE = 20.0  # times the root mean square of its row: a number that is multiplied apart from the others
FEW = 2  # rows that may have one, or a sixteenth of all
DOT_TOKENS = 2  # up to this many tokens are multiplied one by one
TILE_BYTES = 400_000  # of a panel's tiles: they stay in the second-level cache (1 MiB a core, and less elsewhere)
ITEM_BYTES = 1 << 16  # of weights that a thread reads at a time when decoding
ITEM_NUMBERS = 1 << 14  # of an array that a thread treats at a time
FLOAT, BITS = struct.Struct("f"), struct.Struct("i")

Pair = tuple[Array, Array]  # keys and values
Layers = list[tuple[BlockMatrix | FloatMatrix, Array | None]]  # matrices, perhaps with a bias
Token = tuple[int, int]  # how one token is written: numba_dot.py's form, and the constant c


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

    def vector(self, tensor: Tensor) -> Array:
        return np.array(super().vector(tensor))  # one's own: floats() and address() take the short way

    def embed(self, table: Matrix, ids: npt.ArrayLike) -> Array:
        if isinstance(table, BlockMatrix | FloatMatrix):
            return table.tensor.rows(np.asarray(ids, dtype=np.int64))
        return super().embed(table, ids)

    def linear(self, x: Array, weight: Matrix, bias: Array | None = None) -> Array:
        if not isinstance(weight, BlockMatrix | FloatMatrix):
            return super().linear(x, weight, bias)
        return self._multiply(x, [(weight, bias)])[0]

    def linears(self, x: Array, *layers: tuple[Matrix, Array | None]) -> list[Array]:
        """What has to be done to x is done once; one token meets all matrices in one job."""
        known = [(w, bias) for w, bias in layers if isinstance(w, BlockMatrix | FloatMatrix)]
        return self._multiply(x, known) if len(known) == len(layers) else super().linears(x, *layers)

    def _multiply(self, x: Array, layers: Layers) -> list[Array]:
        """x (..., d_in) @ W^T + b -> (..., d_out) for each W."""
        rows = floats(x.reshape(-1, x.shape[-1]))  # (n, d_in)
        answers = self._dots(rows, layers) if len(rows) <= DOT_TOKENS else self._in_two_parts(rows, layers)
        return [y.reshape(*x.shape[:-1], y.shape[-1]) for y in answers]

    def _in_two_parts(self, x: Array, layers: Layers) -> list[Array]:
        """x (n, d_in) @ W^T + b -> (n, d_out) for each W; rows with huge numbers as the sum of two rows.

        Among numbers rounded to 8 bits, one that is huge takes the digits of its 31 neighbours. LLaMA has such
        numbers, in few tokens and features (Sun et al. 2024, "Massive Activations"): they get a row of their own.
        Where many rows have one, they are the long tail of all numbers: that costs more time than it gains.
        """
        if not any(isinstance(w, BlockMatrix) and LAYOUTS[w.layout].word_bytes == 1 for w, _ in layers):
            return self._products(x, layers)
        (n, d), peaks, step = x.shape, np.empty(len(x), np.float32), max(1, ITEM_NUMBERS // x.shape[1])
        self.team.run(rowwise.peaks, -(-n // step), address(x), address(peaks), n, d, step)
        rows = np.flatnonzero(peaks > HUGE**2)
        if not 0 < len(rows) <= max(FEW, n // 16):
            return self._products(x, layers)
        x = np.concatenate([x, x[rows]])  # (n + n_rows, d_in)
        usual = x[n:] ** 2 <= HUGE**2 * np.mean(x[n:] ** 2, axis=1, keepdims=True)  # (n_rows, d_in)
        x[n:][usual] = 0  # the huge numbers alone
        x[rows] -= x[n:]
        without_bias: Layers = [(w, None) for w, _ in layers]
        answers = []
        for y, (_, bias) in zip(self._products(x, without_bias), layers, strict=True):
            y[rows] += y[n:]
            answers.append(y[:n] if bias is None else y[:n] + bias)
        return answers

    def _dots(self, x: Array, layers: Layers) -> list[Array]:
        """x (n, d_in) @ W^T + b -> (n, d_out) for each W, one token after the other."""
        answers = [self._buffers.empty(len(x), w.shape[0]) for w, _ in layers]
        for t in range(len(x)):
            tokens: dict[Token, tuple[int, int]] = {}  # x in the forms that the matrices ask for
            self.team.run_several(
                [self._dot(x[t], w, tokens, y[t]) for (w, _), y in zip(layers, answers, strict=True)]
            )
        for (_, bias), y in zip(layers, answers, strict=True):
            if bias is not None:
                y += bias
        return answers

    def _dot(self, x: Array, w: BlockMatrix | FloatMatrix, tokens: dict[Token, tuple[int, int]], y: Array) -> Part:
        """The job y (d_out,) = W x, for one token x (d_in,)."""
        d_out, d_in = w.shape
        if w.token not in tokens:
            tokens[w.token] = self._token(x, *w.token)
        extra: tuple[int, ...] = ()
        if isinstance(w, BlockMatrix) and w.job is dots.dot_levels:
            size = 300 * (d_in // BLOCK + 2)  # as dot_levels lays it out
            scratch = self._room("levels", size * self.threads)
            extra = (w.format.number, w.format.groups, int(w.format.sums == "minimum"), scratch, size)
        rows = max(1, min(ITEM_BYTES // w.row_bytes, -(-d_out // (4 * self.threads))))
        arguments = w.address, w.row_bytes, d_out, d_in, *tokens[w.token], address(y), rows, *extra
        return w.job, -(-d_out // rows), arguments

    def _token(self, x: Array, form: int, offset: int) -> tuple[int, int]:
        """The addresses of one token x (d_in,) and of its scales, in one of the forms of numba_dot.py."""
        if form == dots.FLOATS:
            return address(x), 0
        scales = self._room(f"scales {form} {offset}", len(x) + 512)
        token = self._room(f"token {form} {offset}", len(x) + 64)
        dots.quantize_token(address(x), len(x), form, offset, token, scales)
        return token, scales

    def _products(self, x: Array, layers: Layers) -> list[Array]:
        """The same for many tokens: x becomes records, once for matrices in a row that want the same."""
        answers: list[Array] = []
        before, records = (-1, -1), 0
        for w, bias in layers:
            if isinstance(w, FloatMatrix):
                y = self._multiply_floats(x, w)
                answers.append(y if bias is None else y + bias)
                continue
            kind = w.layout, w.format.offset
            if kind != before:
                before, records = kind, self._records(x, *kind)
            answers.append(self._multiply_blocks(len(x), records, w, bias))
        return answers

    def _records(self, x: Array, layout: int, offset: int) -> int:
        """The address of x (n, d_in), quantized."""
        columns = LAYOUTS[layout].columns
        if x.shape[1] % columns:
            x = np.pad(x, ((0, 0), (0, -x.shape[1] % columns)))
        (n, d), n_groups = x.shape, -(-len(x) // TOKENS)
        records = self._room("records", n_groups * (d // columns) * LAYOUTS[layout].x_size)
        self.team.run(products.quantize_tokens, n_groups, address(x), n, d, layout, offset, records)
        return records

    def _multiply_blocks(self, n: int, records: int, w: BlockMatrix, bias: Array | None) -> Array:
        """n tokens, already records, @ W^T + bias -> (n, d_out)."""
        d_out, d_in = w.shape
        layout, n_groups = LAYOUTS[w.layout], -(-n // TOKENS)
        n_tiles, tile_size = -(-d_out // ROWS), -(-min(d_in, products.SLICE) // layout.columns) * layout.w_size
        panel = max(1, min(TILE_BYTES // tile_size, n_tiles // (4 * self.threads), 8))
        size = panel * tile_size + products.ROOM
        size = -(-size // 64) * 64
        scratch = self._room("tiles", size * self.threads)
        bias = None if bias is None else floats(bias)
        y = self._buffers.empty(n_groups * TOKENS, n_tiles * ROWS)
        self.team.run(
            products.multiply_blocks, -(-n_tiles // panel),
            w.format.number, w.layout, w.address, w.row_bytes, d_out, d_in, panel,
            records, n_groups, address(y), 4 * y.shape[1], scratch, size,
            0 if bias is None else address(bias),
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
            w.address, d_out, d_in, address(x), n_groups, address(y), 4 * y.shape[1], scratch, size,
        )  # fmt: skip
        return y[:n, :d_out]

    def _room(self, name: str, size: int) -> int:
        """The address of at least ``size`` bytes, on a cache line's start. Used again under the same name."""
        held = self._scratch.get(name)
        if held is None or held.size < size + 64:
            held = self._scratch[name] = np.empty(size + 64, np.uint8)
        return -(-address(held) // 64) * 64

    # ---- sums, norms and activations

    def add(self, x: Array, y: Array) -> Array:
        assert x.shape == y.shape
        x, y = floats(x), floats(y)
        to, step = self._buffers.empty(*x.shape), _step(x.size)
        self.team.run(rowwise.add, -(-x.size // step), address(x), address(to), x.size, step, address(y))
        return to

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        x, w = floats(x), floats(weight)
        y, n, d = self._buffers.empty(*x.shape), x.size // x.shape[-1], x.shape[-1]
        step = max(1, ITEM_NUMBERS // d)
        self.team.run(
            rowwise.rms_norm, -(-n // step), address(x), address(w), address(y), n, d, _bits(eps), step
        )
        return y

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        x, w, b = floats(x), floats(weight), floats(bias)
        y, n, d = self._buffers.empty(*x.shape), x.size // x.shape[-1], x.shape[-1]
        step = max(1, ITEM_NUMBERS // d)
        self.team.run(
            rowwise.layer_norm, -(-n // step),
            address(x), address(w), address(b), address(y), n, d, _bits(eps), step,
        )  # fmt: skip
        return y

    def activation(self, x: Array, kind: Activation) -> Array:
        x = floats(x)
        y = self._buffers.empty(*x.shape)
        job, step = rowwise.ACTIVATIONS[kind], _step(x.size)
        self.team.run(job, -(-x.size // step), address(x), address(y), x.size, step)
        return y

    def swiglu(self, gate: Array, up: Array) -> Array:
        gate, up = floats(gate), floats(up)
        y, count, step = self._buffers.empty(*gate.shape), gate.size, _step(gate.size)
        self.team.run(
            rowwise.swiglu, -(-count // step), address(gate), address(y), count, step, address(up)
        )
        return y

    # ---- attention

    def rope(self, x: Array, cos: Array, sin: Array, kind: RopeKind) -> Array:
        x, cos, sin = floats(x), floats(cos), floats(sin)
        y, (n, n_head, d) = self._buffers.empty(*x.shape), x.shape
        step = max(1, ITEM_NUMBERS // (n_head * d))
        self.team.run(
            rowwise.rope, -(-n // step), address(x), address(cos), address(sin), address(y),
            n, n_head, d, cos.shape[-1], int(kind == "norm"), step,
        )  # fmt: skip
        return y

    def cache(self, shape: tuple[int, ...]) -> Array:
        """Half precision beside quantized or half-precision weights, as llama.cpp does; float32 beside float32."""
        return np.zeros(shape, np.float16 if self._half_cache else np.float32)

    def extend(self, held: Pair, rows: Pair, start: Position) -> Pair:
        """NumPy takes 10 ns to make a number half as long; a vector instruction, less than one."""
        if held[0].dtype != np.float16 or not HARDWARE_HALF:
            return super().extend(held, rows, start)
        (n, n_head, d), limit, first = rows[0].shape, held[0].shape[1], start.value
        k, v = floats(rows[0]), floats(rows[1])
        step = max(1, ITEM_NUMBERS // (n_head * d))
        self.team.run(
            rowwise.keep_rows, 2 * -(-n // step), address(k), address(v), address(held[0]), address(held[1]),
            n, n_head, d, limit, first, step,
        )  # fmt: skip
        stop = first + n
        return held[0][:, :stop].transpose(1, 0, 2), held[1][:, :stop].transpose(1, 0, 2)

    def attention(self, q: Array, k: Array, v: Array, *, causal: bool) -> Array:
        q, k, v = floats(q), _rows(k), _rows(v)
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
            job, n_items, address(q), address(k), address(v), address(y),
            n, n_head, n_head_kv, d, m, int(causal), int(k.dtype == np.float16),
            k.strides[0], k.strides[1], v.strides[0], v.strides[1], scratch, size,
            heads if few else queries,
        )  # fmt: skip
        return y


def _step(count: int) -> int:
    """Into how large pieces ``count`` numbers are cut: one token's shall be enough for some threads."""
    return ITEM_NUMBERS if count > 4 * ITEM_NUMBERS else ITEM_NUMBERS // 8


def _rows(x: Array) -> Array:
    """Keys or values with features side by side, in float32 or half precision; copied only if they are not so."""
    if x.dtype not in (np.float16, np.float32) or x.strides[-1] != x.itemsize:
        return floats(x)
    return x


def _bits(value: float) -> int:
    """The bits of a float32, as jobs take whole numbers only."""
    return int(BITS.unpack(FLOAT.pack(value))[0])


