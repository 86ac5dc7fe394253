"""Every layout, every type: the tensors are those of llama.cpp's own scripts, bit for bit."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import gguf
import numpy as np
import pytest

from golden.checkpoints import CHECKPOINTS, cast, guide_config, split_state, write_checkpoint
from golden.tokenizer_files import to_bytes
from tests.convert.conftest import Convert, convert_checkpoint, load_json, metadata_of, tensors_of
from tinyllava import cli
from tinyllava.convert.tensors import legacy_q8_0, permuted_rows
from tinyllava.files.gguf import open_gguf

DIGESTS = load_json("convert-digests.json.gz")
TRANSFORMERS = load_json("hf-convert.json.gz")
SAME = {"hf-llava-new": "hf-llava", "hf-next-new": "hf-next"}  # the same weights under other names
NATIVE = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


def digest(name: str, kind: str) -> dict[str, list[object]]:
    return {row[0]: row[1:] for row in DIGESTS[SAME.get(name, name)][kind]["tensors"]}


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_language_model_is_the_scripts(name: str, outtype: str, converted: Convert) -> None:
    assert tensors_of(converted(name, outtype)[1]) == digest(name, outtype)


@pytest.mark.parametrize("mmproj", ["f16", "F32"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_image_encoder_is_the_scripts(name: str, mmproj: str, converted: Convert) -> None:
    assert tensors_of(converted(name, None, mmproj)[0]) == digest(name, f"mmproj-{mmproj.lower()}")


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_by_default_the_model_keeps_its_precision(name: str, converted: Convert) -> None:
    mmproj, model = converted(name)
    native = NATIVE[CHECKPOINTS[name].dtype]
    assert (mmproj.name, model.name) == ("mmproj-f16.gguf", f"model-{native}.gguf")
    assert tensors_of(model) == digest(name, native)


@pytest.mark.parametrize("layout", ["original", "hf-old"])
def test_without_an_index_and_in_other_shards_nothing_changes(layout: str, tmp_path: Path) -> None:
    from dataclasses import replace

    spec = CHECKPOINTS["llava16-mistral" if layout == "original" else "hf-next"]
    for i, (n_shards, index, kind) in enumerate([(1, False, "bin"), (5, False, "safetensors"), (3, True, "bin")]):
        other = replace(spec, n_shards=n_shards, index=index, format=kind)
        written = convert_checkpoint(write_checkpoint(tmp_path / f"in{i}", other), tmp_path / f"out{i}")
        assert tensors_of(written[1].path) == digest(spec.name, "bf16")


# ---- metadata

# What the scripts write otherwise, and why ours differs.
DIFFERENT = {
    "general.name": "theirs is the folder's in title case; ours has words such as 7B in upper case",
    "general.size_label": "theirs counts the vision tower's weights as the language model's",
    "clip.vision.projection_dim": "nobody reads it; without a config it is CLIP's usual one",
    "tokenizer.ggml.token_type": "rows without a token are unused here; there they are user's or control tokens",
}
OTHERWISE = {
    ("llava16-qwen2", "tokenizer.ggml.tokens"): "convert_hf_to_gguf calls rows without a token [PAD357], ...",
    ("hf-next", "tokenizer.ggml.scores"): "made from tokenizer.json's merges: see test_vocabulary.py",
    ("hf-next-new", "tokenizer.ggml.scores"): "the same",
}
# Of transformers' checkpoints, which do not say this; the scripts were given the original's config for them.
NOT_IN_TRANSFORMERS = {
    "clip.vision.image_aspect_ratio", "clip.vision.mm_projector_type", "clip.vision.image_crop_resolution",
    "clip.vision.image_split_resolution",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["f16", "mmproj-f16"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_metadata_holds_all_that_the_scripts_write(name: str, kind: str, converted: Convert) -> None:
    ours = metadata_of(converted(name, "f16")[kind == "f16"])
    for key, (_, *theirs) in DIGESTS[SAME.get(name, name)][kind]["metadata"].items():
        if name.startswith("hf") and key in NOT_IN_TRANSFORMERS:
            continue
        assert key in ours, key
        if (name, key) in OTHERWISE:
            continue
        value = ours[key]
        found = [len(value), zlib.crc32(json.dumps(value).encode())] if len(theirs) == 2 else [value]
        assert found == theirs or key in DIFFERENT, key


def test_metadata_holds_what_todays_loaders_want(converted: Convert) -> None:
    mmproj, model = (metadata_of(path) for path in converted("llava16"))
    assert (mmproj["general.type"], mmproj["clip.projector_type"]) == ("mmproj", "mlp")
    assert model["general.type"] == "model"
    assert mmproj["clip.vision.feature_layer"] == [2]  # of 3 blocks: hidden_states[-2]
    assert mmproj["clip.vision.block_count"] == 2
    assert metadata_of(converted("llava16-qwen2")[1])["tokenizer.chat_template"].startswith("{% for m in messages")


@pytest.mark.parametrize("name", ["llava15-bin", "llava16-qwen2"])
def test_gguf_reads_the_same(name: str, converted: Convert) -> None:
    for path in converted(name):
        theirs = {t.name: list(t.shape[::-1]) for t in gguf.GGUFReader(path).tensors}
        assert theirs == {tensor: shape for tensor, (_, shape, _) in tensors_of(path).items()}


# ---- where the vision tower's sizes come from


@pytest.mark.parametrize("flag", ["--vision-config", "--vision-tower", "neither"])
def test_the_towers_sizes_come_from_one_of_three_places(flag: str, checkpoints: Path, tmp_path: Path) -> None:
    spec = CHECKPOINTS["llava16"]
    words = ["convert", str(checkpoints / "llava16"), "-o", str(tmp_path / "out"), "-q"]
    if flag == "--vision-config":
        (tmp_path / "v.json").write_bytes(to_bytes(guide_config(spec)))
        words += [flag, str(tmp_path / "v.json")]
    elif flag == "--vision-tower":
        words += [flag, str(checkpoints / "llava15-bin" / "clip")]
    assert cli.main(words) == 0
    assert tensors_of(tmp_path / "out" / "mmproj-f16.gguf") == digest("llava16", "mmproj-f16")  # the inner tower's
    said = metadata_of(tmp_path / "out" / "mmproj-f16.gguf")
    assert said["clip.vision.projection_dim"] == (768 if flag == "neither" else 32)
    assert (said["clip.vision.image_size"], said["clip.vision.attention.head_count"]) == (28, 2)


# ---- transformers' own layout


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_our_checkpoints_are_what_transformers_saves(name: str) -> None:
    """transformers loaded the checkpoint that is built here, and saved it: same names, shapes and bytes."""
    spec = CHECKPOINTS[name]
    state, _ = split_state(spec)
    ours = {
        k: [list(v.shape), zlib.crc32(np.ascontiguousarray(cast(v, spec.dtype)[1]))] for k, v in state.items()
    }
    assert ours == TRANSFORMERS[name]["saved"]


def test_pinpoints_keep_their_order_unless_that_changes_their_meaning() -> None:
    from tinyllava.convert.image_encoder import _pinpoints

    both_ways, wide = [[28, 56], [56, 28]], [[28, 56], [56, 56]]
    for model, expected in (({}, (28, 56, 56, 56)), ({"text_config": {}}, (56, 28, 56, 56))):
        assert _pinpoints({}, {**model, "image_grid_pinpoints": wide}, Path()) == expected
        assert _pinpoints({}, {**model, "image_grid_pinpoints": both_ways}, Path()) == (28, 56, 56, 28)


# ---- small pieces, by hand


def test_rows_of_a_head_are_interleaved() -> None:
    assert permuted_rows(12, 2).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_legacy_q8_0_divides_and_rounds_to_even() -> None:
    x = np.zeros((1, 32), np.float32)
    x[0, :4] = 127, 0.5, 1.5, -2.5
    assert legacy_q8_0(x)[0, 2:6].view(np.int8).tolist() == [127, 0, 2, -2]
    assert legacy_q8_0(np.zeros((2, 64), np.float32)).shape == (2, 68)


@pytest.mark.parametrize("outtype", ["q4_k_m", "Q5_1", "iq4_nl"])
def test_any_type_that_quantize_knows(outtype: str, converted: Convert, tmp_path: Path) -> None:
    """Converting to a type at once gives what converting and then quantizing gives."""
    mmproj, model = converted("llava15-bin", outtype, outtype)
    whole = converted("llava15-bin", "f16", "f16")
    for direct, f16 in ((mmproj, whole[0]), (model, whole[1])):
        target = tmp_path / direct.name
        assert cli.main(["quantize", str(f16), str(target), outtype, "-q"]) == 0
        types = {n: t[0] for n, t in tensors_of(target).items()}
        assert {n: t[0] for n, t in tensors_of(direct).items()} == types
        with open_gguf(direct) as ours, open_gguf(target) as theirs:
            assert ours.metadata["general.file_type"] == theirs.metadata["general.file_type"]
    assert tensors_of(model) == tensors_of(tmp_path / model.name)  # the model is F16; the tower was F32


def test_a_second_copy_of_the_projector_does_no_harm(tmp_path: Path) -> None:
    """LLaVA-1.5's repositories have mm_projector.bin beside the shards that hold the same."""
    from golden.checkpoints import write_torch_zip

    spec = CHECKPOINTS["llava15-one"]
    folder = write_checkpoint(tmp_path / "in", spec)
    state, _ = split_state(spec)
    projector = {k: cast(v, "F16") for k, v in state.items() if "mm_projector" in k}
    write_torch_zip(folder / "mm_projector.bin", projector)
    mmproj, model = convert_checkpoint(folder, tmp_path / "out")
    assert tensors_of(mmproj.path) == digest(spec.name, "mmproj-f16")
    assert tensors_of(model.path) == digest(spec.name, "f16")
