"""Where two runs or two models part ways: found exactly, measured by hand, and said in words."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tinyllava
from tinyllava.errors import FileError, TinyLLaVAError, UsageError
from tinyllava.files.gguf import open_gguf
from tinyllava.profile import PROFILES
from tinyllava.study import differences
from tinyllava.study.align import pairs_from_halves
from tinyllava.study.compare import compare, compare_dumps
from tinyllava.study.dumps import Dump, from_trace
from tinyllava.study.measure import Distance
from tinyllava.study.tracing import Trace

MANY = settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])


def dump(trace: Trace) -> Dump:
    return from_trace(trace)


def with_one_weight_changed(path: Path, copy: Path, tensor_name: str, position: float, by: float) -> None:
    """A copy of an F32 model in which one number of one tensor is another."""
    shutil.copyfile(path, copy)
    with open_gguf(path) as file:
        tensor = file.tensors[tensor_name]
        assert tensor.type == "F32"
        index = int(position * (tensor.n_elements - 1))
        start = tensor.start + 4 * index
    with copy.open("r+b") as out:
        out.seek(start)
        value = np.frombuffer(out.read(4), "<f4")[0]
        out.seek(start)
        out.write(np.float32(value + by).tobytes())


_TRACES: dict[Path, Dump] = {}  # of the models that do not change


def reading(path: Path, *, cached: bool) -> Dump:
    """The trace of a language model that reads a question."""
    if not cached or path not in _TRACES:
        llava = tinyllava.load(path, backend="numpy")
        _TRACES[path] = dump(llava.trace("What is this?", template="mistral", attention=True))
    return _TRACES[path]


def seeing(path: Path, picture: Path, *, cached: bool) -> Dump:
    """The trace of an image encoder that sees a picture."""
    if not cached or path not in _TRACES:
        _TRACES[path] = dump(tinyllava.load(mmproj=path, backend="numpy").trace(images=[picture], attention=True))
    return _TRACES[path]


LANGUAGE_TENSORS = (
    "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down",
)  # fmt: skip
# By the names of 2023: ffn_down is the tensor whose result is the tap ffn_up.
VISION_TENSORS = {
    "ln1.weight": "ln1", "ln1.bias": "ln1", "attn_q.weight": "attn_q", "attn_k.bias": "attn_k",
    "attn_v.weight": "attn_v", "attn_out.weight": "attn_out", "ln2.weight": "ln2",
    "ffn_down.weight": "ffn_up", "ffn_down.bias": "ffn_up", "ffn_up.weight": "ffn_down", "ffn_up.bias": "ffn_down",
}  # fmt: skip


@MANY
@given(
    block=st.integers(0, 2),
    name=st.sampled_from(LANGUAGE_TENSORS),
    position=st.floats(0, 1),
    change=st.sampled_from([(4.0, None), (-4.0, None), (0.01, 0.0)]),
)
def test_one_weight_of_a_language_models_block_makes_that_block_the_first(
    pairs, block, name, position, change
) -> None:
    by, tolerance = change
    original, changed = pairs.file("mistral"), pairs.folder / "changed.gguf"
    tensor = f"blk.{block}.{name}.weight"
    with_one_weight_changed(original, changed, tensor, position, by)
    before, after = (reading(path, cached=path == original) for path in (original, changed))
    first = compare_dumps(before, after, *([] if tolerance is None else [tolerance])).first
    assert first is not None and first.name == f"llm.blk.{block}.{name}"
    models = compare(original, changed)
    assert [row.name for row in models.rows if row.diverges] == [tensor]
    assert math.isclose(models.first.max_abs, abs(by), rel_tol=1e-3)


@MANY
@given(block=st.integers(0, 2), name=st.sampled_from(sorted(VISION_TENSORS)), position=st.floats(0, 1))
def test_one_weight_of_the_vision_towers_block_makes_that_block_the_first(pairs, block, name, position) -> None:
    original, changed = pairs.file("clip_15"), pairs.folder / "changed-eye.gguf"
    tensor = f"v.blk.{block}.{name}"
    with_one_weight_changed(original, changed, tensor, position, 2.0)
    before, after = (seeing(path, pairs.picture(70, 30), cached=path == original) for path in (original, changed))
    first = compare_dumps(before, after).first
    assert first is not None and first.name == f"vit.blk.{block}.{VISION_TENSORS[name]}"
    models = compare(original, changed)
    assert [row.name for row in models.rows if row.diverges] == [tensor]


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


# ---- traces of different runs


def test_float64_is_the_truth_that_float32_is_close_to(pairs) -> None:
    question, picture = "What?", [pairs.picture(100, 60)]
    exact = pairs.load("vicuna", "clip_16", dtype="float64").trace(question, picture, attention=True)
    for backend, tolerance in (("numpy", 1e-5), ("numba", 2e-3)):  # the fast backend may round activations
        found = pairs.load("vicuna", "clip_16", backend=backend).trace(question, picture, attention=True)
        comparison = compare_dumps(dump(exact), dump(found), tolerance)
        assert comparison.agrees and len(comparison.rows) == len(exact)
    assert exact["llm.blk.0.l_out"].dtype == np.float64


def test_how_the_prompt_was_cut_makes_no_difference(pairs) -> None:
    whole, cut = (
        dump(pairs.load("vicuna", n_batch=n).trace("Why?", attention=True, max_tokens=4)) for n in (512, 7)
    )
    comparison = compare_dumps(whole, cut, 1e-5)
    assert comparison.agrees and not comparison.notes
    assert all(row.shape == row.other_shape for row in comparison.rows)


def test_other_pictures_differ_in_length_at_their_tiles(pairs) -> None:
    llava = pairs.load("vicuna", "clip_16")
    wide, square = (dump(llava.trace("What?", [pairs.picture(*size)])) for size in ((100, 30), (112, 112)))
    comparison = compare_dumps(wide, square)
    (note,) = comparison.notes
    assert note.startswith("first difference in length: picture 1, 3 tiles against 5, because of ")
    assert "1 x 2 tiles of 56 px and 2 x 2 tiles" in note and "100 x 30 px, or 112 x 112 px" in note
    assert comparison.first is not None and comparison.first.name == "pixels"
    assert comparison.first.verdict == "shape"


@pytest.mark.parametrize(
    "compat, size, words",
    [
        ("mtmd", (40, 30), ["picture 1", "3 tiles against 1,", "small_pictures"]),
        ("hf", (40, 30), ["picture 1", "pinpoint_order"]),
        ("mtmd", (100, 60), ["picture 1", "tokens", "merge"]),
    ],
)
def test_the_choice_that_makes_the_length_differ_is_named(pairs, compat: str, size, words: list[str]) -> None:
    traces = [
        dump(pairs.load("vicuna", "clip_16", compat=name).trace("What?", [pairs.picture(*size)]))
        for name in ("llava", compat)
    ]
    comparison = compare_dumps(*traces)
    assert comparison.notes and all(word in comparison.notes[0] for word in words), comparison.notes


@pytest.mark.parametrize(
    "one, other, words",
    [
        ({"prompt": "What?"}, {"prompt": "What is it?"}, ["prompt", "the prompts are not the same"]),
        ({"template": "plain"}, {"template": "mistral"}, ["template plain against mistral"]),
        ({"max_tokens": 2}, {"max_tokens": 5}, ["answer, 2 tokens against 5", "limits of 2 and 5"]),
        ({"images": 1}, {"images": 2}, ["1 pictures against 2", "different pictures"]),
    ],
)
def test_other_reasons_for_another_length(pairs, one, other, words) -> None:
    llava, traces = pairs.load("vicuna", "clip_15"), []
    for changes in (one, other):
        given = {"prompt": "Who?", "template": "plain", "max_tokens": 2, **changes}
        pictures = [pairs.picture(56, 56)] * given.pop("images", 0)
        traces.append(dump(llava.trace(given.pop("prompt"), pictures, **given)))
    comparison = compare_dumps(*traces)
    assert all(word in " ".join(comparison.notes) for word in words), comparison.notes


def test_answers_of_different_length_are_compared_as_far_as_both_go(pairs) -> None:
    llava = pairs.load("vicuna")
    short, long = (dump(llava.trace("Who?", max_tokens=n)) for n in (2, 5))
    comparison = compare_dumps(short, long)
    assert [row.name for row in comparison.rows if row.verdict != "equal"] == ["answer_ids"]


@pytest.mark.parametrize("compat", ["hf", "llava-cli", "mtmd"])
def test_every_profile_is_explained_where_it_first_differs(pairs, compat: str) -> None:
    traces = [
        dump(pairs.load("vicuna", "clip_15", compat=name).trace("<image>Hi", [pairs.picture(100, 60)]))
        for name in ("llava", compat)
    ]
    comparison = compare_dumps(*traces)
    assert comparison.first is not None and comparison.first.name == "pixels"
    assert "one_tile" in comparison.first.known
    assert set(comparison.choices) == {name for row in comparison.rows for name in row.known}


def test_the_table_of_known_differences_is_where_compare_looks_for_it() -> None:
    golden = Path(__file__).parents[2] / "golden" / "known_differences.toml"
    assert differences.FILE.read_bytes() == golden.read_bytes()
    choices = {entry["choice"] for entry in differences.table()}
    values = {name: {str(vars(profile)[name]) for profile in PROFILES.values()} for name in differences.SHOWS}
    assert {name for name, found in values.items() if len(found) > 1} <= choices
    text = differences.describe("class_token", ("first", "last"))
    assert text.startswith("class_token: first against last. Place of the class embedding")


def test_a_choice_that_comes_to_the_same_here_explains_nothing(pairs) -> None:
    one, other = (
        dump(pairs.load("vicuna", "clip_15", compat=name).trace("<image>Hi", [pairs.picture(100, 60)]))
        for name in ("llava", "mtmd")
    )
    found = set(differences.differing(one, other))
    assert {"one_tile", "class_token", "blocks", "projector_gelu"} <= found
    assert not found & {"pad_colour", "post_norm", "vit_gelu", "overview", "merge", "anyres_resample"}


def test_every_choice_of_a_profile_has_its_tap() -> None:
    from dataclasses import fields

    from tinyllava.profile import Profile

    # No tap shows what ends or draws the answer.
    without = {"name", "stop_texts", "temperature", "top_k", "top_p", "min_p", "max_tokens"}
    assert {item.name for item in fields(Profile)} - without == set(differences.SHOWS)


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
        pairs.load("vicuna").trace("Hi", only=["llm.blk.0.l_out", "llm.result_norm"]).save(whole)
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
    from tinyllava.files.safetensors import stored, write_safetensors

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
