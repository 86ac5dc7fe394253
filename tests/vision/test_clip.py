"""The vision tower and the projector against transformers and the original LLaVA, and what must always hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from golden.clip_models import VISION, write_mmproj
from golden.pictures import picture
from tests.vision.models import Write, encode, load_model
from tinyllava.errors import ModelError
from tinyllava.files.gguf import GGUFFile, open_gguf
from tinyllava.ops.select import select
from tinyllava.tap import Recorder
from tinyllava.vision.anyres import make_tiles, plan_picture
from tinyllava.vision.clip import split_patches, tile_features
from tinyllava.vision.encoder import VisionModel
from tinyllava.vision.image import size_of
from tinyllava.weights import evaluate

GOLDEN = Path(__file__).parents[2] / "golden"
ORIGINAL = np.load(GOLDEN / "original-images.npz")
HF = np.load(GOLDEN / "hf-clip.npz")
ASPECTS = {"pad": "pad", "crop": "square", "anyres": "anyres"}
STORED_COLUMNS = slice(None, None, 8)  # golden/makers/original.py: COLUMN_STEP

Floats = np.ndarray[Any, Any]


def error(found: Floats, wanted: Floats) -> float:
    """The 2-norm of the difference, relative to what is wanted."""
    assert found.shape == wanted.shape
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def golden_picture(case: str) -> tuple[str, str, Floats]:
    """ "clip_15.pad.100x60" -> the model's name, the config's aspect, the picture."""
    name, aspect, size = case.split(".")[:3]
    width, height = (int(side) for side in size.split("x"))
    return name, ASPECTS[aspect], picture(width, height)


# ---- outside oracles


@pytest.mark.parametrize("case", [case for case in ORIGINAL if not case.endswith(".pixels")])
def test_image_embeddings_are_the_originals(case: str, files: dict[str, GGUFFile]) -> None:
    name, aspect, rgb = golden_picture(case)
    tokens = encode(rgb, load_model(files[name], aspect=aspect))
    # Float32 sums in another order. 1e-6 is what float64 here measures too, so the original's own rounding.
    assert error(tokens[:, STORED_COLUMNS], ORIGINAL[case]) < 4e-6


@pytest.mark.parametrize("case", [case for case in ORIGINAL if case.endswith(".pixels")])
def test_pixels_are_the_originals_to_the_last_bit(case: str, files: dict[str, GGUFFile]) -> None:
    name, aspect, rgb = golden_picture(case)
    config = load_model(files[name], aspect=aspect).config
    tiles = make_tiles(rgb, plan_picture(size_of(rgb), config), config)
    assert np.array_equal(tiles, ORIGINAL[case].reshape(tiles.shape))


@pytest.mark.parametrize("name", ["clip_15", "clip_gelu", "clip_silu"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_each_block_gives_what_transformers_gives(name: str, dtype: str, files: dict[str, GGUFFile]) -> None:
    model, tap = load_model(files[name], select("numpy", dtype=dtype)), Recorder()
    features = tile_features(HF["pixels"][0], model.weights, model.config, model.ops, tap)
    states = [tap["pre_ln"], *(tap[f"blk.{i}.l_out"] for i in range(model.config.n_block))]
    assert features.dtype == dtype
    for found, wanted in zip(states, HF[f"{name}.hidden"], strict=True):
        assert error(found, wanted) < 2e-6
    assert np.array_equal(features, states[-1][1:])  # hidden_states[-2] of the whole tower, without CLS


def test_a_fast_backend_sees_the_same(files: dict[str, GGUFFile]) -> None:
    rgb = picture(100, 60)
    for name in ("clip_15", "clip_16", "clip_gelu"):
        fast = encode(rgb, load_model(files[name], select("numba")))
        # numba rounds what meets 16-bit weights to 15 bits
        assert error(fast, encode(rgb, load_model(files[name]))) < 2e-4


def test_old_new_and_minimal_files_are_one_model(files: dict[str, GGUFFile]) -> None:
    rgb = picture(57, 90)
    for names in (("clip_15", "clip_15_new", "clip_min"), ("clip_16", "clip_16_new")):
        tokens = [encode(rgb, load_model(files[name])) for name in names]
        # The new files hold the patch kernel in F32, with values that F16 holds too.
        assert all(np.array_equal(other, tokens[0]) for other in tokens[1:])


@pytest.mark.parametrize(("dtype", "limit"), [("F16", 1e-3), ("Q8_0", 2e-2), ("Q4_0", 0.3)])
def test_quantized_files_even_their_position_embeddings(dtype: str, limit: float, tmp_path: Path) -> None:
    """llama.cpp's clip-quantize turns every matrix whose name ends in "weight" into blocks."""
    rgb, tokens = picture(100, 60), []
    for kind in ("F32", dtype):
        write_mmproj(tmp_path / f"{kind}.gguf", VISION["clip_16"], kind)
        file = open_gguf(tmp_path / f"{kind}.gguf")
        tokens.append(encode(rgb, load_model(file)))
    assert file.tensors["v.position_embd.weight"].type == dtype
    assert 0 < error(tokens[1], tokens[0]) < limit


# ---- by hand


def test_patches_are_rows_of_pixels_colour_by_colour() -> None:
    pixels = np.arange(3 * 4 * 5).reshape(3, 4, 5)
    config: Any = SimpleNamespace(grid_patches=2, patch_px=2)  # the fifth column is a remainder
    patches = split_patches(pixels, config)
    assert patches.shape == (4, 12)
    assert patches[1].tolist() == [2, 3, 7, 8, 22, 23, 27, 28, 42, 43, 47, 48]  # top right
    assert patches[2, :4].tolist() == [10, 11, 15, 16]  # bottom left


def test_feature_layer_chooses_a_hidden_state(write: Write) -> None:
    """As transformers counts them: 0 is what enters block 0, k what leaves block k - 1."""
    for layer in range(4):
        keys = {"clip.vision.feature_layer": [layer], "clip.vision.block_count": max(layer, 1)}
        model = load_model(write(VISION["clip_15"], keys))
        assert len(model.weights.blocks) == layer
        features = tile_features(HF["pixels"][0], model.weights, model.config, model.ops)
        assert error(features, HF["clip_15.hidden"][layer][1:]) < 2e-6


def test_post_ln_is_not_for_llava(write: Write, files: dict[str, GGUFFile]) -> None:
    width = VISION["clip_15"].n_embd
    noise = {f"v.post_ln.{end}": np.full(width, 3.0, np.float32) for end in ("weight", "bias")}
    with_norm = encode(picture(56, 56), load_model(write(VISION["clip_15"], tensors=noise)))
    assert np.array_equal(with_norm, encode(picture(56, 56), load_model(files["clip_15"])))


# ---- taps


def test_each_tap_fires_once_a_tile_with_its_registered_shape(files: dict[str, GGUFFile]) -> None:
    model, tap = load_model(files["clip_16"]), Recorder(["vit.*", "mm.*"])
    encode(picture(100, 60), model, tap)  # 2 x 2 tiles and the overview
    expected = {
        name: tuple(evaluate(letter, model.config) for letter in shape)
        for name, shape in model.taps().items()
        if name.startswith(("vit.", "mm."))
    }
    assert {name: values[0].shape for name, values in tap.values.items()} == expected
    assert {len(values) for values in tap.values.values()} == {5}
    assert {values[0].dtype for values in tap.values.values()} == {np.dtype(np.float32)}


def test_watching_changes_nothing(files: dict[str, GGUFFile]) -> None:
    model, rgb = load_model(files["clip_16"]), picture(40, 90)
    assert np.array_equal(encode(rgb, model, Recorder()), encode(rgb, model))


# ---- what must hold for any weights


@pytest.fixture(scope="module")
def model_16(files: dict[str, GGUFFile]) -> VisionModel:
    return load_model(files["clip_16"])


def test_another_tile_changes_no_tile(model_16: VisionModel) -> None:
    """Changing the right half of a picture that fills two tiles leaves the left tile's tokens alone."""
    rgb = picture(112, 56)
    plan = plan_picture(size_of(rgb), model_16.config)
    assert plan.grid == (1, 2) and plan.resized == plan.resolution
    changed = rgb.copy()
    changed[:, 56:] = 255 - changed[:, 56:]
    before, after = (encode(p, model_16)[16:].reshape(4, 8 + 1, -1) for p in (rgb, changed))  # rows of patches
    assert np.array_equal(before[:, :4], after[:, :4])
    assert not np.isclose(before[:, 4:8], after[:, 4:8]).all(axis=-1).any()
    assert np.array_equal(before[:, 8], after[:, 8])  # newlines


def test_tiles_come_in_reading_order(model_16: VisionModel) -> None:
    """Four pictures, one in each quarter of a picture, are seen as they are seen alone."""
    quarters = [picture(56, 56, seed) for seed in range(4)]
    rgb = np.concatenate([np.concatenate(quarters[:2], axis=1), np.concatenate(quarters[2:], axis=1)])
    tokens = encode(rgb, model_16)[16:].reshape(8, 9, -1)[:, :8]  # rows of patches without their newline
    one_tile = replace(model_16, config=replace(model_16.config, aspect="pad"))
    for quarter, (top, left) in zip(quarters, [(0, 0), (0, 4), (4, 0), (4, 4)], strict=True):
        alone = encode(quarter, one_tile).reshape(4, 4, -1)
        assert error(tokens[top : top + 4, left : left + 4], alone) < 1e-6


def test_every_patch_sees_every_patch(files: dict[str, GGUFFile]) -> None:
    """Attention is not causal: a change in the last patch reaches the first."""
    model, rgb = load_model(files["clip_15"]), picture(56, 56)
    changed = rgb.copy()
    changed[-14:, -14:] = 255 - changed[-14:, -14:]
    assert not np.isclose(encode(rgb, model)[0], encode(changed, model)[0]).all()


# ---- files that do not fit


def test_a_wrong_shape_names_tensor_and_contract(write: Write) -> None:
    file = write(VISION["clip_15_new"], tensors={"v.blk.1.attn_q.weight": np.zeros((64, 96), np.float32)})
    with pytest.raises(ModelError, match=r"v.blk.1.attn_q.weight: shape \(64, 96\); wanted \(n_embd, n_embd\)"):
        load_model(file)


@pytest.mark.parametrize("name", ["v.pre_ln.weight", "v.blk.2.ln2.bias", "mm.0.bias", "mm.2.bias"])
def test_a_missing_tensor_is_named(name: str, write: Write) -> None:
    with pytest.raises(ModelError, match=f"tensor {name} is missing"):
        load_model(write(VISION["clip_15"], tensors={name: None}))
