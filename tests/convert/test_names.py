"""The table of names: no name stands for two arrays, and gguf's own table agrees."""

from __future__ import annotations

import re

import gguf
import pytest

from golden.checkpoints import CHECKPOINTS, split_state
from tinyllava.convert.surgery import original_name
from tinyllava.names import LANGUAGE, NEWLINE, PROJECTOR, SPELLINGS, TOWER, identify

ROWS = [*LANGUAGE, *TOWER, *PROJECTOR, *NEWLINE]


def test_every_name_stands_once() -> None:
    for column in ("gguf", "original"):
        names = [getattr(row, column) for row in ROWS]
        assert len(set(names)) == len(names)
    assert len(SPELLINGS) == len({*SPELLINGS})


@pytest.mark.parametrize("row", LANGUAGE, ids=lambda row: row.gguf)
def test_the_language_models_names_are_ggufs(row: object) -> None:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 9)
    theirs = names.get_name(row.original.replace("{i}", "7"))
    assert theirs == row.gguf.replace("{i}", "7")


@pytest.mark.parametrize("spec", CHECKPOINTS.values(), ids=lambda spec: spec.name)
def test_every_array_of_every_layout_is_known(spec: object) -> None:
    state, tower = split_state(spec)
    assert [name for name in (*state, *tower) if identify(name) is None] == []


@pytest.mark.parametrize(
    "name, gguf_name",
    [
        ("model.layers.31.self_attn.q_proj.weight", "blk.31.attn_q.weight"),
        ("model.language_model.layers.3.mlp.gate_proj.weight", "blk.3.ffn_gate.weight"),
        ("language_model.model.norm.weight", "output_norm.weight"),
        ("language_model.lm_head.weight", "output.weight"),
        ("vision_model.encoder.layers.2.mlp.fc1.weight", "v.blk.2.ffn_down.weight"),
        ("vision_tower.vision_model.encoder.layers.2.mlp.fc2.bias", "v.blk.2.ffn_up.bias"),
        ("model.vision_tower.encoder.layers.22.layer_norm1.bias", "v.blk.22.ln1.bias"),
        ("model.vision_tower.embeddings.class_embedding", "v.class_embd"),
        ("model.vision_tower.pre_layrnorm.weight", "v.pre_ln.weight"),
        ("vision_model.embeddings.patch_embedding.weight", "v.patch_embd.weight"),
        ("multi_modal_projector.linear_2.bias", "mm.2.bias"),
        ("model.mm_projector.weight", "mm.weight"),
        ("model.mm_projector.mlp.mlp.0.weight", "mm.model.mlp.0.weight"),
        ("model.mm_projector.peg.peg.0.bias", "mm.model.peg.0.bias"),
        ("image_newline", "model.image_newline"),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", ""),
        ("vision_model.embeddings.position_ids", ""),
        ("text_model.final_layer_norm.weight", ""),
    ],
)
def test_names_by_hand(name: str, gguf_name: str) -> None:
    identity = identify(name)
    assert identity is not None and identity.gguf == gguf_name


@pytest.mark.parametrize("name", ["", "model.layers.0.block_sparse_moe.gate.weight", "model.layers.x", "a" * 99])
def test_other_names_are_unknown(name: str) -> None:
    assert identify(name) is None


def test_original_names_come_back() -> None:
    for row in (*TOWER, *PROJECTOR, *NEWLINE):
        name = (row.original + ("" if row.whole else ".weight")).replace("{i}", "11")
        identity = identify(name)
        assert identity is not None and original_name(identity.gguf) == name
        assert identity.block == (11 if re.search(r"\{i\}", row.original) else None)
