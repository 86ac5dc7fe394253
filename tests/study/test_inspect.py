"""What `tinyllava inspect` says about a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tinyllava.errors import ModelError
from tinyllava.files import open_gguf
from tinyllava.language.config import read_config
from tinyllava.study.inspect import (
    LANGUAGE_MODEL,
    MMPROJ,
    OTHER,
    VOCABULARY,
    describe,
    format_report,
    verdict,
)
from tinyllava.vision.config import projector_kind

LLAMA = {"general.architecture": "llama"}
CLIP = {"general.architecture": "clip"}
TOWER = ["v.class_embd", "v.patch_embd.weight", "v.blk.0.attn_q.weight"]
MLP = ["mm.0.weight", "mm.0.bias", "mm.2.weight", "mm.2.bias"]
MLP_SAID = {"clip.projector_type": "mlp"}
LLM = ["token_embd.weight", "blk.0.attn_q.weight"]


@pytest.mark.parametrize(
    ("metadata", "names", "kind", "runnable", "said"),
    [
        (LLAMA, LLM, LANGUAGE_MODEL, True, "llama"),
        ({"general.architecture": "qwen2"}, LLM, LANGUAGE_MODEL, True, "qwen2"),
        ({"general.architecture": "gemma3"}, LLM, LANGUAGE_MODEL, False, "'gemma3'; tinyllava runs llama"),
        ({}, LLM, LANGUAGE_MODEL, False, "no general.architecture"),
        (LLAMA | {"llama.expert_count": 8}, LLM, LANGUAGE_MODEL, False, "mixture of experts"),
        (LLAMA | {"split.count": 3}, LLM, LANGUAGE_MODEL, False, "One of 3 parts"),
        (LLAMA | {"tokenizer.ggml.tokens": ["a"]}, [], VOCABULARY, False, "tokenizes"),
        (LLAMA | {"general.type": "adapter"}, ["blk.0.attn_q.weight.lora_a"], OTHER, False, "LoRA"),
        ({"general.type": "imatrix"}, ["blk.0.attn_q.weight.in_sum2"], OTHER, False, "importance matrix"),
        ({"general.architecture": "whisper"}, ["encoder.x"], OTHER, False, "'whisper'"),
        ({}, [], OTHER, False, "No general.architecture"),
        (CLIP, TOWER + MLP, MMPROJ, True, "projector 'mlp'"),
        ({}, TOWER + MLP, MMPROJ, True, "projector 'mlp'"),
        (CLIP | MLP_SAID, [*TOWER, "mm.weight", "mm.bias"], MMPROJ, True, "'linear'"),
        (CLIP, [*TOWER, "mm.0.weight"], MMPROJ, True, "'linear'"),
        (CLIP | MLP_SAID, [*TOWER, *MLP, "mm.3.weight"], MMPROJ, False, "'mlp_norm'"),
        (CLIP, [*TOWER, "mm.model.mb_block.1.block.0.0.weight"], MMPROJ, False, "'ldp'"),
        (CLIP, [*TOWER, "mm.model.mlp.0.weight", "mm.model.peg.0.weight"], MMPROJ, False, "'ldpv2'"),
        (CLIP, [*TOWER, "resampler.query"], MMPROJ, False, "'resampler'"),
        (CLIP | {"clip.vision.projector_type": "gemma3"}, [*TOWER, "mm.x"], MMPROJ, False, "'gemma3'"),
        (CLIP, [*TOWER, "mm.x"], MMPROJ, False, "'unknown'"),
        (CLIP, TOWER, MMPROJ, False, "without a projector"),
        (CLIP, ["t.blk.0.x"], MMPROJ, False, "a text encoder, and no image encoder"),
        (CLIP, ["a.blk.0.x", *MLP], MMPROJ, False, "an audio encoder"),
        (CLIP, [*TOWER[1:], *MLP], MMPROJ, False, "SigLIP"),
        (CLIP, [*TOWER, *MLP, "v.blk.0.attn_qkv.weight"], MMPROJ, False, "attn_qkv"),
    ],
)  # fmt: skip
def test_verdict(metadata: dict[str, Any], names: list[str], kind: str, runnable: bool, said: str) -> None:
    found = verdict(metadata, names)
    assert (found.kind, found.runnable) == (kind, runnable)
    assert said in found.reason


def test_tensors_outvote_the_key_that_old_converters_always_write() -> None:
    assert projector_kind({"clip.projector_type": "mlp"}, ["mm.weight"]) == "linear"
    assert projector_kind({}, ["mm.0.weight", "mm.2.weight"]) == "mlp"
    assert projector_kind({}, ["v.class_embd"]) == ""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for key in ("block_count", "attention.head_count", "feed_forward_length"):
        writer.add_uint32(f"llama.{key}", 1)
    writer.add_float32("x.nan", float("nan"))
    writer.add_bool("x.yes", True)
    writer.add_string("x.evil", "one\x1b[2J\ntwo")
    writer.add_string("x.long", "la" * 500)
    writer.add_array("x.short", [0.25, float("inf")])
    writer.add_array("tokenizer.ggml.tokens", [f"token{i}" for i in range(1000)])
    writer.add_array("tokenizer.ggml.scores", [float(i) for i in range(1000)])
    writer.add_tensor("token_embd.weight", np.zeros((4, 34), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "a.gguf"


def test_description_is_plain_data_with_long_arrays_summarised(model: Path) -> None:
    file = open_gguf(model)
    found = describe(file)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["kind"], found["runnable"]) == (LANGUAGE_MODEL, True)
    assert (found["n_parameters"], found["n_tensors"]) == (160, 2)
    assert found["bits_per_weight"] == 8 * (4 * 34 + 128) / 160
    assert found["types"] == {
        "Q8_0": {"tensors": 1, "weights": 128, "bytes": 136},
        "F32": {"tensors": 1, "weights": 32, "bytes": 128},
    }
    assert found["tensors"][0]["shape"] == [4, 32]
    assert found["metadata"]["tokenizer.ggml.tokens"] == {
        "length": 1000,
        "type": "string",
        "first": ["token0", "token1", "token2", "token3"],
    }
    assert found["metadata"]["x.short"] == [0.25, "inf"]
    assert found["metadata"]["x.nan"] == "nan"
    assert len(found["metadata"]["x.long"]) == 1000


def test_the_loaders_reader_has_the_last_word(tmp_path: Path) -> None:
    """A file whose names are those of a model, without the numbers that a model needs."""
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_uint32("llama.attention.head_count", 3)
    writer.add_uint32("llama.attention.head_count_kv", 2)
    writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(tmp_path / "a.gguf")
    assert verdict(file.metadata, file.tensors).runnable
    found = describe(file)
    with pytest.raises(ModelError, match="3 heads on 2 kv heads"):
        read_config(file)
    assert (found["kind"], found["runnable"]) == (LANGUAGE_MODEL, False)
    assert found["reason"] == "3 heads on 2 kv heads, but tinyllava needs a multiple"


def test_report_is_text_that_a_terminal_can_show(model: Path) -> None:
    report = format_report(describe(open_gguf(model)), tensors=True)
    assert f"{model}: " in report
    assert "language model, runs. A language model of architecture llama: give it as -m." in report
    assert "llama.attention.layer_norm_rms_epsilon = 1e-05\n" in report
    assert "x.yes = true\n" in report
    assert "x.evil = one\\x1b[2J\\ntwo\n" in report
    assert "(1,000 characters)" in report
    assert "[token0, token1, token2, token3, ...] (1,000 of type string)" in report
    assert "tensors (2): 160 weights, 13.20 bits each" in report
    assert "token_embd.weight   Q8_0     136 bytes  4 x 32" in report
    assert "token_embd.weight" not in format_report(describe(open_gguf(model)))
    assert all(character.isprintable() or character == "\n" for character in report)


def test_a_file_without_tensors_has_no_bits_per_weight(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(16))
    found = describe(open_gguf(tmp_path / "a.gguf"))
    assert found["bits_per_weight"] is None
    assert "tensors (0): 0 weights\n" in format_report(found) + "\n"
