"""Memory does not grow with the model or with its shards: checkpoints of true shapes, full of holes on disk."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest

from golden.tokenizer_files import spm_files, to_bytes

ROOT = Path(__file__).parents[2]
Shapes = dict[str, tuple[int, ...]]
TOWER = "model.vision_tower.vision_tower.vision_model."


def language(n: int, n_ff: int, n_vocab: int, n_layer: int) -> Shapes:
    shapes: Shapes = {"model.embed_tokens.weight": (n_vocab, n), "lm_head.weight": (n_vocab, n)}
    shapes["model.norm.weight"] = (n,)
    for block in (f"model.layers.{i}." for i in range(n_layer)):
        shapes |= {f"{block}self_attn.{word}_proj.weight": (n, n) for word in "qkvo"}
        shapes |= {f"{block}mlp.{word}_proj.weight": (n_ff, n) for word in ("gate", "up")}
        shapes |= {f"{block}mlp.down_proj.weight": (n, n_ff)}
        shapes |= {f"{block}{word}_layernorm.weight": (n,) for word in ("input", "post_attention")}
    return shapes


def vision(n: int, n_ff: int, n_layer: int, n_llm: int) -> Shapes:
    shapes: Shapes = {
        TOWER + "embeddings.class_embedding": (n,),
        TOWER + "embeddings.patch_embedding.weight": (n, 3, 14, 14),
        TOWER + "embeddings.position_embedding.weight": (577, n),
        "model.mm_projector.0.weight": (n_llm, n),
        "model.mm_projector.2.weight": (n_llm, n_llm),
    }
    matrices = {f"self_attn.{word}_proj": (n, n) for word in ("q", "k", "v", "out")}
    matrices |= {"mlp.fc1": (n_ff, n), "mlp.fc2": (n, n_ff), "layer_norm1": (n,), "layer_norm2": (n,)}
    blocks = {f"encoder.layers.{i}.{name}": shape for i in range(n_layer) for name, shape in matrices.items()}
    for name, shape in (blocks | {"pre_layrnorm": (n,), "post_layernorm": (n,)}).items():
        shapes |= {f"{TOWER}{name}.weight": shape, f"{TOWER}{name}.bias": shape[:1]}
    return shapes | {f"model.mm_projector.{i}.bias": (n_llm,) for i in (0, 2)}


def write_hollow(folder: Path, shapes: Shapes, n_shards: int, n_heads: int) -> Path:
    """A checkpoint of zeros in F16 that takes no room on disk."""
    folder.mkdir()
    names = list(shapes)
    for i in range(n_shards):
        header, offset = {}, 0
        for name in names[i::n_shards]:
            end = offset + 2 * prod(shapes[name])
            header[name] = {"dtype": "F16", "shape": list(shapes[name]), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header).encode()
        with (folder / f"model-{i + 1:05}-of-{n_shards:05}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + offset)
    (folder / "config.json").write_bytes(to_bytes({"num_attention_heads": n_heads, "model_type": "llava_llama"}))
    for name, data in spm_files().items():
        (folder / name).write_bytes(data)
    return folder


def peak_mib(folder: Path, out: Path, outtype: str) -> float:
    """What `tinyllava convert` says at its end."""
    words = ["convert", str(folder), "-o", str(out), "--outtype", outtype]
    done = subprocess.run([sys.executable, "-m", "tinyllava", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = re.search(r"^peak memory ([0-9.]+) (MiB|GiB)$", done.stdout, re.MULTILINE)
    assert found is not None
    return float(found[1]) * (1024 if found[2] == "GiB" else 1)


@pytest.mark.skipif(sys.platform == "win32", reason="needs files with holes")
@pytest.mark.parametrize("outtype", ["f16", "q4_k_m"])
def test_peak_memory_stays_far_below_the_checkpoints_size(outtype: str, tmp_path: Path) -> None:
    shapes = language(1024, 2816, 32000, 4) | vision(1024, 4096, 6, 1024)  # 430 MB
    size_mib = sum(2 * prod(shape) for shape in shapes.values()) / 2**20
    peaks = [
        peak_mib(write_hollow(tmp_path / f"in{n}", shapes, n, 8), tmp_path / f"out{n}", outtype) for n in (1, 8)
    ]
    base = 60 if outtype == "f16" else 200  # Numba's compiler, for blocks that it makes
    assert max(peaks) < base + 100 < size_mib + base
    assert abs(peaks[0] - peaks[1]) < 40


@pytest.mark.big
@pytest.mark.timeout(1800)
def test_a_7b_checkpoint_takes_less_than_2_gib(tmp_path: Path) -> None:
    shapes = language(4096, 11008, 32000, 32) | vision(1024, 4096, 24, 4096)
    assert peak_mib(write_hollow(tmp_path / "in", shapes, 3, 32), tmp_path / "out", "q8_0") < 2048
