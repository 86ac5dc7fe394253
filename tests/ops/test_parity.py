"""Every operation on every backend against the reference in float64; each tolerance has its reason."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest

from tinyllava.errors import UsageError
from tinyllava.ops import Ops
from tinyllava.ops.cpu.unpack import FORMATS as LEVELS
from tinyllava.ops.cpu.unpack import Format
from tinyllava.ops.select import BACKENDS, select
from tinyllava.quant.blocks import TYPES, dequantize

RNG = np.random.default_rng(2024)

# Relative 2-norm of the error against float64 on the same weights.
TOLERANCE = {
    "embed": 0.0,  # a copy of dequantized rows
    "linear": 1e-6,  # sums of 512 products in float32, in any order
    "linear of words": 2e-4,  # numbers rounded to 2^-13 of the largest of 64, or a little less
    "linear of halves": 6e-4,  # inputs and weights rounded to 11 bits, each 2^-12 off on average
    "linear of integers": 6e-5,  # inputs rounded to 2^-16 of the largest of 16
    "embed of halves": 4e-4,  # weights rounded to 11 bits
    "linear of bytes": 1.2e-2,  # activations rounded to 2^-8 of the largest of 32 or 128, some 0.5% of a usual one
    "layer_norm": 1e-6,  # mean and variance in float32
    "rms_norm": 1e-6,
    "activation": 1e-6,  # one rounding of exp, tanh or erf
    "swiglu": 1e-6,
    "rope": 1e-6,
    "attention": 2e-6,  # an exp and two sums
    "attention_weights": 2e-6,
}

# Formats that a backend multiplies in its own way: one each with a kernel, and one that falls back.
FORMATS = (*LEVELS, "IQ4_NL", "IQ2_XS")


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


def kind_of_linear(kind: str, ops: Ops, n: int) -> str:
    """Which tolerance a product of n tokens with weights of a format has."""
    if ops.name == "cupy" and kind != "F32":
        if n > 1 or kind not in DEVICE_FORMATS:
            return "linear of halves"
        return "linear" if kind == "F16" else "linear of integers"
    if ops.name == "numpy" or kind not in LEVELS or kind == "F32":
        return "linear"
    return "linear of words" if LEVELS[kind].kind == "float" else "linear of bytes"


CPU = [pytest.param((name, n), id=f"{name}-{n}") for name in BACKENDS if name != "cupy" for n in (1, 3)]
GPU = pytest.param(("cupy", None), id="cupy", marks=pytest.mark.gpu)


@pytest.fixture(params=[*CPU, GPU])
def ops(request: pytest.FixtureRequest) -> Ops:
    return selected(*request.param)


def selected(name: str, threads: int | None = None) -> Ops:
    """A backend, or a test skipped for lack of a GPU."""
    try:
        return select(name, threads=threads)
    except UsageError as error:
        if name != "cupy":
            raise
        pytest.skip(str(error))


def call(op: str, ops: Ops, *arguments: Any, **settings: Any) -> np.ndarray:
    """An operation from NumPy to NumPy: arrays go to the backend, and its answer comes back."""
    own = [ops.array(x) if isinstance(x, np.ndarray) else x for x in arguments]
    return ops.numpy(getattr(ops, op)(*own, **settings))


# Formats that the GPU multiplies straight from their blocks; the others it holds in half precision.
DEVICE_FORMATS = ("F32", "F16", "Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
TRUTH = select("numpy", dtype="float64")


@pytest.mark.parametrize("n", [1, 3, 40])
@pytest.mark.parametrize("kind", FORMATS)
def test_linear(kind: str, n: int, ops: Ops) -> None:
    weight, x = tensor(kind, 37, 512), RNG.standard_normal((n, 512)).astype(np.float32)
    bias = RNG.standard_normal(37).astype(np.float32)
    truth = TRUTH.linear(x.astype(np.float64), TRUTH.matrix(weight), bias.astype(np.float64))
    close(kind_of_linear(kind, ops, n), call("linear", ops, x, ops.matrix(weight), bias), truth)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q4_K", "Q6_K"])
def test_a_huge_number_does_not_cost_its_neighbours_their_digits(kind: str) -> None:
    ops, weight = selected("numba", 2), tensor(kind, 37, 1024)
    bias = RNG.standard_normal(37).astype(np.float32)
    calm = RNG.standard_normal((5, 1024)).astype(np.float32)
    huge = calm.copy()
    huge[[1, 3], [77, 400]] = 1000.0, -3000.0

    def errors(x: np.ndarray) -> np.ndarray:
        truth = TRUTH.linear(x.astype(np.float64), TRUTH.matrix(weight), bias.astype(np.float64))
        return np.linalg.norm(ops.linear(x, ops.matrix(weight), bias) - truth, axis=1)

    before, after = errors(calm), errors(huge)
    np.testing.assert_allclose(after[[0, 2, 4]], before[[0, 2, 4]], rtol=1e-4)
    # Alone, a number is its block's largest and rounded to 127 steps exactly; what is left is float32's rounding.
    assert (after[[1, 3]] < 1.5 * before[[1, 3]]).all()


@pytest.mark.parametrize("n", [1, 2, 40])
def test_linears_are_linear_with_each(n: int, ops: Ops) -> None:
    x, bias = (ops.array(RNG.standard_normal(shape)) for shape in ((n, 512), (37,)))
    weights = [ops.matrix(tensor(kind, rows, 512)) for kind, rows in (("Q4_K", 37), ("Q6_K", 16), ("Q8_0", 5))]
    biases = (bias, None, bias[:5])
    together = ops.linears(x, *zip(weights, biases, strict=True))
    for y, weight, one in zip(together, weights, biases, strict=True):
        np.testing.assert_array_equal(ops.numpy(y), ops.numpy(ops.linear(x, weight, one)))


@pytest.mark.parametrize("kind", FORMATS)
def test_embed(kind: str, ops: Ops) -> None:
    table = tensor(kind, 11, 256)
    ids = [3, 3, 10, 0]
    op = "embed of halves" if ops.name == "cupy" and kind not in DEVICE_FORMATS else "embed"
    close(op, call("embed", ops, ops.matrix(table), ids), TRUTH.embed(TRUTH.matrix(table), ids))


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
    close(op, call(op, ops, *arguments, 1e-5), truth)


@pytest.mark.parametrize("kind", ["gelu_erf", "gelu_tanh", "gelu_quick", "silu"])
def test_activation(kind: Any, ops: Ops) -> None:
    x = np.concatenate([RNG.standard_normal((7, 33)).ravel() * 4, [-1e4, -90.0, 0.0, 90.0, 1e4]])
    close("activation", call("activation", ops, x, kind), TRUTH.activation(x, kind))


def test_activations_by_hand() -> None:
    one = np.array([1.0])
    assert TRUTH.activation(one, "gelu_erf") == pytest.approx(0.8413447460685429)  # Phi(1)
    assert TRUTH.activation(one, "gelu_tanh") == pytest.approx(0.8411919906082768)
    assert TRUTH.activation(one, "gelu_quick") == pytest.approx(0.8457957659328212)  # 1 / (1 + exp(-1.702))
    assert TRUTH.activation(one, "silu") == pytest.approx(0.7310585786300049)


def test_add(ops: Ops) -> None:
    for shape in ((1, 4), (3, 257), (7, 5, 4001)):
        x, y = (RNG.standard_normal(shape).astype(np.float32) for _ in range(2))
        np.testing.assert_array_equal(call("add", ops, x, y), x + y)


def test_swiglu(ops: Ops) -> None:
    gate, up = RNG.standard_normal((4, 64)) * 5, RNG.standard_normal((4, 64))
    close("swiglu", call("swiglu", ops, gate, up), TRUTH.swiglu(gate, up))


@pytest.mark.parametrize("kind", ["norm", "neox"])
@pytest.mark.parametrize("n_rot", [12, 8])
def test_rope(kind: Any, n_rot: int, ops: Ops) -> None:
    x, angle = RNG.standard_normal((3, 2, 12)), RNG.standard_normal((3, n_rot // 2))
    truth = TRUTH.rope(x, np.cos(angle), np.sin(angle), kind)
    close("rope", call("rope", ops, x, np.cos(angle), np.sin(angle), kind), truth)
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
    close("attention", call("attention", ops, q, k, v, causal=causal), attention_by_loops(q, k, v, causal))
    weights = call("attention_weights", ops, q, k, causal=causal)
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


def test_places(ops: Ops) -> None:
    """Rows written at a position come back with all before them; what is forgotten is written over."""
    table, keys = RNG.standard_normal((9, 4)), RNG.standard_normal((5, 2, 8))
    held = ops.zeros((2, 6, 8)), ops.zeros((2, 6, 8))
    position = ops.position(6)
    for start, rows in ((0, keys[:3]), (3, keys[3:])):
        assert position.value == start
        window = ops.slice_at(ops.array(table), position, len(rows))
        np.testing.assert_array_equal(ops.numpy(window), ops.numpy(ops.array(table[start : start + len(rows)])))
        k, v = ops.append_kv(held, (ops.array(rows), ops.array(-rows)), position)
        ops.advance(position, len(rows))
    np.testing.assert_array_equal(ops.numpy(k), ops.numpy(ops.array(keys)))
    np.testing.assert_array_equal(ops.numpy(v), -ops.numpy(k))
    ops.advance(position, -4)
    k, _ = ops.append_kv(held, (ops.array(keys[:1]), ops.array(keys[:1])), position)
    np.testing.assert_array_equal(ops.numpy(k), ops.numpy(ops.array(keys[[0, 0]])))


def test_a_step_repeated_is_the_step(ops: Ops) -> None:
    """A count of what was asked so far, and the row asked for: the same from the fourth call as from the first."""
    table = ops.matrix(tensor("F32", 8, 32))
    position, places = ops.position(9), ops.array(np.arange(9.0)[:, None])  # (9, 1)
    cos, sin = places, ops.array(np.zeros((9, 1)))

    def step(ids: list[int]) -> Any:
        x = ops.embed(table, ids).reshape(1, 16, 2)
        angles = (ops.slice_at(table, position, 1) for table in (cos, sin))
        turned = ops.rope(x, *angles, "norm")  # times position
        ops.advance(position, 1)
        return turned

    again, rows = ops.capture(step), ops.numpy(ops.embed(table, list(range(8)))).reshape(8, 16, 2)
    for i, token in enumerate((3, 1, 4, 1, 5, 2, 6)):
        np.testing.assert_array_equal(ops.numpy(again([token]))[0], rows[token] * i)
        assert position.value == i + 1


def test_attention_in_pieces_is_attention_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = RNG.standard_normal((7, 4, 8)), RNG.standard_normal((9, 2, 8)), RNG.standard_normal((9, 2, 8))
    for causal in (True, False):
        whole = TRUTH.attention(q, k, v, causal=causal)
        monkeypatch.setattr("tinyllava.ops.reference.SCORE_ELEMENTS", 2 * 4 * 9)  # two queries at once
        np.testing.assert_allclose(TRUTH.attention(q, k, v, causal=causal), whole, rtol=1e-12)
        monkeypatch.undo()


def blocks(form: Format, row: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The numbers, scales and minima (512,) of a row of 16 blocks."""
    q, table = np.empty(512, np.uint8), np.empty((16, 64), np.float32)
    form.unpack_to_memory(row.ctypes.data, 16, q.ctypes.data, table.ctypes.data, table.strides[0])
    return q, table[:, 0].repeat(32), table[:, 16].repeat(32)


def super_blocks(form: Format, row: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same of two super-blocks."""
    q, table = np.empty((2, 256), np.uint8), np.empty((2, 512), np.float32)
    for i, block in enumerate(row.reshape(2, -1)):
        form.unpack_to_memory(block.ctypes.data, q[i].ctypes.data, table[i].ctypes.data)
    n = 8 * form.scales_per_32  # scales; the minima come right after 8, and 1024 bytes after the first of 16
    minima = table[:, n : 2 * n] if n == 8 else table[:, 256 : 256 + n]
    return q.ravel(), table[:, :n].ravel().repeat(256 // n), minima.ravel().repeat(256 // n)


@pytest.mark.parametrize("kind", [kind for kind, form in LEVELS.items() if form.kind != "float"])
def test_levels_are_what_dequantizing_multiplies(kind: str) -> None:
    """Any bytes: q, d and m (or c) put together again are the weights, to the rounding of d * q + m."""
    block, form = TYPES[kind], LEVELS[kind]
    take_apart = super_blocks if form.has_super_blocks else blocks
    raw = RNG.integers(0, 256, (50, 2 * 256 // block.block_size * block.nbytes), dtype=np.uint8)
    y = np.empty((50, 512), np.float64)
    with np.errstate(all="ignore"):
        for i, row in enumerate(raw):
            q, d, m = take_apart(form, row)
            y[i] = d * (q.astype(np.float64) - form.c) + (m if form.kind == "minimum" else 0.0)
        truth = dequantize(kind, raw)
    finite = np.isfinite(truth)
    assert np.array_equal(np.isfinite(y), finite)
    np.testing.assert_allclose(y[finite], truth[finite], rtol=0, atol=2e-7 * np.abs(truth[finite]).max())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "torch"}, "backend: 'torch'; wanted auto or numpy or numba or cupy"),
        ({"dtype": "float16"}, "dtype: 'float16'; wanted float32 or float64"),
        ({"name": "numba", "dtype": "float64"}, "backend numba: dtype float64; wanted float32"),
        ({"name": "cupy", "dtype": "float64"}, "backend cupy: dtype float64; wanted float32"),
        ({"threads": 0}, "threads: 0; wanted 1 or more"),
    ],
)
def test_a_choice_that_does_not_exist(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        select(**arguments)


@pytest.mark.parametrize("backend", [*BACKENDS[:2], pytest.param("cupy", marks=pytest.mark.gpu)])
def test_all_backends_have_all_ops(backend: str) -> None:
    names = {name for name in vars(Ops) if not name.startswith("_")} | set(Ops.__annotations__)
    ops = selected(backend)
    assert not {name for name in names if not hasattr(ops, name)}
    assert {name.split()[0] for name in TOLERANCE} <= names
