"""The embedded demo pair as a checkpoint that transformers or the original LLaVA loads.

    python -m golden.demo_checkpoint original|hf FOLDER

Weights are the GGUF files' own, dequantized to float32; the rows of q and k go back to transformers' order.
The vision file stores exactly the blocks that run, so the checkpoint gets one more, and a last norm, both random:
LLaVA-1.5 takes hidden_states[-2] and uses neither. Reads GGUF with gguf-py, not with tinyllava.
"""

import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from golden.checkpoints import (
    PREPROCESSOR,
    TOWER,
    CheckpointSpec,
    cast,
    config_of,
    hf_name,
    tower_config,
    write_safetensors,
)
from golden.clip_models import ClipSpec, hf_clip, legacy_name
from golden.clip_models import hf_name as clip_name
from golden.models import LlamaSpec, halves_from_pairs
from golden.models import hf_name as language_name
from golden.tokenizer_files import SPM_CONFIG, to_bytes

Array = np.ndarray[Any, Any]
DEMO = Path(__file__).parents[1] / "tinyllava" / "demo"
TOKENIZER = Path(__file__).parent / "demo" / "tokenizer.model"
N_VOCAB = 1536
IMAGE = N_VOCAB  # transformers' <image>, an added token
N_ROWS = N_VOCAB + 64  # embeddings of transformers' layout: the published checkpoints pad them so, too

# What the files' metadata says; a shape that does not fit is an error when a peer loads the weights.
VISION = ClipSpec("demo", 1, image_size=168, n_embd=256, n_head=4, n_ff=1024, n_block=6, n_llm=256)
LANGUAGE = LlamaSpec("demo", 1, n_embd=256, n_head=4, n_head_kv=2, head_dim=64, n_ff=704, n_layer=4, n_ctx=2048)
ORIGINAL = CheckpointSpec("demo", LANGUAGE, VISION, "F32", tower="vision", n_rows=N_VOCAB)
HF = CheckpointSpec("demo", LANGUAGE, VISION, "F32", layout="hf-new", n_rows=N_ROWS)


def tensors(path: Path) -> dict[str, Array]:
    """Every tensor of a GGUF file as float32, shapes as NumPy sees them."""
    reader = gguf.GGUFReader(path)
    dequantize = gguf.quants.dequantize
    return {t.name: np.asarray(dequantize(t.data, t.tensor_type), np.float32) for t in reader.tensors}


def language_state() -> dict[str, Array]:
    """The language model by transformers' names."""
    state = {}
    for name, values in tensors(DEMO / "demo-model.gguf").items():
        if ".attn_q." in name or ".attn_k." in name:
            values = halves_from_pairs(values, LANGUAGE.n_head if ".attn_q." in name else LANGUAGE.n_head_kv)
        state[language_name(name)] = values
    return state


def tower_state() -> tuple[dict[str, Array], dict[str, Array]]:
    """(tower by CLIPVisionModel's names, without "vision_model."; projector by the original's)."""
    tower = {name.removeprefix("vision_model."): values for name, values in hf_clip(VISION).items()}
    projector = {}
    for name, values in tensors(DEMO / "demo-mmproj.gguf").items():
        if name.startswith("mm."):
            projector["model.mm_projector" + name.removeprefix("mm")] = values
        else:
            tower[clip_name(legacy_name(name))] = values  # the two names of the swap are each other's
    return tower, projector


def write(folder: Path, layout: str) -> Path:
    """Write the checkpoint: "original" (with its tower in folder/clip), or "hf"."""
    folder.mkdir(parents=True, exist_ok=True)
    language, (tower, projector) = language_state(), tower_state()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if layout == "original":
        state, spec, more = language | projector, ORIGINAL, {"mm_vision_tower": str(folder / "clip")}
        save(folder / "clip", {f"vision_model.{name}": x for name, x in tower.items()}, tower_config(spec))
        size = {"size": {"shortest_edge": VISION.image_size}, "crop_size": dict.fromkeys(("height", "width"), 168)}
        (folder / "clip" / "preprocessor_config.json").write_bytes(to_bytes(PREPROCESSOR | size))
    else:
        state = language | projector | {TOWER + name: x for name, x in tower.items()}
        state = {hf_name(name, HF.layout): with_rows(name, x) for name, x in state.items()}
        spec, more = HF, {"image_token_index": IMAGE, "pad_token_id": N_VOCAB + 1}
        special["additional_special_tokens"] = ["<image>"]  # type: ignore[assignment]
        (folder / "added_tokens.json").write_bytes(to_bytes({"<image>": IMAGE, "<pad>": N_VOCAB + 1}))
    save(folder, state, config_of(spec) | more)
    (folder / "tokenizer.model").write_bytes(TOKENIZER.read_bytes())
    (folder / "tokenizer_config.json").write_bytes(to_bytes(SPM_CONFIG | special))
    return folder


def with_rows(name: str, values: Array) -> Array:
    """Embeddings and head with rows of zeros for the added tokens."""
    if name not in ("model.embed_tokens.weight", "lm_head.weight"):
        return values
    return np.concatenate([values, np.zeros((N_ROWS - N_VOCAB, values.shape[1]), np.float32)])


def save(folder: Path, state: dict[str, Array], config: dict[str, Any]) -> None:
    """model.safetensors and config.json."""
    folder.mkdir(exist_ok=True)
    write_safetensors(folder / "model.safetensors", {name: cast(values, "F32") for name, values in state.items()})
    (folder / "config.json").write_bytes(to_bytes(config))


if __name__ == "__main__":
    write(Path(sys.argv[2]), sys.argv[1])
