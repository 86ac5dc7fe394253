"""The registry of names: complete, unambiguous, and true of every backend."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from tinyllava.errors import UsageError
from tinyllava.language.llama import TAPS
from tinyllava.study import tap_names
from tinyllava.study.trace import Chosen, taps_of
from tinyllava.vision.encoder import PICTURE_TAPS, TOWERS
from tinyllava.vision.projector import KINDS
from tinyllava.weights import evaluate

BACKENDS = [
    ("numpy", "float32"), ("numpy", "float64"), ("numba", "float32"),
    pytest.param("cupy", "float32", marks=pytest.mark.gpu),
]  # fmt: skip


@pytest.mark.parametrize("backend, dtype", BACKENDS)
@pytest.mark.parametrize("model, mmproj", [("vicuna", "clip_16"), ("qwen2", None), ("llama_bias", "clip_linear")])
def test_every_tap_fires_once_a_layer_with_its_shape_and_dtype(pairs, backend, dtype, model, mmproj) -> None:
    try:
        llava = pairs.load(model, mmproj, backend=backend, dtype=dtype)
    except UsageError as error:
        if backend != "cupy":
            raise
        pytest.skip(str(error))
    n, n_tiles, names = 9, 0, taps_of(llava)
    recorder = Chosen(names, llava.ops.numpy)
    if mmproj:
        from tinyllava.vision.image import decode

        rgb = decode(pairs.picture(100, 60))
        n_tiles = llava.vision_model.plan(rgb).n_tiles
        llava.vision_model.encode(rgb, recorder)
    llava.logits(list(range(1, n + 1)), tap=recorder)
    assert set(recorder.values) == set(names)
    for name, letters in names.items():
        values = recorder.values[name]
        stage = name.split(".")[0]
        assert len(values) == (n_tiles if stage in ("vit", "mm") else 1), name
        config = llava.vision_model.config if mmproj and stage != "llm" else llava.language.llama.config
        known = {"n": n, "m": n, "n_tiles": n_tiles}
        for value in values:
            expected = tuple(
                len(value) if letter == "n_image_tokens" else evaluate(letter, Known(config, known))
                for letter in letters
            )
            assert value.shape == expected, name
            assert value.dtype == (np.float32 if name == "pixels" else np.dtype(dtype)), name


class Known(SimpleNamespace):
    """A model's numbers and a run's."""

    def __init__(self, config: object, more: dict[str, int]) -> None:
        super().__init__(**more)
        self._config = config

    def __getattr__(self, name: str) -> int:
        return getattr(self._config, name)


def test_every_table_is_in_the_registry_and_nothing_else() -> None:
    known = {*PICTURE_TAPS} | {f"llm.{name}" for name in TAPS}
    known |= {f"vit.{name}" for tower in TOWERS.values() for name in tower.taps}
    known |= {f"mm.{name}" for kind in KINDS.values() for name in kind.taps}
    assert set(tap_names.ENTRIES) == known
    assert set(tap_names._OTHERS) <= set(tap_names.ENTRIES)


def test_a_name_of_another_program_means_one_activation() -> None:
    for entry in tap_names.ENTRIES.values():
        name = entry.name.replace("{i}", "7")
        assert tap_names.entry(name) is entry
        if entry.transformers:
            assert tap_names.from_transformers(tap_names.full_name(entry.transformers).replace("{i}", "7")) == name
        for rank, spelling in enumerate(entry.llama_cpp):
            operation, _, rest = spelling.rpartition(" ")
            rest = rest.replace("{i}", "7")
            part = "llm" if entry.stage == "llm" else "vit"
            own_name = "-" in rest or operation == ""
            found = (
                tap_names.from_llama_cpp(rest, part, operation)
                if own_name and rest != "GELU"
                else tap_names.from_llama_cpp("node_5", part, operation or rest, rest)
            )
            assert found == (name, rank), spelling


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("model.language_model.layers.3.self_attn.o_proj<", "llm.blk.3.attn_mixed"),
        ("language_model.model.layers.3.mlp.up_proj", "llm.blk.3.ffn_up"),  # transformers before 4.52
        ("model.layers.3", "llm.blk.3.l_out"),  # a LlamaForCausalLM
        ("lm_head", "llm.result_output"),
        ("language_model.lm_head", "llm.result_output"),
        ("model.vision_tower.vision_model.encoder.layers.22.mlp.fc2", "vit.blk.22.ffn_down"),
        ("model.vision_tower.vision_tower.vision_model.pre_layrnorm", "vit.pre_ln"),  # the original
        ("vision_model.embeddings", "vit.inp_embd"),  # a CLIPVisionModel
        ("model.mm_projector.2", "mm.1.linear"),
        ("model.language_model.layers.3.self_attn", None),
        ("model.rotary_emb", None),
        ("", None),
    ],
)
def test_all_layouts_of_transformers_are_understood(theirs: str, ours: str | None) -> None:
    assert tap_names.from_transformers(theirs) == ours


def test_llama_cpps_names_depend_on_what_made_the_tensor() -> None:
    assert tap_names.from_llama_cpp("Qcur-0", "llm", "MUL_MAT", "attn_norm-0") is None
    assert tap_names.from_llama_cpp("Qcur-0", "llm", "RESHAPE") == ("llm.blk.0.attn_q", 0)
    assert tap_names.from_llama_cpp("Qcur-0", "llm", "ROPE", "inp_pos") == ("llm.blk.0.attn_q_rope", 0)
    assert tap_names.from_llama_cpp("Qcur-0", "llm") == ("llm.blk.0.attn_q_rope", 1)  # the last of that name
    assert tap_names.from_llama_cpp("Qcur-0", "vit", "RESHAPE") == ("vit.blk.0.attn_q", 0)
    assert tap_names.from_llama_cpp("ffn_up_b-4", "llm") == ("llm.blk.4.ffn_up", 0)
    assert tap_names.from_llama_cpp("ffn_up-4", "llm") == ("llm.blk.4.ffn_up", 1)
    assert tap_names.from_llama_cpp("cache_k_l0 (view)", "llm", "SET_ROWS", "attn_inp_k_idxs") is None


def test_the_walk_goes_block_by_block() -> None:
    walked = sorted(
        [
            "answer_ids", "llm.result_norm", "llm.blk.10.attn_norm", "llm.blk.2.l_out", "llm.blk.2.attn_q", "ids",
            "llm.inp_embd", "image_tokens", "mm.0.linear", "vit.features", "vit.blk.1.ln1", "vit.blk.0.l_out",
            "pixels",
        ],
        key=tap_names.walk,
    )  # fmt: skip
    assert walked == [
        "pixels", "vit.blk.0.l_out", "vit.blk.1.ln1", "vit.features", "mm.0.linear", "image_tokens", "ids",
        "llm.inp_embd", "llm.blk.2.attn_q", "llm.blk.2.l_out", "llm.blk.10.attn_norm", "llm.result_norm",
        "answer_ids",
    ]  # fmt: skip
