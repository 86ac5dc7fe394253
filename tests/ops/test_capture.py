"""A replay gives, bit for bit, what the step itself gives; and no task of it comes from Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import gguf
import numpy as np
import pytest

import tinyllava
from golden.models import LANGUAGE, write_language_model
from tinyllava.errors import ContextError
from tinyllava.files.gguf import open_gguf
from tinyllava.language.cache import KVCache
from tinyllava.language.config import read_config
from tinyllava.language.llama import embed, forward, load_llama, unembed
from tinyllava.ops.cpu.ops import NumbaOps
from tinyllava.ops.cpu.simd.llvm import HARDWARE_HALF
from tinyllava.quant.quantize import quantize
from tinyllava.text.sampling import Sampling

KINDS = ("F32", "F16", "BF16", "Q4_0", "Q8_0", "Q4_K", "Q6_K", "IQ4_NL")
MODELS = [
    *((name, "llama_gqa") for name in KINDS),  # IQ4_NL has no kernel
    *((kind, name) for name in ("llama_bias", "qwen2", "llama_tied") for kind in ("F32", "Q4_0", "Q8_0")),
]
PROMPT, TOKENS = [5, 6, 7], [9, 300, 4, 4, 77, 511, 0, 13]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("capture")
    with pytest.MonkeyPatch.context() as patch:  # gguf cannot write the K formats
        patch.setattr(gguf.quants, "quantize", lambda values, kind: quantize(kind.name, values))
        for kind, name in MODELS:
            write_language_model(path / f"{name}-{kind}.gguf", LANGUAGE[name], kind)
    return path


class Reader:
    """A model with a KV cache of its own; ``step`` reads a token and is captured."""

    def __init__(self, path: Path, ops: NumbaOps, n_ctx: int = 20) -> None:
        file = open_gguf(path)
        self.ops, self.llama = ops, load_llama(file, read_config(file), ops)
        self.cache = KVCache(self.llama.config, n_ctx, ops)
        self.step = ops.capture(self.read)
        self.read(PROMPT)

    def read(self, ids: Any) -> Any:
        x = embed(ids, self.llama, self.ops)
        return unembed(forward(x, self.llama, self.cache, self.ops)[-1:], self.llama, self.ops)

    def ready(self) -> Reader:
        """The same after the step has been captured, with the cache as it was after the prompt."""
        for token in TOKENS[:2]:
            self.step([token])
        self.cache.truncate(len(PROMPT))
        return self


def uncaptured(path: Path, tokens: list[int], ops: NumbaOps | None = None) -> list[np.ndarray]:
    """The logits after each of some tokens, without capture."""
    reader = Reader(path, ops or NumbaOps(2))
    return [reader.read([token]).copy() for token in tokens]


@contextmanager
def replays_only(ops: NumbaOps, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails if a task comes from Python, unless NumPy fills float16 caches, as it does without HARDWARE_HALF."""
    if ops._half_cache and not HARDWARE_HALF:
        yield
        return

    def run(*_: Any) -> None:
        raise AssertionError("a task outside of a replay")

    with monkeypatch.context() as patch:
        patch.setattr(ops.pool, "run_several", run)
        yield


@pytest.mark.parametrize("kind, name", MODELS)
def test_replays_equal_the_step(
    kind: str, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, ops = folder / f"{name}-{kind}.gguf", NumbaOps(2)
    reader = Reader(path, ops)
    for i, (token, truth) in enumerate(zip(TOKENS, uncaptured(path, TOKENS), strict=True)):
        if i < 2 or kind == "IQ4_NL":
            found = reader.step([token])
        else:
            with replays_only(ops, monkeypatch):
                found = reader.step(np.array([token]))
        np.testing.assert_array_equal(found, truth)
        assert reader.cache.length == len(PROMPT) + i + 1


@pytest.mark.parametrize("threads", [1, 3])
def test_replays_do_not_depend_on_the_number_of_threads(threads: int, folder: Path) -> None:
    path = folder / "llama_gqa-Q4_K.gguf"
    reader = Reader(path, NumbaOps(threads))
    for token, truth in zip(TOKENS, uncaptured(path, TOKENS), strict=True):
        np.testing.assert_array_equal(reader.step([token]), truth)


def test_after_truncating_and_in_a_full_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, n_ctx = folder / "llama_gqa-Q8_0.gguf", len(PROMPT) + 4
    truth, reader = uncaptured(path, TOKENS), Reader(path, NumbaOps(2), n_ctx).ready()
    for n in (4, 2, 4):
        with replays_only(reader.ops, monkeypatch):
            for i in range(reader.cache.length - len(PROMPT), n):
                np.testing.assert_array_equal(reader.step([TOKENS[i]]), truth[i])
        if n == 4:
            with pytest.raises(ContextError, match=f"Use -c {n_ctx + 1}"):
                reader.step([1])
            assert reader.cache.length == n_ctx
        reader.cache.truncate(len(PROMPT) + 1)


@pytest.mark.parametrize("kind", ["F32", "Q4_0", "Q6_K"])
def test_other_work_between_replays(kind: str, folder: Path) -> None:
    """A long prompt, which needs more scratch, and another captured step change no result, and get their own."""
    path, ops = folder / f"llama_gqa-{kind}.gguf", NumbaOps(2)
    one, other, truth = Reader(path, ops).ready(), Reader(path, ops).ready(), uncaptured(path, TOKENS)
    long = Reader(path, ops, n_ctx=400)
    long.cache.truncate(0)
    prompt = long.read(list(range(150)))
    for i, token in enumerate(TOKENS[:4]):
        first = one.step([token])
        long.cache.truncate(0)
        np.testing.assert_array_equal(long.read(list(range(150))), prompt)
        second = other.step([token])
        np.testing.assert_array_equal(first, truth[i])
        np.testing.assert_array_equal(second, truth[i])
    assert kind != "F32" or one.step([1]) is first  # an answer is good until the next call


def test_a_step_within_a_step_is_part_of_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "llama_gqa-Q4_0.gguf"
    reader, truth = Reader(path, NumbaOps(2)).ready(), uncaptured(path, TOKENS)
    outer = reader.ops.capture(lambda ids: reader.ops.add(*[reader.step(ids)] * 2))
    for i, token in enumerate(TOKENS[:5]):
        if i < 2:
            found = outer([token])
        else:
            with replays_only(reader.ops, monkeypatch):
                found = outer([token])
        np.testing.assert_array_equal(found, 2 * truth[i])


def test_what_another_thread_does_meanwhile_is_not_captured(folder: Path) -> None:
    path, ops = folder / "llama_gqa-F32.gguf", NumbaOps(2)
    reader, truth, seen = Reader(path, ops), uncaptured(path, TOKENS), []
    one, other = np.ones((1, 64), np.float32), ops.capture(lambda ids: ops.embed(reader.llama.token_embd, ids))
    other([1])

    def others() -> None:
        seen.append(ops.add(one, one))
        seen.append(other([1]))  # its second call: another capture is going on

    def step(ids: Any) -> Any:
        thread = Thread(target=others)
        thread.start()
        thread.join()
        return reader.read(ids)

    again = ops.capture(step)
    for token, expected in zip(TOKENS, truth, strict=True):
        np.testing.assert_array_equal(again([token]), expected)
    assert len(seen) == 2 * 2
    np.testing.assert_array_equal(np.concatenate(seen[::2]), 2 * np.ones((2, 64)))
    np.testing.assert_array_equal(seen[1], ops.embed(reader.llama.token_embd, [1]))


def test_a_step_that_fails_is_not_captured(folder: Path) -> None:
    path = folder / "llama_gqa-F32.gguf"
    reader, fails = Reader(path, NumbaOps(2)), [False, True, False, False, False, False]

    def step(ids: Any) -> Any:
        answer = reader.read(ids)
        if fails.pop(0):
            raise ValueError("after its work is done")
        return answer

    again, truth = reader.ops.capture(step), uncaptured(path, TOKENS)
    again(TOKENS[:1])
    with pytest.raises(ValueError, match="after its work"):
        again(TOKENS[1:2])
    for token, expected in zip(TOKENS[2:6], truth[2:], strict=False):
        np.testing.assert_array_equal(again([token]), expected)
    assert len(fails) == 3  # the third call was captured, the fourth was a replay


def sliced(reader: Reader, x: Any) -> Any:
    """Attention to all keys but the first: a slice whose length at replay is not known."""
    cache, rows = reader.cache, x[:, :192].reshape(1, 2, 96)
    k, v = cache.append(0, rows, rows)
    cache.advance(1)
    return reader.ops.attention(rows, k[1:], v[1:], causal=True)


def strided(x: Any) -> Any:
    """Rows (1, 2, n_embd) that are not contiguous."""
    return np.stack([x, -x], axis=2).transpose(2, 0, 1).swapaxes(0, 1)


UNCAPTURED: dict[str, Callable[[Reader, Any], Any]] = {
    "NumPy's sum": lambda _, x: x + x,
    "read on the host": lambda reader, x: reader.ops.add(x, x * np.float32(reader.ops.numpy(x).max())),
    "from the host": lambda reader, x: reader.ops.add(x, reader.ops.array(np.full_like(x, reader.cache.length))),
    "a copy": lambda reader, x: reader.ops.activation(x[:, ::2], "silu"),
    "strided rows": lambda reader, x: reader.ops.linear(strided(x), reader.llama.blk[0].ffn_gate),
    "other ids": lambda reader, _: reader.ops.embed(reader.llama.token_embd, [3]),
    "many rows": lambda reader, x: reader.ops.linear(x[:, :256].repeat(3, axis=0), reader.llama.blk[0].ffn_gate),
    "all weights": lambda reader, x: reader.ops.attention_weights(*[x.reshape(1, 2, -1)] * 2, causal=True),
    "a slice": sliced,
}


@pytest.mark.parametrize("what", UNCAPTURED)
def test_what_cannot_be_captured_is_run_each_time(what: str, folder: Path) -> None:
    reader, calls = Reader(folder / "llama_gqa-Q8_0.gguf", NumbaOps(2)), []

    def step(ids: Any) -> Any:
        calls.append(list(ids))
        return UNCAPTURED[what](reader, reader.ops.embed(reader.llama.token_embd, ids))

    again = reader.ops.capture(step)
    for token in TOKENS[:5]:
        length = reader.cache.length
        found = again([token]).copy()
        reader.cache.truncate(length)
        np.testing.assert_array_equal(found, step([token]))
    assert len(calls) == 2 * 5


@pytest.mark.parametrize("given", [np.ones(1, np.float32), [1, 2], np.ones((1, 1), np.int64), np.ones((2, 3))])
def test_other_than_one_id_is_not_captured(given: Any) -> None:
    seen: list[Any] = []
    again = NumbaOps(1).capture(lambda x: seen.append(x) or np.zeros(1))
    for _ in range(4):
        again(given)
    assert all(x is given for x in seen) and len(seen) == 4


@pytest.mark.parametrize("kind", ["F32", "Q4_0"])
def test_answers_are_the_same_without_capture(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = []
    for _ in range(2):
        llava = tinyllava.load(folder / f"llama_gqa-{kind}.gguf", backend="numba", threads=2)
        answers += [llava.generate("Why?", (), 12, Sampling(temperature=0.8, seed=s)).tokens for s in (1, 2)]
        monkeypatch.setattr(NumbaOps, "capture", lambda _, step: step)
    assert answers[:2] == answers[2:] and answers[0] != answers[1]
