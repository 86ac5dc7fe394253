"""Traces: what is in them, what can be asked for, and what is said when it cannot be had."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import tinyllava
from tinyllava.errors import FileError, UsageError
from tinyllava.study.compare.dumps import open_dump
from tinyllava.study.trace import taps_of


def test_a_trace_holds_the_whole_run(pairs) -> None:
    llava = pairs.load("vicuna", "clip_16")
    trace = tinyllava.trace(llava, "What?", [pairs.picture(100, 60)], attention=True, max_tokens=3)
    assert set(trace) == {*taps_of(llava), "ids", "answer_ids"}
    n_prompt, n_tiles = trace.settings["prompt_tokens"], 5
    assert trace["pixels"].shape == (n_tiles, 3, 56, 56)
    assert trace["vit.blk.3.attn_q"].shape == (n_tiles, 17, 4, 24)
    assert trace["mm.1.linear"].shape == (n_tiles, 16, 256)
    assert trace["image_tokens"].shape == (52, 256)
    assert trace["ids"].shape == (n_prompt,) and (trace["ids"] == -1).sum() == 52
    assert trace["llm.inp_embd"].shape == (n_prompt + 2, 256)  # the answer's last token is not read again
    assert np.array_equal(trace["llm.inp_embd"][:n_prompt][trace["ids"] == -1], trace["image_tokens"])
    assert trace["llm.blk.1.attn_weights"].shape == (8, n_prompt + 2, n_prompt + 2)
    assert trace["llm.result_output"].shape == (3, 512)
    assert trace["llm.result_output"].argmax(axis=-1).tolist() == trace["answer_ids"].tolist()


def test_attention_is_a_distribution_over_what_came_before(pairs) -> None:
    trace = tinyllava.trace(pairs.load("vicuna", "clip_15", n_batch=50), 
        "<image>Hi there", [pairs.picture(70, 30)], attention=True, max_tokens=3
    )
    for name, weights in trace.items():
        if name.endswith("attn_weights"):
            assert np.allclose(weights.sum(axis=-1), 1.0, atol=1e-5)
            if name.startswith("llm."):
                assert not np.triu(weights, 1).any()


def test_the_answer_is_what_generate_gives(pairs) -> None:
    llava = pairs.load("vicuna", "clip_15")
    trace = tinyllava.trace(llava, "What is it?", [pairs.picture(60, 100)], max_tokens=6)
    result = llava.generate("What is it?", [pairs.picture(60, 100)], max_tokens=6)
    assert trace["answer_ids"].tolist() == result.tokens and trace.settings["answer"] == result.text


def test_two_pictures_keep_their_order(pairs) -> None:
    llava = pairs.load("vicuna", "clip_16")
    pictures = [pairs.picture(100, 60), pairs.picture(40, 30)]
    trace = tinyllava.trace(llava, "Which?", pictures, only=["pixels", "image_tokens"])
    plans = trace.settings["pictures"]
    assert len(trace["pixels"]) == sum(plan["n_tiles"] for plan in plans)
    first, second = map(llava.encode_image, pictures)
    assert np.array_equal(trace["image_tokens"], np.concatenate([first, second]))
    assert [(trace["ids"] == -1 - i).sum() for i in (0, 1)] == [len(first), len(second)]


@pytest.mark.parametrize(
    "only, expected",
    [
        ("llm.blk.0.attn_q", {"llm.blk.0.attn_q"}),
        ("blk.1.ffn_inp", {"vit.blk.1.ffn_inp", "llm.blk.1.ffn_inp"}),
        (["pixels", "llm.result_*"], {"pixels", "llm.result_norm", "llm.result_output"}),
        ("llm.blk.?.attn_weights", {"llm.blk.0.attn_weights", "llm.blk.1.attn_weights"}),
        ("model.language_model.layers.1.mlp.down_proj", {"llm.blk.1.ffn_down"}),  # transformers' name will do
    ],
)
def test_only_what_was_asked_for_is_recorded(pairs, only, expected: set[str]) -> None:
    trace = tinyllava.trace(pairs.load("vicuna", "clip_15"), "Hi", [pairs.picture(56, 56)], only=only)
    assert set(trace) - {"ids", "answer_ids"} == expected


def test_attention_comes_on_request(pairs) -> None:
    llava = pairs.load("vicuna")
    assert not any("attn_weights" in name for name in tinyllava.trace(llava, "Hi"))
    asked = set(tinyllava.trace(llava, "Hi", only="llm.result_norm", attention=True)) - {"ids", "answer_ids"}
    assert asked == {"llm.result_norm", "llm.blk.0.attn_weights", "llm.blk.1.attn_weights"}


@pytest.mark.parametrize(
    "wrong, near",
    [
        ("llm.blk.9.attn_q", "llm.blk.0.attn_q"),
        ("blk.0.atn_norm", "llm.blk.0.attn_norm"),
        ("image_token", "image_tokens"),
        ("vit.blk.0.atn*", "vit.blk.0.attn_"),
        ("vit.blk.3.l_out", "vit.blk.2.l_out"),  # the checkpoint's last block is not in the file
        ("logits", "one of pixels, "),
    ],
)
def test_a_tap_that_does_not_exist_lists_the_nearest(pairs, wrong: str, near: str) -> None:
    with pytest.raises(UsageError) as caught:
        tinyllava.trace(pairs.load("vicuna", "clip_15"), "Hi", only=["pixels", wrong])
    message = str(caught.value)
    assert message.startswith(f"tap {wrong}: no tap of this model; wanted ") and near in message
    assert "trace --list" in message


def test_a_linear_projector_has_the_taps_of_one_layer(pairs) -> None:
    names = taps_of(pairs.load(None, "clip_linear"))
    assert [name for name in names if name.startswith("mm.")] == ["mm.0.linear"]


def test_an_image_encoder_alone_is_traced_on_its_pictures(pairs) -> None:
    llava = pairs.load(None, "clip_15")
    trace = tinyllava.trace(llava, images=[pairs.picture(70, 30), pairs.picture(30, 70)])
    assert trace["pixels"].shape[0] == trace["vit.features"].shape[0] == 2 and "ids" not in trace
    with pytest.raises(UsageError, match="a picture: there is no language model"):
        tinyllava.trace(llava, "Hi")


def test_settings_say_how_it_came_about_and_survive_the_file(pairs, tmp_path: Path) -> None:
    llava = pairs.load("vicuna", "clip_15", compat="hf", dtype="float64", n_batch=64)
    trace = tinyllava.trace(llava, "What?", [pairs.picture(60, 100)], only="llm.result_norm")
    trace.save(tmp_path / "t.npz")
    with np.load(tmp_path / "t.npz") as file:  # by anyone who has NumPy
        settings = json.loads(file["settings"].tobytes())
        assert np.array_equal(file["llm.result_norm"], trace["llm.result_norm"])
        assert file["llm.result_norm"].dtype == np.float64
    assert settings == trace.settings
    expected = {"compat": "hf", "backend": "numpy", "dtype": "float64", "model": "vicuna.gguf", "prompt": "What?"}
    assert {key: settings[key] for key in expected} == expected
    assert settings["profile"]["exif"] == "rotate" and settings["pictures"][0]["size"] == [100, 60]
    dump = open_dump(tmp_path / "t.npz")
    assert dump.is_trace and list(dump.values) == list(trace)


def test_two_traces_of_one_run_are_the_same_bytes(pairs, tmp_path: Path) -> None:
    for name in ("a", "b"):
        tinyllava.trace(pairs.load("vicuna"), "What?").save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_file_that_cannot_be_written_is_named(pairs, tmp_path: Path) -> None:
    trace = tinyllava.trace(pairs.load("vicuna"), "What?", only="llm.result_norm")
    with pytest.raises(FileError, match="there is no such directory"):
        trace.save(tmp_path / "absent" / "t.npz")
    assert not list(tmp_path.iterdir())


def test_tracing_changes_nothing_that_is_computed(pairs) -> None:
    llava = pairs.load("vicuna", "clip_16")
    traced = tinyllava.trace(llava, "What?", [pairs.picture(100, 60)], attention=True, max_tokens=4)
    plain = tinyllava.trace(llava, "What?", [pairs.picture(100, 60)], only="llm.result_output", max_tokens=4)
    assert np.array_equal(traced["llm.result_output"], plain["llm.result_output"])
