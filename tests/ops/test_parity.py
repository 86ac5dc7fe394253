"""Every operation on every backend against the reference in float64; each tolerance has its reason."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest

from tinyllava.errors import UsageError
from tinyllava.ops import BACKENDS, Ops, select
from tinyllava.ops.formats import FORMATS as LEVELS
from tinyllava.ops.formats import levels_row
from tinyllava.quant.blocks import TYPES, dequantize

RNG = np.random.default_rng(2024)

# Relative 2-norm of the error against float64 on the same weights.
TOLERANCE = {
    "embed": 0.0,  # a copy of dequantized rows
    "linear": 1e-6,  # sums of 512 products in float32, in any order
    "linear of words": 2e-4,  # numbers rounded to 2^-13 of the largest of 32, or a little less
    "linear of bytes": 1.2e-2,  # activations rounded to 2^-8 of the largest of 32, about 0.5% of a usual one
    "layer_norm": 1e-6,  # mean and variance in float32
    "rms_norm": 1e-6,
    "activation": 1e-6,  # one rounding of exp, tanh or erf
    "swiglu": 1e-6,
    "rope": 1e-6,
    "attention": 2e-6,  # an exp and two sums
    "attention_weights": 2e-6,
}

# Formats that a backend multiplies in its own way: one each with a kernel, and one that falls back.
FORMATS = ("F32", *LEVELS, "IQ4_NL", "IQ2_XS")


def tensor(kind: str, d_out: int, d_in: int) -> Any:
    """Stands in for files.gguf.Tensor: random weights of about unit size in blocks of the given format."""
    block = TYPES[kind]
    values = RNG.standard_normal((d_out, d_in)).astype(np.float32)
    try:
        raw = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind]).view(np.uint8)
    except NotImplementedError:  # gguf cannot write it: random bytes with small scales
        raw = RNG.integers(0, 256, (d_out, d_in // block.block_size, block.nbytes), dtype=np.uint8)
        for name, dtype, *_ in block.fields:
            if dtype == "<f2":
                at = block.offset(name)
                raw[:, :, at : at + 2] = np.array([0.01], np.float16).view(np.uint8)
        raw = raw.reshape(d_out, -1)
    raw = raw.reshape(d_out, -1)
    floats = dequantize(kind, raw)
    return SimpleNamespace(
        name=kind,
        type=kind,
        shape=(d_out, d_in),
        n_elements=d_out * d_in,
        raw=raw,
        dequantize=lambda dtype=np.float32: floats.astype(dtype),
        rows=lambda ids, dtype=np.float32: floats[np.asarray(ids)].astype(dtype),
    )


def close(op: str, found: np.ndarray, truth: np.ndarray) -> None:
    assert found.shape == truth.shape
    assert np.linalg.norm(found - truth) <= TOLERANCE[op] * np.linalg.norm(truth)


def kind_of_linear(kind: str, ops: Ops) -> str:
    """Which tolerance a product with weights of a format has."""
    if ops.name == "numpy" or kind not in LEVELS:
        return "linear"
    return "linear of bytes" if LEVELS[kind].sums else "linear of words"


@pytest.fixture(params=[(b, t) for b in BACKENDS for t in (1, 3)], ids=lambda p: f"{p[0]}-{p[1]}")
def ops(request: pytest.FixtureRequest) -> Ops:
    return select(request.param[0], threads=request.param[1])


TRUTH = select("numpy", dtype="float64")


@pytest.mark.parametrize("n", [1, 3, 40])
@pytest.mark.parametrize("kind", FORMATS)
def test_linear(kind: str, n: int, ops: Ops) -> None:
    weight, x = tensor(kind, 37, 512), RNG.standard_normal((n, 512)).astype(np.float32)
    bias = RNG.standard_normal(37).astype(np.float32)
    truth = TRUTH.linear(x.astype(np.float64), TRUTH.matrix(weight), bias.astype(np.float64))
    close(kind_of_linear(kind, ops), ops.linear(x, ops.matrix(weight), bias), truth)


@pytest.mark.parametrize("n", [1, 2, 40])
def test_linears_are_linear_with_each(n: int, ops: Ops) -> None:
    x, bias = RNG.standard_normal((n, 512)).astype(np.float32), RNG.standard_normal(37).astype(np.float32)
    weights = [ops.matrix(tensor(kind, rows, 512)) for kind, rows in (("Q4_K", 37), ("Q6_K", 16), ("Q8_0", 5))]
    biases = (bias, None, bias[:5])
    together = ops.linears(x, *zip(weights, biases, strict=True))
    for y, weight, one in zip(together, weights, biases, strict=True):
        np.testing.assert_array_equal(y, ops.linear(x, weight, one))


@pytest.mark.parametrize("kind", FORMATS)
def test_embed(kind: str, ops: Ops) -> None:
    table = tensor(kind, 11, 256)
    ids = [3, 3, 10, 0]
    close("embed", ops.embed(ops.matrix(table), ids), TRUTH.embed(TRUTH.matrix(table), ids))


def test_a_matrix_too_large_to_keep_is_dequantized_at_each_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyllava.ops.reference.KEEP_BYTES", 0)
    monkeypatch.setattr("tinyllava.ops.reference.ROW_ELEMENTS", 5 * 256)
    lazy, weight, x = select("numpy"), tensor("Q8_0", 37, 256), RNG.standard_normal((2, 256))
    close("linear", lazy.linear(x, lazy.matrix(weight)), TRUTH.linear(x, TRUTH.matrix(weight)))
    close("embed", lazy.embed(lazy.matrix(weight), [5, 36]), TRUTH.embed(TRUTH.matrix(weight), [5, 36]))


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_norms(op: str, ops: Ops) -> None:
    x, w, b = RNG.standard_normal((5, 96)) + 3, RNG.standard_normal(96), RNG.standard_normal(96)
    arguments = [x, w, b] if op == "layer_norm" else [x, w]
    truth = getattr(TRUTH, op)(*arguments, 1e-5)
    close(op, getattr(ops, op)(*(ops.array(a) for a in arguments), 1e-5), truth)


@pytest.mark.parametrize("kind", ["gelu_erf", "gelu_tanh", "gelu_quick", "silu"])
def test_activation(kind: Any, ops: Ops) -> None:
    x = np.concatenate([RNG.standard_normal((7, 33)).ravel() * 4, [-1e4, -90.0, 0.0, 90.0, 1e4]])
    close("activation", ops.activation(ops.array(x), kind), TRUTH.activation(x, kind))


def test_activations_by_hand() -> None:
    one = np.array([1.0])
    assert TRUTH.activation(one, "gelu_erf") == pytest.approx(0.8413447460685429)  # Phi(1)
    assert TRUTH.activation(one, "gelu_tanh") == pytest.approx(0.8411919906082768)
    assert TRUTH.activation(one, "gelu_quick") == pytest.approx(0.8457957659328212)  # 1 / (1 + exp(-1.702))
    assert TRUTH.activation(one, "silu") == pytest.approx(0.7310585786300049)


def test_swiglu(ops: Ops) -> None:
    gate, up = RNG.standard_normal((4, 64)) * 5, RNG.standard_normal((4, 64))
    close("swiglu", ops.swiglu(ops.array(gate), ops.array(up)), TRUTH.swiglu(gate, up))


@pytest.mark.parametrize("kind", ["norm", "neox"])
@pytest.mark.parametrize("n_rot", [12, 8])
def test_rope(kind: Any, n_rot: int, ops: Ops) -> None:
    x, angle = RNG.standard_normal((3, 2, 12)), RNG.standard_normal((3, n_rot // 2))
    truth = TRUTH.rope(x, np.cos(angle), np.sin(angle), kind)
    close("rope", ops.rope(ops.array(x), ops.array(np.cos(angle)), ops.array(np.sin(angle)), kind), truth)
    np.testing.assert_allclose(np.linalg.norm(truth, axis=-1), np.linalg.norm(x, axis=-1))  # a rotation
    assert np.array_equal(truth[..., n_rot:], x[..., n_rot:])


def test_rope_by_hand() -> None:
    x, quarter = np.array([[[1.0, 2.0, 3.0, 4.0]]]), (np.array([[0.0, 1.0]]), np.array([[1.0, 0.0]]))
    np.testing.assert_array_equal(TRUTH.rope(x, *quarter, "norm"), [[[-2.0, 1.0, 3.0, 4.0]]])
    np.testing.assert_array_equal(TRUTH.rope(x, *quarter, "neox"), [[[-3.0, 2.0, 1.0, 4.0]]])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n, m", [(1, 1), (1, 9), (5, 5), (4, 9)])
def test_attention(n: int, m: int, causal: bool, ops: Ops) -> None:
    q, k, v = RNG.standard_normal((n, 6, 8)), RNG.standard_normal((m, 2, 8)), RNG.standard_normal((m, 2, 8))
    arrays = [ops.array(a) for a in (q, k, v)]
    close("attention", ops.attention(*arrays, causal=causal), attention_by_loops(q, k, v, causal))
    weights = ops.attention_weights(*arrays[:2], causal=causal)
    close("attention_weights", weights, TRUTH.attention_weights(q, k, causal=causal))
    np.testing.assert_allclose(weights.sum(axis=-1), 1.0, rtol=1e-6)


def attention_by_loops(q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool) -> np.ndarray:
    """Attention as a definition: one query, one head, one key at a time."""
    y = np.zeros_like(q)
    for i, query in enumerate(q):
        seen = len(k) - len(q) + i + 1 if causal else len(k)
        for head, vector in enumerate(query):
            kv = head // (q.shape[1] // k.shape[1])
            score = np.exp([vector @ k[j, kv] / np.sqrt(len(vector)) for j in range(seen)])
            y[i, head] = sum(s * v[j, kv] for j, s in enumerate(score / score.sum()))
    return y


def test_attention_in_pieces_is_attention_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = RNG.standard_normal((7, 4, 8)), RNG.standard_normal((9, 2, 8)), RNG.standard_normal((9, 2, 8))
    for causal in (True, False):
        whole = TRUTH.attention(q, k, v, causal=causal)
        monkeypatch.setattr("tinyllava.ops.reference.SCORE_ELEMENTS", 2 * 4 * 9)  # two queries at once
        np.testing.assert_allclose(TRUTH.attention(q, k, v, causal=causal), whole, rtol=1e-12)
        monkeypatch.undo()


@pytest.mark.parametrize("kind", [kind for kind, format in LEVELS.items() if format.sums])
def test_levels_are_what_dequantizing_multiplies(kind: str) -> None:
    """Any bytes: q, d and m (or c) put together again are the weights, to the rounding of d * q + m."""
    block, form = TYPES[kind], LEVELS[kind]
    raw = RNG.integers(0, 256, (50, 2 * 256 // block.block_size * block.nbytes), dtype=np.uint8)
    y = np.empty((50, 512), np.float64)
    with np.errstate(all="ignore"):
        for i, row in enumerate(raw):
            q, table, room = np.empty(512, np.uint8), np.empty((16, 64), np.float32), np.empty(16, np.float32)
            at = q.ctypes.data, table.ctypes.data, table.strides[0], room.ctypes.data
            levels_row(form.number, row.ctypes.data, 16, *at)
            d = table[:, : 16 * form.groups : 16].repeat(32 // form.groups)
            m = table[:, 16 * form.groups : 32 * form.groups : 16].repeat(32 // form.groups)
            y[i] = d * (q.astype(np.float64) - form.offset) + (m if form.sums == "minimum" else 0.0)
        truth = dequantize(kind, raw)
    finite = np.isfinite(truth)
    assert np.array_equal(np.isfinite(y), finite)
    np.testing.assert_allclose(y[finite], truth[finite], rtol=0, atol=2e-7 * np.abs(truth[finite]).max())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "torch"}, "backend: 'torch'; wanted auto or numpy or numba"),
        ({"dtype": "float16"}, "dtype: 'float16'; wanted float32 or float64"),
        ({"name": "numba", "dtype": "float64"}, "backend numba: dtype float64; wanted float32"),
        ({"threads": 0}, "threads: 0; wanted 1 or more"),
    ],
)
def test_a_choice_that_does_not_exist(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        select(**arguments)


def test_all_backends_have_all_ops() -> None:
    names = {name for name in vars(Ops) if not name.startswith("_")} | set(Ops.__annotations__)
    for backend in BACKENDS:
        assert not {name for name in names if not hasattr(select(backend), name)}
    assert {name.split()[0] for name in TOLERANCE} <= names
