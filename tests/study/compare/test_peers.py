"""Dumps that transformers and llama.cpp wrote (golden/makers/dumps.py), read here and held to a trace of ours."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import tinyllava
from tinyllava.study.compare.compare import Comparison, compare, compare_dumps
from tinyllava.study.compare.dumps import Dump, from_trace, open_dump
from tinyllava.study.trace import Trace

GOLDEN = Path(__file__).parents[3] / "golden"


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the logs and the raw file of llama.cpp's programs."""
    folder = tmp_path_factory.mktemp("llama-cpp")
    with np.load(GOLDEN / "llama-cpp-dumps.npz") as file:
        for name in file.files:
            (folder / name).write_bytes(file[name].tobytes())
    return folder


def picture_trace(pairs, compat: str = "llava") -> Trace:
    llava = pairs.load("vicuna", "clip_15", compat=compat)
    return tinyllava.trace(llava, "<image>Hi", [pairs.picture(56, 56)], attention=True, max_tokens=3)


def rows(comparison: Comparison) -> dict[str, float]:
    return {row.name: row.relative for row in comparison.rows}


def test_transformers_agrees_at_every_tap(pairs) -> None:
    trace = picture_trace(pairs)
    assert trace["ids"].tolist() == [1, *[-1] * 16, 259, 300, 333]  # what the maker gave transformers
    theirs = open_dump(GOLDEN / "hf-dump.npz")
    assert theirs.program == "transformers"
    comparison = compare_dumps(from_trace(trace), theirs, 1e-5)
    assert comparison.agrees, comparison.first
    found = rows(comparison)
    for name in ("pixels", "vit.patch_embd", "vit.blk.0.attn_weights", "vit.features", "mm.0.act", "llm.inp_embd"):
        assert name in found
    for name in ("attn_q", "attn_k", "attn_v", "attn_weights", "attn_mixed", "ffn_swiglu", "l_out"):
        assert f"llm.blk.0.{name}" in found
    assert {"llm.blk.1.l_out", "llm.result_norm", "llm.result_output"} <= set(found) and len(found) == 41
    assert "model.language_model.layers.0.self_attn" in comparison.only_b  # a module with no tap of ours


def test_without_the_permutation_of_rope_q_and_k_would_differ(pairs) -> None:
    trace = picture_trace(pairs)
    trace.settings["llm"]["rope_kind"] = "neox"  # a lie: these rows are in GGUF's order
    comparison = compare_dumps(from_trace(trace), open_dump(GOLDEN / "hf-dump.npz"), 1e-5)
    assert {row.name for row in comparison.rows if row.diverges} == {"llm.blk.0.attn_q", "llm.blk.0.attn_k"}


def test_the_original_agrees_at_every_tap_of_three_tiles(pairs) -> None:
    llava = pairs.load("vicuna", "clip_16")
    trace = from_trace(tinyllava.trace(llava, "<image>Hi", [pairs.picture(56, 100)], attention=True, max_tokens=3))
    theirs = open_dump(GOLDEN / "original-dump.npz")
    assert theirs.compat == "llava"
    comparison = compare_dumps(trace, theirs, 1e-5)
    assert comparison.agrees, comparison.first
    found = rows(comparison)
    assert {"pixels", "vit.blk.0.attn_q", "vit.features", "mm.0.act", "llm.inp_embd"} <= set(found)
    assert len(found) == 28


@pytest.fixture(scope="module")
def llava_cli(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that golden/dump_llava_cli.py writes, one for each model."""
    folder = tmp_path_factory.mktemp("llava-cli")
    with np.load(GOLDEN / "llava-cli-dump.npz") as file:
        for spec in ("clip_15", "clip_16"):
            arrays = {name.removeprefix(f"{spec}."): file[name] for name in file.files if name.startswith(spec)}
            np.savez(folder / f"{spec}.npz", **arrays)
    return folder


@pytest.mark.parametrize("spec, size", [("clip_15", (100, 60)), ("clip_16", (56, 100))])
def test_llama_llava_cli_agrees_with_its_profile_and_is_explained_by_another(pairs, llava_cli, spec, size) -> None:
    theirs = open_dump(llava_cli / f"{spec}.npz")
    traces = {
        name: from_trace(tinyllava.trace(pairs.load(None, spec, compat=name), images=[pairs.picture(*size)]))
        for name in ("llava-cli", "llava")
    }
    same = compare_dumps(traces["llava-cli"], theirs)
    assert same.agrees and [row.name for row in same.rows] == ["pixels", "image_tokens"]
    other = compare_dumps(traces["llava"], theirs)
    assert other.first is not None and other.first.name == "pixels"
    assert {"resample" if spec == "clip_15" else "anyres_resample"} <= set(other.first.known)
    assert "blocks" in other.rows[-1].known


@pytest.mark.parametrize("model, n_rows", [("llama_bias", 51), ("qwen2", 48)])
def test_llama_eval_callback_agrees_at_every_tap(pairs, llama_cpp: Path, model: str, n_rows: int) -> None:
    trace = tinyllava.trace(pairs.load(model), "hello world", attention=True, template="plain")
    theirs = open_dump(llama_cpp / f"{model}.txt")
    assert theirs.program == "llama.cpp"
    comparison = compare_dumps(from_trace(trace), theirs, 1e-4)
    assert comparison.agrees, comparison.first
    assert len(comparison.rows) == n_rows and comparison.only_b == ()  # qwen2's attn_out has no name
    assert all(row.max_abs < 6e-5 for row in comparison.rows)
    logits = comparison.rows[-1]
    assert logits.name == "llm.result_output" and logits.shape == (512,)  # the last position's


def test_mtmds_graph_and_embeddings_agree_with_its_profile(pairs, llama_cpp: Path) -> None:
    trace = from_trace(picture_trace(pairs, "mtmd"))
    graph = compare_dumps(trace, open_dump(llama_cpp / "clip_15.txt"))
    assert graph.agrees, graph.first
    assert {"vit.pre_ln", "vit.blk.1.l_out", "vit.features", "mm.0.act", "mm.1.linear"} <= set(rows(graph))
    embeddings = compare_dumps(trace, open_dump(llama_cpp / "clip_15.embeddings"))
    assert embeddings.agrees and [row.name for row in embeddings.rows] == ["image_tokens"]


def test_mtmd_encodes_the_overview_after_its_tiles(pairs, llama_cpp: Path) -> None:
    """Our taps see it first, so tiles are turned round; the raw embeddings are the overview's alone."""
    llava = pairs.load(None, "clip_16", compat="mtmd")
    trace = from_trace(tinyllava.trace(llava, images=[pairs.picture(56, 100)]))
    graph = compare_dumps(trace, open_dump(llama_cpp / "clip_16.txt"))
    assert graph.agrees, graph.first
    assert len(graph.rows) == 41 and graph.rows[0].shape == (3, 17, 96)
    embeddings = compare_dumps(trace, open_dump(llama_cpp / "clip_16.embeddings"))
    assert embeddings.agrees and embeddings.rows[0].shape == (16, 256)
    assert trace.values["image_tokens"].load().shape == (48, 256)


def test_mtmds_known_differences_are_named_where_they_begin(pairs, llama_cpp: Path) -> None:
    comparison = compare_dumps(from_trace(picture_trace(pairs)), open_dump(llama_cpp / "clip_15.txt"))
    first = comparison.first
    assert first is not None and first.name == "vit.pre_ln" and "class_token" in first.known
    explained = {row.name: row.known for row in comparison.rows}
    assert "blocks" in explained["vit.features"]
    assert explained["mm.0.act"] == ("projector_gelu",)
    assert explained["vit.blk.1.attn_q"] == ()  # it follows from what came before
    assert comparison.choices["class_token"].startswith("class_token: first against last")


# ---- what a log looks like when it is not whole


def log_of(llama_cpp: Path) -> str:
    return (llama_cpp / "llama_bias.txt").read_text()


def dump_of(text: str, folder: Path) -> Dump:
    path = folder / "log.txt"
    path.write_text(text)
    return open_dump(path)


def test_a_log_that_breaks_off_loses_its_last_tensor_alone(llama_cpp: Path, tmp_path: Path) -> None:
    text = log_of(llama_cpp)
    whole = dump_of(text, tmp_path)
    start = text.index("l_out-1 = ")
    broken = dump_of(text[: start + 300], tmp_path)
    names = list(broken.values)
    assert "llm.blk.1.l_out" not in names and "llm.blk.1.ffn_down" in names
    for name in names:
        assert np.array_equal(broken.values[name].load(), whole.values[name].load())


def test_other_lines_between_and_the_older_programs_prefix_do_not_matter(llama_cpp: Path, tmp_path: Path) -> None:
    text = log_of(llama_cpp)
    other = "0.00.123.456 I loading\n" * 40 + text.replace("common_debug_cb_eval:", "ggml_debug:").replace(
        "    sum =", "warning: something\n    sum ="
    )
    assert list(dump_of(other, tmp_path).values) == list(dump_of(text, tmp_path).values)


def test_a_difference_where_nothing_is_printed_shows_in_the_sum(pairs, llama_cpp: Path, tmp_path: Path) -> None:
    text = log_of(llama_cpp)
    block = re.search(r"ffn_norm-0 = .*?sum = (\S+)", text, re.DOTALL)
    assert block is not None
    changed = text[: block.start(1)] + str(float(block[1]) + 40) + text[block.end(1) :]
    trace = tinyllava.trace(pairs.load("llama_bias"), "hello world", attention=True, template="plain")
    comparison = compare_dumps(from_trace(trace), dump_of(changed, tmp_path))
    assert [row.name for row in comparison.rows if row.diverges] == ["llm.blk.0.ffn_norm"]
    assert comparison.first is not None and "sums" in comparison.first.note


def test_tiles_that_are_printed_one_after_the_other_are_stacked(llama_cpp: Path, tmp_path: Path) -> None:
    text = (llama_cpp / "clip_15.txt").read_text()
    one, two = dump_of(text, tmp_path), tmp_path / "two.txt"
    two.write_text(text + text)
    value = open_dump(two).values["vit.blk.0.l_out"]
    assert value.shape == (2, *one.values["vit.blk.0.l_out"].shape)
    assert np.array_equal(value.load()[1], one.values["vit.blk.0.l_out"].load())


def test_dumps_of_one_program_are_compared_by_its_own_names(tmp_path: Path) -> None:
    arrays = {"model.layers.0.mlp": np.ones((3, 4)), "anything": np.arange(5.0)}
    np.savez(tmp_path / "a.npz", **arrays)
    np.savez(tmp_path / "b.npz", **{**arrays, "anything": np.arange(5.0)[::-1]})
    comparison = compare(tmp_path / "a.npz", tmp_path / "b.npz")
    assert [row.name for row in comparison.rows if row.diverges] == ["anything"]
