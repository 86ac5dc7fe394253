"""Two models, or two dumps, side by side: distances by hand, GGUF files, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tinyllava
from tinyllava.errors import FileError, TinyLLaVAError, UsageError
from tinyllava.study.compare.align import pairs_from_halves
from tinyllava.study.compare.compare import compare
from tinyllava.study.compare.measure import Distance

# ---- numbers, by hand


def distance(a: object, b: object) -> Distance:
    found = Distance()
    found.add(np.array(a, np.float64), np.array(b, np.float64))
    return found


def test_distances_by_hand() -> None:
    found = distance([3.0, 4.0], [3.0, 4.5])
    assert (found.max_abs, found.relative) == (0.5, 0.1)
    assert math.isclose(found.cosine, (9 + 18) / (5 * math.hypot(3, 4.5)))
    assert found.verdict(0.1) == "close" and found.verdict(0.099) == "differs"
    assert found.verdict(0.0, rounding=0.5) == "close"
    assert distance([1.0, 2.0], [1.0, 2.0]).verdict(0.0) == "equal"


@pytest.mark.parametrize(
    "a, b, relative, verdict",
    [
        ([0.0, 0.0], [0.0, 0.0], 0.0, "equal"),
        ([0.0, 0.0], [0.0, 1.0], math.inf, "differs"),
        ([math.nan, 1.0], [math.nan, 1.0], 0.0, "equal"),
        ([math.nan, 1.0], [2.0, 1.0], math.inf, "differs"),
        ([math.inf, 1.0], [math.inf, 1.0], 0.0, "equal"),
        ([math.inf, 1.0], [-math.inf, 1.0], math.inf, "differs"),
        ([], [], 0.0, "equal"),
    ],
)
def test_what_is_no_number_is_never_close(a, b, relative, verdict) -> None:
    found = distance(a, b)
    assert found.relative == relative and found.verdict(0.5) == verdict


@given(st.integers(1, 50), st.integers(0, 2**32 - 1))
def test_pieces_add_up_to_the_whole(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, n))
    cut = n // 2
    whole, parts = distance(a, b), Distance()
    parts.add(a[:cut], b[:cut])
    parts.add(a[cut:], b[cut:])
    assert math.isclose(whole.relative, parts.relative) and whole.max_abs == parts.max_abs
    assert math.isclose(whole.relative, np.linalg.norm(a - b) / np.linalg.norm(a))


def test_the_permutation_is_the_converters() -> None:
    from golden.models import halves_from_pairs

    ours = np.arange(2 * 12, dtype=np.float32).reshape(2, 12)  # 2 tokens, 3 heads of 4 features
    theirs = halves_from_pairs(ours.T, 3).T
    assert np.array_equal(pairs_from_halves(theirs, n_head=3), ours.reshape(2, 3, 4))


# ---- model files


def test_types_of_tensors_do_not_matter_but_what_they_mean(pairs, tmp_path: Path) -> None:
    from golden.models import LANGUAGE, write_language_model

    half = tmp_path / "half.gguf"
    write_language_model(half, LANGUAGE["mistral"], dtype="F16")
    comparison = compare(pairs.file("mistral"), half)
    assert not comparison.agrees and comparison.first is not None and comparison.first.note == "F32 against F16"
    assert 1e-5 < comparison.first.relative < 1e-3
    assert compare(pairs.file("mistral"), half, 1e-3).agrees
    assert compare(half, half).agrees


def test_a_missing_tensor_and_another_shape_diverge(pairs) -> None:
    comparison = compare(pairs.file("llama_tied"), pairs.file("mistral"))
    verdicts = {row.name: row.verdict for row in comparison.rows}
    assert verdicts["output.weight"] == "missing" and verdicts["blk.0.attn_k.weight"] == "shape"
    assert not comparison.agrees and any("metadata keys differ" in note for note in comparison.notes)


def test_memory_does_not_grow_with_the_tensors(tmp_path: Path) -> None:
    import tracemalloc

    import gguf

    paths = [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    values = np.random.default_rng(0).integers(0, 255, (16384, 34 * 32), np.uint8)  # 16 M weights
    values.reshape(-1, 34)[:, :2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    for i, path in enumerate(paths):
        values[0, 2] = i
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_tensor("t", values, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    tracemalloc.start()
    comparison = compare(*paths)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert comparison.first is not None and math.isclose(comparison.first.max_abs, 0.01, rel_tol=1e-2)
    assert peak < 80e6, peak


# ---- bad input


def npz(path: Path, **arrays: object) -> Path:
    np.savez(path, **arrays)
    return path


def test_what_is_no_dump_is_refused_in_one_line(pairs, tmp_path: Path) -> None:
    good = npz(tmp_path / "good.npz", x=np.ones(3))
    bad = {
        "empty": b"",
        "short": b"\1",
        "text": b"hello there\n" * 50,
        "zip": b"PK\3\4" + b"\0" * 50,
        "cut": good.read_bytes()[:-20],
        "safetensors": b'\x20\0\0\0\0\0\0\0{"a": 1}                        ',
    }
    for name, data in bad.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(FileError) as caught:
            compare(good, path)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(FileError, match="No such file"):
        compare(good, tmp_path / "absent.npz")
    with pytest.raises(FileError):
        compare(good, tmp_path)
    with pytest.raises(UsageError, match="a model file against a dump"):
        compare(good, pairs.file("mistral"))
    with pytest.raises(UsageError, match="no name in common"):
        compare(good, npz(tmp_path / "other.npz", y=np.ones(3)))
    with pytest.raises(UsageError, match="tolerance"):
        compare(good, good, math.nan)


def test_arrays_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    texts = npz(tmp_path / "texts.npz", x=np.array(["a"]))
    objects = tmp_path / "objects.npz"
    np.savez(objects, x=np.array([{}], object))
    for path in (texts, objects):
        with pytest.raises(FileError, match="an array of numbers"):
            compare(path, path)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_to_a_trace_is_an_error_of_ours_or_none(pairs, tmp_path: Path, data) -> None:
    whole = tmp_path / "whole.npz"
    if not whole.exists():
        tinyllava.trace(pairs.load("vicuna"), "Hi", only=["llm.blk.0.l_out", "llm.result_norm"]).save(whole)
    content = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        compare(whole, damaged)
    except TinyLLaVAError:
        pass


def test_a_safetensors_dump_is_read_bf16_included(tmp_path: Path) -> None:
    from tinyllava.files.safetensors import write_safetensors
    from tinyllava.files.stored import stored

    values = np.arange(12, dtype=np.float32).reshape(1, 3, 4)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    write_safetensors(tmp_path / "t.safetensors", {"model.layers.0": stored("model.layers.0", bits, "BF16")})
    ours = npz(tmp_path / "ours.npz", **{"llm.blk.0.l_out": values[0]})
    comparison = compare(ours, tmp_path / "t.safetensors")
    assert [row.name for row in comparison.rows] == ["llm.blk.0.l_out"] and comparison.first_unequal is None


def test_the_json_of_a_row_holds_no_nan(pairs) -> None:
    from tinyllava.commands.compare import as_json

    found = as_json(compare(pairs.file("llama_tied"), pairs.file("mistral")))
    json.loads(json.dumps(found, allow_nan=False))
