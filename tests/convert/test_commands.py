"""The old guide's steps by our commands, with their old flags: the same files come out."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from golden.checkpoints import CHECKPOINTS, cast, guide_config, other_projector, split_state, write_torch_zip
from golden.tokenizer_files import to_bytes
from tests.convert.conftest import load_json, metadata_of, tensors_of
from tinyllava import cli
from tinyllava.files.checkpoint import open_shard

DIGESTS = load_json("convert-digests.json.gz")
Out = pytest.CaptureFixture[str]


def digest(name: str, kind: str) -> dict[str, list[object]]:
    return {row[0]: row[1:] for row in DIGESTS[name][kind]["tensors"]}


def tl(*words: object) -> None:
    assert cli.main([str(word) for word in words]) == 0


@pytest.mark.parametrize("name", ["llava16", "llava16-mistral", "hf-llava", "hf-next-new"])
def test_surgery_writes_the_scripts_arrays(name: str, checkpoints: Path, tmp_path: Path) -> None:
    tl("surgery", "-m", checkpoints / name, "-C", "-o", tmp_path)
    projector, tower = open_shard(tmp_path / "llava.projector"), open_shard(tmp_path / "llava.clip")
    original = "llava16-mistral" if name.startswith("hf-next") else "llava15-tied" if "hf" in name else name
    state, _ = split_state(CHECKPOINTS[original])
    assert set(projector) == {n for n in state if n.startswith(("model.mm_projector", "model.image_newline"))}
    assert {a.dtype for a in projector.values()} == {"F32"}
    assert set(tower) == {n[n.find("vision_model.") :] for n in state if "vision_model." in n}
    dtype = CHECKPOINTS[name].dtype
    assert {a.dtype for a in tower.values()} == {dtype}
    for stored in projector.values():
        _, bits = cast(state[stored.name], dtype)
        exact = bits.astype(np.uint32) << 16 if dtype == "BF16" else bits.astype(np.float32).view(np.uint32)
        assert (stored.read().view(np.uint32) == exact).all()


@pytest.mark.parametrize("kind, flags", [("mmproj-f16", []), ("mmproj-f32", ["--use-f32"])])
def test_the_guide_for_1_5(kind: str, flags: list[str], checkpoints: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints / "llava15-bin", tmp_path / "llava"))
    tl("surgery", "-m", folder)  # beside the weights, as the script did
    words = ["--llava-projector", folder / "llava.projector", "--output-dir", folder]
    tl("convert-image-encoder", "-m", folder / "clip", *words, *flags)
    assert tensors_of(folder / f"mmproj-model-{kind[-3:]}.gguf") == digest("llava15-bin", kind)
    tl("convert-llama", folder, "--skip-unknown")
    assert tensors_of(next(folder.glob("Llava-*-F16.gguf"))) == digest("llava15-bin", "f16")


def test_the_guide_for_1_6(checkpoints: Path, tmp_path: Path) -> None:
    folder, tower = Path(shutil.copytree(checkpoints / "llava16", tmp_path / "llava")), tmp_path / "vit"
    tl("surgery", "-C", "-m", folder)
    tower.mkdir()
    shutil.copy(folder / "llava.clip", tower / "pytorch_model.bin")  # as the guide says, whatever is in it
    shutil.copy(folder / "llava.projector", tower)
    (tower / "config.json").write_bytes(to_bytes(guide_config(CHECKPOINTS["llava16"])))
    words = ["--llava-projector", tower / "llava.projector", "--output-dir", tower, "--clip-model-is-vision"]
    tl("convert-image-encoder", "-m", tower, *words)
    made = tower / "mmproj-model-f16.gguf"
    assert tensors_of(made) == digest("llava16", "mmproj-f16")
    for key, (_, *value) in DIGESTS["llava16"]["mmproj-f16"]["metadata"].items():
        assert key == "general.name" or [metadata_of(made)[key]] == value
    tl("convert-llama", folder, "--skip-unknown", "--outtype", "f32", "--outfile", tmp_path / "m.gguf")
    assert tensors_of(tmp_path / "m.gguf") == digest("llava16", "f32")


def test_the_old_scripts_own_projector_is_taken(checkpoints: Path, tmp_path: Path) -> None:
    """llava.projector as torch.save wrote it, and surgery's folder as the tower's."""
    state, _ = split_state(CHECKPOINTS["llava16"])
    arrays = {n: a for n, a in state.items() if n.startswith(("model.mm_projector", "model.image_newline"))}
    exact = {n: (cast(a, "BF16")[1].astype(np.uint32) << 16).view(np.float32) for n, a in arrays.items()}
    write_torch_zip(tmp_path / "llava.projector", {n: ("F32", a) for n, a in exact.items()})
    words = ["--llava-projector", tmp_path / "llava.projector", "--output-dir", tmp_path / "out"]
    tl("convert-image-encoder", "-m", checkpoints / "llava16", *words)
    assert tensors_of(tmp_path / "out" / "mmproj-model-f16.gguf") == digest("llava16", "mmproj-f16")


def test_mean_std_and_projector_type(checkpoints: Path, tmp_path: Path, capsys: Out) -> None:
    tl("surgery", "-m", checkpoints / "llava16", "-o", tmp_path)
    words = ["convert-image-encoder", "-m", tmp_path, "--llava-projector", tmp_path / "llava.projector"]
    tl(*words, "--image_mean", 0.5, 0.25, 0.5, "--image-std", "1", "2", "3", "--projector-type", "ldp")
    made = metadata_of(tmp_path / "mmproj-model-f16.gguf")
    assert made["clip.vision.image_mean"] == [0.5, 0.25, 0.5] and made["clip.vision.image_std"] == [1, 2, 3]
    assert made["clip.projector_type"] == "ldp"
    mean = "--image-mean"
    for bad in ([mean, "1", "2"], [mean, "a", "b", "c"], ["--projector-type", "x"], ["--text-only"]):
        assert cli.main([str(word) for word in [*words, *bad]]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_convert_llamas_flags(checkpoints: Path, tmp_path: Path, capsys: Out) -> None:
    folder, out = checkpoints / "llava16-llama3", tmp_path / "m.gguf"
    words = ["convert-llama", folder, "--outfile", out, "--vocab-type", "bpe"]
    assert cli.main([str(word) for word in words]) == 2
    assert "60 arrays" in capsys.readouterr().err
    assert cli.main([str(word) for word in [*words, "--skip-unknown"]]) == 2
    assert "357 tokens, but the embedding has 512 rows. --pad-vocab" in capsys.readouterr().err
    tl(*words, "--skip-unknown", "--pad-vocab", "--ctx", 77, "--outtype", "Q8_0", "--concurrency", 4, "--verbose")
    assert tensors_of(out) == digest("llava16-llama3", "q8_0")
    assert metadata_of(out)["llama.context_length"] == 77
    other = ["--skip-unknown", "--vocab-dir", checkpoints / "llava16", "--model-name", "A name"]
    tl("convert-llama", folder, "--outfile", out, *other)
    assert metadata_of(out)["general.name"] == "A name" and metadata_of(out)["tokenizer.ggml.model"] == "llama"
    for bad in (["--vocab-type", "spm"], ["--vocab-type", "x"], ["--big-endian"], ["--outtype", "q9"]):
        assert cli.main([str(word) for word in [*words, "--skip-unknown", *bad]]) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("command", ["convert", "surgery", "convert-image-encoder", "convert-llama"])
def test_without_anything(command: str, capsys: Out) -> None:
    assert cli.main([command]) == 2
    assert "not given; wanted" in capsys.readouterr().err


def test_the_output_may_not_be_an_input(checkpoints: Path, tmp_path: Path, capsys: Out) -> None:
    folder = Path(shutil.copytree(checkpoints / "llava15-tied", tmp_path / "in"))
    before = (folder / "model.safetensors").read_bytes()
    words = ["convert-llama", folder, "--skip-unknown", "--outfile", folder / "model.safetensors"]
    assert cli.main([str(word) for word in words]) == 2
    assert "is an input" in capsys.readouterr().err
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("kind", ["linear", "ldp", "ldpv2"])
def test_projectors_other_than_mlp(kind: str, checkpoints: Path, tmp_path: Path) -> None:
    theirs = load_json("convert-projectors.json.gz")[kind]
    projector = {name: ("F32", values) for name, values in other_projector(kind).items()}
    write_torch_zip(tmp_path / "llava.projector", projector)
    words = ["--llava-projector", tmp_path / "llava.projector", "-o", tmp_path / "out"]
    tl("convert-image-encoder", "-m", checkpoints / "llava15-one" / "clip", *words)
    made = tmp_path / "out" / "mmproj-model-f16.gguf"
    assert tensors_of(made) == {row[0]: row[1:] for row in theirs["tensors"]}
    assert metadata_of(made)["clip.projector_type"] == theirs["metadata"]["clip.projector_type"][1]
