"""What mmproj files say, what they leave out, and what is refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from golden.clip_models import CLIP_MEAN, CLIP_STD, VISION
from tests.vision.models import Write, encode, load_model
from tinyllava.errors import ModelError
from tinyllava.files.gguf import GGUFFile
from tinyllava.names import PROJECTOR_KINDS, RUNNING_PROJECTORS, find_projector
from tinyllava.vision.config import VisionConfig, projector_kind
from tinyllava.vision.image import Size
from tinyllava.vision.projector import KINDS

V = "clip.vision."


def test_a_legacy_file(files: dict[str, GGUFFile]) -> None:
    config = VisionConfig.from_gguf(files["clip_15"])
    spec = VISION["clip_15"]
    assert (config.n_embd, config.n_ff, config.n_head, config.head_dim) == (96, 192, 4, 24)
    assert (config.n_block, config.n_embd_llm) == (spec.n_block, spec.n_llm)
    assert (config.image_px, config.patch_px, config.n_patches) == (56, 14, 16)
    assert (config.aspect, config.merge, config.pinpoints) == ("pad", "flat", ())
    np.testing.assert_allclose([config.mean, config.std], [CLIP_MEAN, CLIP_STD], rtol=1e-7)
    assert config.ffn_swapped and config.notes == ()


def test_a_16_file(files: dict[str, GGUFFile]) -> None:
    config = VisionConfig.from_gguf(files["clip_16"])
    assert (config.aspect, config.merge, config.newline) == ("anyres", "spatial_unpad", "model.")
    assert config.pinpoints[:2] == (Size(112, 56), Size(56, 112))  # the file's first is 56 wide, 112 high
    assert VisionConfig.from_gguf(files["clip_16_flat"]).merge == "flat"
    assert VisionConfig.from_gguf(files["clip_16_new"]).newline == "v."


def test_activations(files: dict[str, GGUFFile]) -> None:
    expected = {"clip_15": "gelu_quick", "clip_gelu": "gelu_erf", "clip_silu": "silu"}
    assert {name: VisionConfig.from_gguf(files[name]).activation for name in expected} == expected


# ---- what is missing is inferred


def test_without_any_key(write: Write) -> None:
    """The head count is guessed as CLIP's and noted; everything else is certain."""
    keys = dict.fromkeys(key for key in ALL_KEYS if key.startswith("clip."))
    tensors = {f"v.blk.{i}.attn_q.weight": np.zeros((96, 96), np.float32) for i in range(3)}
    config = VisionConfig.from_gguf(write(VISION["clip_15"], keys, tensors))
    assert (config.n_head, config.image_px, config.n_ff, config.norm_eps) == (1, 56, 192, 1e-5)
    assert [note.split(":")[0] for note in config.notes] == [
        "no projector_type",
        "no image_size",
        "no attention.head_count",
    ]


ALL_KEYS = (
    "clip.has_text_encoder clip.has_vision_encoder clip.has_llava_projector clip.projector_type clip.use_gelu "
    "clip.vision.image_size clip.vision.patch_size clip.vision.embedding_length "
    "clip.vision.feed_forward_length clip.vision.block_count clip.vision.attention.head_count "
    "clip.vision.projection_dim clip.vision.attention.layer_norm_epsilon clip.vision.image_mean "
    "clip.vision.image_std"
).split()


def test_sizes_come_from_shapes_and_not_from_keys(write: Write) -> None:
    """Old Qwen converters wrote 0 and a comment; clip-quantize rewrites others."""
    keys = {V + "feed_forward_length": 0, V + "embedding_length": 1, V + "patch_size": 9, V + "projection_dim": 0}
    config = VisionConfig.from_gguf(write(VISION["clip_15"], keys))
    assert (config.n_ff, config.n_embd, config.patch_px) == (192, 96, 14)


def test_more_blocks_than_block_count_all_run(write: Write) -> None:
    config = VisionConfig.from_gguf(write(VISION["clip_15"], {V + "block_count": 2}))
    assert config.n_block == 3
    assert config.notes == ("block_count says 2, but 3 blocks are stored, and run",)


@pytest.mark.parametrize("name", [V + "projector_type", "clip.projector_type"])
def test_both_keys_of_the_projector(name: str, write: Write) -> None:
    keys = {"clip.projector_type": None, name: "mlp"}
    assert VisionConfig.from_gguf(write(VISION["clip_15"], keys)).projector == "mlp"


def test_a_linear_projector_whose_file_says_mlp(write: Write, files: dict[str, GGUFFile]) -> None:
    """The 2023 script writes "mlp" whatever the projector is."""
    rgb = np.full((56, 56, 3), 100, np.uint8)
    model = load_model(write(VISION["clip_linear"], {"clip.projector_type": "mlp"}))
    assert np.array_equal(encode(rgb, model), encode(rgb, load_model(files["clip_linear"])))


def test_deeper_projectors(write: Write) -> None:
    """mlp3x_gelu of the original: another GELU and another layer."""
    spec = VISION["clip_gelu"]
    weight, bias = np.eye(spec.n_llm, dtype=np.float32), np.full(spec.n_llm, 100, np.float32)
    model = load_model(write(spec, tensors={"mm.4.weight": weight, "mm.4.bias": bias}))
    assert model.config.projector == "mlp" and len(model.projector.layers) == 3
    tokens = encode(np.zeros((9, 9, 3), np.uint8), model)
    assert tokens.min() > 100 - 0.17 - 1e-4  # GELU's least value is -0.17


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64])
@pytest.mark.parametrize("pad", [0, 6])
def test_pinpoints_of_every_kind(dtype: type, pad: int, files: dict[str, GGUFFile]) -> None:
    """Flat or nested, of any integer type, filled up with zeros or not."""
    file = files["clip_16"]
    values = [56, 112, 112, 56]
    for stored in (np.array(values + [0] * pad, dtype), [[56, 112], [112, 56]]):
        config = VisionConfig.from_gguf(with_keys(file, {V + "image_grid_pinpoints": stored}))
        assert config.pinpoints == (Size(112, 56), Size(56, 112))


def with_keys(file: GGUFFile, keys: dict[str, Any]) -> GGUFFile:
    """The same open file, saying other things."""
    return replace(file, metadata={key: v for key, v in (file.metadata | keys).items() if v is not None})


@pytest.mark.parametrize(
    ("name", "aspect", "expected"),
    [
        ("clip_15", None, "pad"),
        ("clip_15", "pad", "pad"),
        ("clip_15", "square", "square"),
        ("clip_16", None, "anyres"),
        ("clip_16", "anyres", "anyres"),
        ("clip_16", "pad", "pad"),
    ],
)
def test_aspects(name: str, aspect: str | None, expected: str, files: dict[str, GGUFFile]) -> None:
    keys = {V + "image_aspect_ratio": aspect}
    assert VisionConfig.from_gguf(with_keys(files[name], keys)).aspect == expected


# ---- what is wrong is refused, by name

NUMBER = "wanted a positive number"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({V + "image_size": 70}, "70 with patches of 14 px and 17 positions; wanted an image_size of 56"),
        ({V + "image_size": "56"}, NUMBER),
        ({V + "attention.head_count": 5}, "head_count 5; wanted a divisor of n_embd 96"),
        ({V + "attention.head_count": 0}, NUMBER),
        ({V + "attention.layer_norm_epsilon": float("nan")}, NUMBER),
        ({V + "block_count": 5}, "4 blocks stored; wanted 5"),
        ({V + "feature_layer": [1, 3]}, r"several layers \[1, 3\]; wanted one"),
        ({V + "feature_layer": [5]}, r"feature_layer 5; wanted 0..4"),
        ({V + "feature_layer": [-2]}, r"feature_layer -2; wanted 0..4"),
        ({V + "feature_layer": "last"}, "not an array of integers"),
        ({V + "image_mean": [0.5, 0.5]}, "three numbers"),
        ({V + "image_mean": "grey"}, "three numbers"),
        ({V + "image_mean": [0.5, float("nan"), 0.5]}, "three numbers"),
        ({V + "image_std": [0.5, 0.0, 0.5]}, "three numbers above 0"),
        ({V + "image_grid_pinpoints": [[56], [56, 112]]}, "not an array of integers"),
        ({"clip.use_gelu": True, "clip.use_silu": True}, "both true"),
        ({"clip.use_gelu": "no"}, "clip.use_gelu is 'no'; wanted true or false"),
        ({"clip.projector_type": "ldpv2"}, "projector 'ldpv2'; wanted mlp or linear"),
        ({"clip.projector_type": "resampler"}, "projector 'resampler'"),
        ({"clip.projector_type": 3}, "wanted a string"),
        ({V + "image_grid_pinpoints": [56, 112, 56]}, "3 numbers; wanted pairs"),
        ({V + "image_grid_pinpoints": [57, 112]}, "has 57x112"),
        ({V + "image_grid_pinpoints": [-56, 56]}, "has -56x56"),
        ({V + "image_grid_pinpoints": [5600000, 56]}, "has 5600000x56"),
        ({V + "image_grid_pinpoints": [0], V + "image_aspect_ratio": "anyres"}, "without image_grid_pinpoints"),
        ({V + "image_aspect_ratio": "anyres_max_9"}, "'anyres_max_9'; wanted pad, square or anyres"),
        ({V + "mm_patch_merge_type": "maxpool2x2"}, "'maxpool2x2'; wanted flat, spatial or spatial_unpad"),
    ],
)
def test_wrong_keys(keys: dict[str, Any], message: str, files: dict[str, GGUFFile]) -> None:
    with pytest.raises(ModelError, match=message):
        VisionConfig.from_gguf(with_keys(files["clip_16"], keys))


MARKS = {
    "mlp_norm": "mm.3.weight",
    "ldp": "mm.model.mb_block.1.block.0.0.weight",
    "ldpv2": "mm.model.peg.0.weight",
    "resampler": "resampler.query",
}


@pytest.mark.parametrize("kind", MARKS)
def test_other_projectors_are_known_by_their_tensors(kind: str, write: Write) -> None:
    file = write(VISION["clip_15"], tensors={MARKS[kind]: np.zeros(4, np.float32)})
    with pytest.raises(ModelError, match=f"projector '{kind}'; wanted mlp or linear"):
        VisionConfig.from_gguf(file)


def test_the_table_of_names_and_the_forward_passes_know_the_same_kinds() -> None:
    assert set(RUNNING_PROJECTORS) == KINDS.keys()
    for kind in PROJECTOR_KINDS:
        assert find_projector([kind.sign, "v.class_embd"]) == kind
        stored_as = kind.stored_as or kind.name
        assert projector_kind({"clip.projector_type": stored_as}, [kind.sign]) == kind.name


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"v.class_embd": None}, "without v.class_embd"),
        ({"v.position_embd.weight": None}, "v.position_embd.weight is missing"),
        ({"v.position_embd.weight": np.zeros((16, 96), np.float32)}, "16 rows; wanted 1 \\+ a square"),
        ({"v.position_embd.weight": np.zeros((1, 96), np.float32)}, "1 rows; wanted 1 \\+ a square"),
        ({"v.patch_embd.weight": np.zeros((96, 588), np.float32)}, r"shape \(96, 588\); wanted 4 axes"),
        ({"v.blk.4.ln1.weight": np.zeros(96, np.float32)}, "block v.blk.3 is missing"),
        ({"v.blk.0.attn_qkv.weight": np.zeros((288, 96), np.float32)}, "fused tensors attn_qkv"),
        ({"mm.0.weight": None, "mm.2.weight": None}, "mm.weight is missing"),
    ],
)
def test_wrong_tensors(tensors: dict[str, Any], message: str, write: Write) -> None:
    with pytest.raises(ModelError, match=message):
        VisionConfig.from_gguf(write(VISION["clip_15"], tensors=tensors))


def test_spatial_unpad_needs_the_newline(write: Write) -> None:
    with pytest.raises(ModelError, match="without the tensor image_newline"):
        VisionConfig.from_gguf(write(VISION["clip_16"], tensors={"model.image_newline": None}))


def test_a_language_model_is_no_mmproj(files: dict[str, GGUFFile]) -> None:
    file = files["clip_15"]
    language = replace(file, tensors={"token_embd.weight": file.tensors["mm.0.weight"]})
    with pytest.raises(ModelError, match="This is the language model; give the mmproj file"):
        VisionConfig.from_gguf(language)


NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.floats(width=32) | st.integers(-3, 300)
WORDS = st.text(max_size=9) | st.sampled_from(["mlp", "linear", "anyres", "pad", "spatial"])
LEAVES = NUMBERS | WORDS | st.booleans()
VALUES = st.recursive(LEAVES, lambda value: st.lists(value, max_size=4), max_leaves=6)
READ_KEYS = [key for key in ALL_KEYS if key not in ("clip.has_text_encoder", "clip.has_vision_encoder")] + [
    V + name for name in ("image_grid_pinpoints", "mm_patch_merge_type", "image_aspect_ratio", "feature_layer")
]


@given(st.dictionaries(st.sampled_from(READ_KEYS), VALUES, min_size=1, max_size=3))
def test_any_keys_give_a_config_or_a_model_error(files: dict[str, GGUFFile], keys: dict[str, Any]) -> None:
    try:
        config = VisionConfig.from_gguf(with_keys(files["clip_16"], keys))
    except ModelError as error:
        assert "\n" not in str(error)
    else:
        assert config.n_block <= 4 and config.n_embd % config.n_head == 0
