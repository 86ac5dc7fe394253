"""linear and linears on the CPU: one or two tokens by GEMV, more by GEMM, straight from the mapped file's blocks.

    up to GEMV_TOKENS tokens   each token is quantized and multiplied by all rows          gemv.py
    more                       outliers get rows of their own (split_outliers); all rows are quantized and packed,
                               once for matrices that want the same; panels of the matrix are packed and multiplied
                                                                                           gemm.py
    float32 weights            the same without quantization

Definition: ops/quantized.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from tinyllava.ops import Array
from tinyllava.ops.cpu import rowwise
from tinyllava.ops.cpu.capture import TaskRunner
from tinyllava.ops.cpu.gemm import GEMM, GEMM_SCRATCH, gemm_f32
from tinyllava.ops.cpu.gemv import GEMV, GEMV_ODD, ODD_BYTES
from tinyllava.ops.cpu.microkernel import BLOCK, LANES, LAYOUTS, MR, NR, NR_F32, VECTORS
from tinyllava.ops.cpu.pack_weights import PACK_COLUMNS, layout_of
from tinyllava.ops.cpu.quantize_activations import (
    FLOAT32,
    QUANTIZE_SCRATCH,
    SCALES_16,
    TOKEN_CHUNK,
    pack_panel,
    pack_row,
    quantize_token,
)
from tinyllava.ops.cpu.thread_pool import TaskCall
from tinyllava.ops.cpu.unpack import FORMATS

if TYPE_CHECKING:
    from tinyllava.files.gguf import Tensor

GEMV_TOKENS = 2  # up to this many tokens are multiplied one by one: two passes over W cost less than packing it
OUTLIER = 20.0  # times the root mean square of its row: a number beyond it is an outlier
OUTLIER_ROWS = 2  # this many rows may be split, or a sixteenth of all if that is more
PANEL_BYTES = 400_000  # of a group of packed panels: they stay in the L2 cache (256 KiB to 2 MiB a core)
CHUNK_BYTES = 1 << 16  # of weights that a thread reads at a time for one token
CHUNK_NUMBERS = 1 << 14  # of an array that a thread treats at a time
PAD_BYTES = 64  # beyond a token's int8, for the block that an odd last one is paired with


class HeldMatrix:
    """A weight matrix (d_out, d_in) left in its file: ``raw`` (d_out, row bytes) is a view of the mapping."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.raw: npt.NDArray[np.uint8] = np.ascontiguousarray(tensor.raw)
        self.shape = tuple(tensor.shape)
        self.address, self.row_bytes = self.raw.ctypes.data, self.raw.shape[1]
        self.format = FORMATS[tensor.type]
        self.has_odd_blocks = self.format.block.block_size == BLOCK and self.shape[1] % (2 * BLOCK) != 0
        self.gemv, layout = (GEMV_ODD[tensor.type], SCALES_16) if self.has_odd_blocks else GEMV[tensor.type]
        self.token_key = layout, self.format.c  # how it wants one token
        self.layout = layout_of(self.format)  # of packed blocks; F32 has none
        self.is_f32 = tensor.type == "F32"

    @property
    def is_int8(self) -> bool:
        """Whether GEMM quantizes activations to int8 for it."""
        return LAYOUTS[self.layout].q_bytes == 1


Layers = list[tuple[HeldMatrix, Array | None]]  # matrices, perhaps with a bias


def linears(run: TaskRunner, x: Array, layers: Layers) -> list[Array]:
    """x (..., d_in) @ W^T + b -> (..., d_out) for each W."""
    rows = run.contiguous(x).reshape(-1, x.shape[-1])  # (n, d_in)
    if len(rows) <= GEMV_TOKENS:
        products = _gemv_all(run, rows, layers)
    else:
        run.abandon_capture()
        products = _gemm_all(run, rows, layers)
    return [y.reshape(*x.shape[:-1], y.shape[-1]) for y in products]


# ---- few tokens


def _gemv_all(run: TaskRunner, x: Array, layers: Layers) -> list[Array]:
    """x (n, d_in) @ W^T + b -> (n, d_out) for each W, one token after the other."""
    products = [run.empty(len(x), w.shape[0]) for w, _ in layers]
    biases = [(y, run.contiguous(b)) for y, (_, b) in zip(products, layers, strict=True) if b is not None]
    for t in range(len(x)):
        keys = {w.token_key for w, _ in layers}  # the layouts in which they want x
        tokens = {key: _token_buffers(run, x[t], *key) for key in sorted(keys)}
        quantized = [item for item in tokens.items() if item[0][0] != FLOAT32]
        run.run_several([_quantize_call(run, x[t], *key, *buffers) for key, buffers in quantized])
        pairs = zip(layers, products, strict=True)
        run.run_several([_gemv_call(run, w, tokens[w.token_key], y[t]) for (w, _), y in pairs])
        run.run_several([sum_call(run, y[t], bias, y[t]) for y, bias in biases])
    return products


def _token_buffers(run: TaskRunner, x: Array, layout: int, c: int) -> tuple[int, int]:
    """The addresses of one token x (d_in,), quantized, and of its scales and sums: d / 4 or d / 2 bytes each."""
    if layout == FLOAT32:
        return run.address(x), 0
    q = run.scratch(f"token {layout} {c}", len(x) + PAD_BYTES)
    return q, run.scratch(f"scales {layout} {c}", len(x) + 512)


def _quantize_call(run: TaskRunner, x: Array, layout: int, c: int, q: int, scales: int) -> TaskCall:
    """The call that quantizes a token x (d_in,)."""
    scratch = run.scratch("quantization", QUANTIZE_SCRATCH * run.pool.size)
    return quantize_token, -(-len(x) // TOKEN_CHUNK), (run.address(x), len(x), layout, c, q, scales, scratch)


def _gemv_call(run: TaskRunner, w: HeldMatrix, token: tuple[int, int], y: Array) -> TaskCall:
    """The call that computes y (d_out,) = W x, for one token x (d_in,)."""
    (d_out, d_in), threads = w.shape, run.pool.size
    more: tuple[int, ...] = ()
    if w.has_odd_blocks:
        size = ODD_BYTES * (d_in // (2 * BLOCK) + 1)
        more = run.scratch("unpacked rows", size * threads), size
    rows = max(1, min(CHUNK_BYTES // w.row_bytes, -(-d_out // (4 * threads))))  # of a chunk
    run.keep_alive(w)
    return w.gemv, -(-d_out // rows), (w.address, w.row_bytes, d_out, d_in, *token, run.address(y), rows, *more)


def sum_call(run: TaskRunner, x: Array, y: Array, to: Array) -> TaskCall:
    """The call that computes to = x + y, of contiguous float32; ``to`` may be x."""
    step = chunk_size(x.size)
    return rowwise.add_arrays, -(-x.size // step), (run.address(x), run.address(to), x.size, step, run.address(y))


def chunk_size(count: int) -> int:
    """How many of ``count`` numbers a chunk has. Small arrays have smaller ones, so that all threads have work."""
    return CHUNK_NUMBERS if count > 4 * CHUNK_NUMBERS else CHUNK_NUMBERS // 8


# ---- many tokens


class Outliers(NamedTuple):
    """Rows of x that have outliers (k,): first without these, and after that these alone (2 k, d)."""

    rows: Array
    usual_then_outliers: Array


def _gemm_all(run: TaskRunner, x: Array, layers: Layers) -> list[Array]:
    """x (n, d_in) @ W^T + b -> (n, d_out) for each W."""
    outliers = split_outliers(run, x) if any(w.is_int8 for w, _ in layers) else None
    products: list[Array] = []
    packed_for, packed = (-1, -1), 0
    for w, bias in layers:
        if w.is_f32:
            y = _gemm_f32(run, x, w)
            products.append(y if bias is None else y + bias)
            continue
        wanted, split = (w.layout, w.format.c), outliers if w.is_int8 else None
        if wanted != packed_for:
            packed_for, packed = wanted, _pack(run, x, *wanted, split)
        y = _gemm(run, len(x) + (0 if split is None else len(split.rows)), packed, w, bias)
        if split is not None:  # a row's product is that of its usual numbers and that of its outliers
            more = y[len(x) :] if bias is None else y[len(x) :] - bias
            y[split.rows] += more
        products.append(y[: len(x)])
    return products


def split_outliers(run: TaskRunner, x: Array) -> Outliers | None:
    """The outliers of x (n, d), or None if no row has any.

    Among 32 numbers quantized to 8 bits with one scale, an outlier takes the digits of its 31 neighbours. LLaMA
    has such activations, in few tokens and features (Sun et al. 2024, "Massive Activations"), so they are
    multiplied in a row of their own (cf. Dettmers et al. 2022, "LLM.int8()"). Where many rows have some it is
    None, too: there they are the long tail of all numbers, and a row more for each costs more time than it gains.
    """
    (n, d), ratios, step = x.shape, np.empty(len(x), np.float32), max(1, CHUNK_NUMBERS // x.shape[1])
    run.run(rowwise.outlier_ratio, -(-n // step), run.address(x), run.address(ratios), n, d, step)
    rows = np.flatnonzero(ratios > OUTLIER**2)
    if not 0 < len(rows) <= max(OUTLIER_ROWS, n // 16):
        return None
    squares = x[rows] ** 2
    usual = squares <= OUTLIER**2 * squares.mean(axis=1, keepdims=True)  # (k, d)
    return Outliers(rows, np.concatenate([np.where(usual, x[rows], 0), np.where(usual, 0, x[rows])]))


def _pack(run: TaskRunner, x: Array, layout: int, c: int, outliers: Outliers | None) -> int:
    """The address of x (n, d_in), quantized and packed; outliers' rows come after the n tokens."""
    columns = LAYOUTS[layout].columns
    if x.shape[1] % columns:
        x = np.pad(x, ((0, 0), (0, -x.shape[1] % columns)))
    (n, d), at = x.shape, run.address
    n_panels = -(-(n + (0 if outliers is None else len(outliers.rows))) // NR)
    packed = run.scratch("packed activations", n_panels * (d // columns) * LAYOUTS[layout].x_size)
    scratch = run.scratch("quantization", QUANTIZE_SCRATCH * run.pool.size)
    run.run(pack_panel, n_panels, at(x), n, d, layout, c, packed, n_panels, scratch)
    if outliers is not None:
        rows, parts = outliers
        tokens = np.concatenate([rows, np.arange(n, n + len(rows))])
        run.run(pack_row, len(parts), at(parts), at(tokens), d, layout, c, packed, n_panels, scratch)
    return packed


def _gemm(run: TaskRunner, n: int, packed: int, w: HeldMatrix, bias: Array | None) -> Array:
    """n packed tokens @ W^T + bias -> (n, d_out)."""
    (d_out, d_in), threads, layout = w.shape, run.pool.size, LAYOUTS[w.layout]
    n_panels, w_panels = -(-n // NR), -(-d_out // LANES)
    panel_bytes = -(-min(d_in, PACK_COLUMNS) // layout.columns) * layout.w_size
    # Panels of a chunk: at most four, what the cache holds, some chunks for each thread; a multiple of VECTORS.
    per_chunk = min(PANEL_BYTES // panel_bytes, w_panels // (4 * threads), 4) // VECTORS * VECTORS or VECTORS
    size = -(-(per_chunk * panel_bytes + GEMM_SCRATCH) // 64) * 64
    scratch = run.scratch("packed weights", size * threads)
    bias, at = None if bias is None else run.contiguous(bias), run.address
    y = run.empty(n_panels * NR, -(-w_panels // VECTORS) * MR)
    run.run(
        GEMM[w.format.block.name], -(-w_panels // per_chunk),
        w.address, w.row_bytes, d_out, d_in, per_chunk, packed, n_panels, at(y), 4 * y.shape[1], scratch, size,
        0 if bias is None else at(bias),
    )  # fmt: skip
    return y[:n, :d_out]


def _gemm_f32(run: TaskRunner, x: Array, w: HeldMatrix) -> Array:
    """x (n, d_in) @ W^T -> (n, d_out) in float32."""
    n, (d_out, d_in) = len(x), w.shape
    n_panels, n_chunks = -(-n // NR_F32), -(-d_out // MR)
    if n % NR_F32:
        x = np.pad(x, ((0, -n % NR_F32), (0, 0)))
    y, size = run.empty(n_panels * NR_F32, n_chunks * MR), 4 * MR * d_in
    scratch, at = run.scratch("packed weights", size * run.pool.size), run.address
    run.run(gemm_f32, n_chunks, w.address, d_out, d_in, at(x), n_panels, at(y), 4 * y.shape[1], scratch, size)
    return y[:n, :d_out]
