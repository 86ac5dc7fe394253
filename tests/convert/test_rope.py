"""RoPE's scaling in the three spellings of config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from golden.checkpoints import LLAMA3, CheckpointSpec, write_checkpoint
from golden.clip_models import ClipSpec
from golden.models import LANGUAGE, LLAMA3_ROPE, hf_config, rope_divisors
from tests.convert.conftest import convert_checkpoint, metadata_of, tensors_of
from tinyllava.convert.rope import rope_freqs, rope_scaling
from tinyllava.errors import ModelError
from tinyllava.files.gguf import open_gguf

LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0, "rope.scaling.original_context_length": 2048}


@pytest.mark.parametrize(
    "config, base, keys",
    [
        ({}, 10000.0, {}),
        ({"rope_theta": 5e6, "rope_scaling": None}, 5e6, {}),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, 10000.0, LINEAR),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 10000.0, LINEAR),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 7.0}}, 7.0, LINEAR),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, {}),
        ({"rope_scaling": {"type": "linear", "factor": 1}}, 10000.0, {}),
        (
            {"rope_scaling": {"type": "yarn", "factor": 8, "original_max_position_embeddings": 2048}},
            10000.0,
            YARN,
        ),
    ],
)
def test_spellings(config: dict[str, Any], base: float, keys: dict[str, Any]) -> None:
    theta, scaling = rope_scaling(config, 16, Path())
    assert (theta, scaling.metadata()) == (base, keys)


def test_llama_3_1s_divisors_are_the_goldens() -> None:
    spec = LANGUAGE["rope_freqs"]
    config = hf_config(spec)
    theta, scaling = rope_scaling(config, spec.head_dim, Path())
    assert scaling.settings == {"rope_type": "llama3", **LLAMA3_ROPE}
    np.testing.assert_allclose(rope_freqs(scaling, theta), rope_divisors(spec), rtol=1e-6)


def test_llama_3_1_gets_its_tensor(tmp_path: Path) -> None:
    from dataclasses import replace

    vision = ClipSpec("c", 1, image_size=28, n_embd=128, n_head=2, n_ff=64, n_block=1, n_llm=64)
    spec = CheckpointSpec("x", replace(LLAMA3, rope_freqs=True), vision, "BF16", tokenizer="llama3")
    model = convert_checkpoint(write_checkpoint(tmp_path / "in", spec), tmp_path / "out")[1].path
    assert tensors_of(model)["rope_freqs.weight"][:2] == ["F32", [8]]
    assert "llama.rope.scaling.type" not in metadata_of(model)
    with open_gguf(model) as file:
        ours = file.tensors["rope_freqs.weight"].dequantize()
        np.testing.assert_allclose(ours, rope_divisors(spec.language), 1e-6)


@pytest.mark.parametrize("config", [{"rope_scaling": {"type": "longrope"}}, {"rope_theta": "fast"}])
def test_what_gguf_cannot_say(config: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"config.json: rope"):
        rope_scaling(config, 16, Path())
