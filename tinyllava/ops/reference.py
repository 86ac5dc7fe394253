"""Every operation in plain NumPy: the definition, and the oracle that faster backends are held to.

Computes in float32, or in float64 on request: float64 is the truth that float32 errors are measured against.
Letters in the shapes: n tokens, d features, h heads, g kv heads, k head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tinyllava.ops import Activation, Array, Position, RopeKind
from tinyllava.ops.threads import limit_blas, physical_cores

if TYPE_CHECKING:
    from tinyllava.files.gguf import Tensor
    from tinyllava.ops import Matrix, Ops

KEEP_BYTES = 1 << 30  # matrices up to this total are kept as floats; others are dequantized at each use
SCORE_ELEMENTS = 1 << 22  # the largest attention score matrix held at once (16 MiB in float32)
ROW_ELEMENTS = 1 << 22  # the largest piece of a matrix dequantized at once


class DenseMatrix:
    """A weight matrix (d_out, d_in) on its tensor; ``floats`` once dequantized for good, if it ever is."""

    def __init__(self, tensor: Tensor, floats: Array | None) -> None:
        self.tensor = tensor
        self.floats = floats

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)


class Place:
    """A position: how many of ``limit`` places are filled."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.value = 0


class NumpyOps:
    """The reference backend. ``threads`` bounds NumPy's matrix products, in the whole process (see threads.py)."""

    name = "numpy"
    batch = 512

    def __init__(self, dtype: str = "float32", threads: int | None = None) -> None:
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self.threads = threads or physical_cores()
        limit_blas(self.threads)
        self._kept_bytes = 0

    def layer(self, i: int) -> Ops:  # noqa: ARG002 (split.py's is used)
        """The backend of the language model's block ``i``."""
        return self

    def to_layer(self, i: int | None, x: Array) -> Array:  # noqa: ARG002
        """x in the arrays of block ``i``'s backend."""
        return x

    # ---- between the file, NumPy and the backend

    def matrix(self, tensor: Tensor) -> Matrix:
        """Hold a 2-D tensor (d_out, d_in). Small models become floats once; large ones stay in blocks."""
        nbytes = tensor.n_elements * self.dtype.itemsize
        if self._kept_bytes + nbytes > KEEP_BYTES:
            return DenseMatrix(tensor, None)
        self._kept_bytes += nbytes
        return DenseMatrix(tensor, tensor.dequantize().astype(self.dtype, copy=False))

    def vector(self, tensor: Tensor) -> Array:
        """A tensor of any shape as floats."""
        return tensor.dequantize().astype(self.dtype, copy=False)

    def array(self, values: npt.ArrayLike) -> Array:
        return np.asarray(values, dtype=self.dtype)

    def numpy(self, values: Array) -> Array:
        return values

    def zeros(self, shape: tuple[int, ...]) -> Array:
        """Zeros whose memory the system hands out only as it is written (calloc)."""
        return np.zeros(shape, self.dtype)

    def cache(self, shape: tuple[int, ...]) -> Array:
        """Zeros that will hold keys or values. A backend may keep them in half precision."""
        return self.zeros(shape)

    # ---- places in a sequence, and steps that are taken again and again

    def position(self, limit: int) -> Position:
        """A sequence of at most ``limit`` places, none of them filled."""
        return Place(limit)

    def advance(self, position: Position, n: int) -> None:
        """Count n more places as filled, or -n fewer."""
        position.value += n

    def slice_at(self, table: Array, start: Position, n: int) -> Array:
        """The rows of a table (limit, ...) that belong to the next n places -> (n, ...)."""
        return table[start.value : start.value + n]

    def append_kv(
        self, held: tuple[Array, Array], rows: tuple[Array, Array], start: Position
    ) -> tuple[Array, Array]:
        """Write the rows (n, g, k) of the next n places into what is held (g, limit, k), for keys and for values.

        Returns all that is held then, (start + n, g, k) each: views. ``start`` stays where it is.
        """
        stop = start.value + len(rows[0])
        for memory, new in zip(held, rows, strict=True):
            memory[:, start.value : stop] = new.transpose(1, 0, 2)  # (g, n, k)
        k, v = (memory[:, :stop].transpose(1, 0, 2) for memory in held)
        return k, v

    def capture(self, step: Callable[[Any], Array]) -> Callable[[Any], Array]:
        """``step``, or what does the same faster when called often, each time with as many ids or numbers.

        Whatever else ``step`` uses must stay in place; of what changes, only positions may. It does all its work
        by operations, and between them only takes views. ``step`` may be given the backend's own array in place of
        a list or of NumPy's. The answer is good until the next call.
        """
        return step

    # ---- weights

    def embed(self, table: Matrix, ids: npt.ArrayLike) -> Array:
        """Rows ``ids`` (n,) of the table (n_vocab, d) -> (n, d)."""
        assert isinstance(table, DenseMatrix)
        index = np.asarray(ids, dtype=np.int64)
        if table.floats is not None:
            return np.asarray(table.floats[index])
        return table.tensor.rows(index).astype(self.dtype, copy=False)

    def linear(self, x: Array, weight: Matrix, bias: Array | None = None) -> Array:
        """x (n, d_in) @ W^T + b -> (n, d_out), for W (d_out, d_in)."""
        assert isinstance(weight, DenseMatrix)
        if weight.floats is not None:
            y = x @ weight.floats.T  # (n, d_out)
        else:
            y = np.empty((*x.shape[:-1], weight.shape[0]), self.dtype)
            step = max(1, ROW_ELEMENTS // weight.shape[1])
            for start in range(0, weight.shape[0], step):
                rows = np.arange(start, min(start + step, weight.shape[0]))
                y[..., rows] = x @ weight.tensor.rows(rows).astype(self.dtype, copy=False).T
        return y if bias is None else y + bias

    def linears(self, x: Array, *layers: tuple[Matrix, Array | None]) -> list[Array]:
        """``linear`` of the same x with each (weight, bias): one operation, so that work can be shared."""
        return [self.linear(x, weight, bias) for weight, bias in layers]

    # ---- sums, norms and activations

    def add(self, x: Array, y: Array) -> Array:
        """x + y, of the same shape."""
        return x + y

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis (Ba et al. 2016)."""
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = (centred * centred).mean(axis=-1, keepdims=True)
        return np.asarray(centred / np.sqrt(variance + eps) * weight + bias)

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich 2019)."""
        mean_square = (x * x).mean(axis=-1, keepdims=True)
        return np.asarray(x / np.sqrt(mean_square + eps) * weight)

    def activation(self, x: Array, kind: Activation) -> Array:
        """The activation ``kind``, element by element.

        gelu_erf    x Phi(x), Phi the normal distribution function     (Hendrycks and Gimpel 2016)
        gelu_tanh   the same paper's tanh approximation                 (what ggml computes for GELU)
        gelu_quick  x sigmoid(1.702 x)                                  (CLIP's QuickGELU)
        silu        x sigmoid(x)
        """
        if kind == "gelu_erf":
            return 0.5 * x * (1.0 + erf(x / math.sqrt(2.0)))
        if kind == "gelu_tanh":
            return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)))
        return x * sigmoid(1.702 * x if kind == "gelu_quick" else x)

    def swiglu(self, gate: Array, up: Array) -> Array:
        """silu(gate) * up (Shazeer 2020)."""
        return gate * sigmoid(gate) * up

    # ---- attention

    def rope(self, x: Array, cos: Array, sin: Array, kind: RopeKind) -> Array:
        """Rotate pairs of features by the angles of each position (Su et al. 2021, section 3.2.2).

        x (n, h, k); cos, sin (n, r/2) rotate the first r <= k features of each head. "norm" pairs the
        neighbours (0, 1), (2, 3), ...; "neox" pairs the halves (0, r/2), (1, r/2 + 1), ...: the same
        rotation of permuted features, and GGUF files permute wq and wk according to their architecture.
        """
        half = cos.shape[-1]
        first, second = pairs(kind, half)
        a, b = x[..., first], x[..., second]  # (n, h, r/2) each
        cos, sin = cos[:, None, :], sin[:, None, :]  # (n, 1, r/2): the same for every head
        y = x.copy()
        y[..., first] = a * cos - b * sin
        y[..., second] = a * sin + b * cos
        return y

    def attention_weights(self, q: Array, k: Array, *, causal: bool) -> Array:
        """softmax(q k^T / sqrt(head_dim)): q (n, h, k), k (m, g, k) -> (h, n, m); h a multiple of g.

        Head i reads kv head i // (h / g) (grouped-query attention, Ainslie et al. 2023). When causal, the
        n queries are the last n of the m positions, and each sees itself and what is before it.
        """
        n, n_head, head_dim = q.shape
        m, n_head_kv, _ = k.shape
        q_groups = q.transpose(1, 0, 2).reshape(n_head_kv, -1, head_dim)  # (g, h/g * n, k)
        scores = q_groups @ k.transpose(1, 2, 0)  # (g, h/g * n, m)
        scores = scores.reshape(n_head, n, m) / math.sqrt(head_dim)
        if causal:
            visible = np.arange(m) <= np.arange(m - n, m)[:, None]  # (n, m)
            scores = np.where(visible, scores, -np.inf)
        return softmax(scores)

    def attention(self, q: Array, k: Array, v: Array, *, causal: bool) -> Array:
        """attention_weights(q, k) @ v: q (n, h, k), k and v (m, g, k) -> (n, h, k).

        Works through the queries in pieces, so the scores in memory stay bounded however long the prompt.
        """
        n, n_head, head_dim = q.shape
        m, n_head_kv, _ = k.shape
        y = np.empty_like(q)
        step = max(1, SCORE_ELEMENTS // (n_head * m))
        for start in range(0, n, step):
            stop = min(start + step, n)
            seen = m - n + stop if causal else m  # keys after this piece's last query are invisible to it
            weights = self.attention_weights(q[start:stop], k[:seen], causal=causal)  # (h, piece, seen)
            groups = weights.reshape(n_head_kv, -1, seen)  # (g, h/g * piece, seen)
            mixed = groups @ v[:seen].transpose(1, 0, 2)  # (g, h/g * piece, k)
            y[start:stop] = mixed.reshape(n_head, stop - start, head_dim).transpose(1, 0, 2)
        return y


def pairs(kind: RopeKind, half: int) -> tuple[slice, slice]:
    """The features that RoPE turns together: the first and the second members of ``half`` pairs."""
    if kind == "norm":
        return slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    return slice(0, half), slice(half, 2 * half)


def softmax(x: Array) -> Array:
    """exp(x) / sum(exp(x)) over the last axis; less the maximum, so that exp cannot overflow."""
    y = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(y / y.sum(axis=-1, keepdims=True))


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), by tanh so that exp cannot overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def erf(x: Array) -> Array:
    """The error function, which NumPy lacks.

    math.erf is exact to the last digit or so but takes one number at a time; a projector's 576 x 4096
    values cost it about 0.2 s, and cpu/rowwise.py does the same in compiled code.
    """
    return np.fromiter(map(math.erf, x.ravel().tolist()), x.dtype, x.size).reshape(x.shape)
