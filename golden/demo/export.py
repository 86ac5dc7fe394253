"""Write a trained demo as the GGUF pair that tinyllava and llama.cpp load.

    python golden/demo/export.py tokenizer.model tinyllava/demo WEIGHTS_DIR [WEIGHTS_DIR ...]

Several checkpoints of one training are averaged, which is often better than the last one alone
(M. Wortsman et al., "Model soups", 2022).
Matrices become Q8_0, the patch convolution F16 (llama.cpp wants it so), norms, biases and positions F32.
Names follow the first LLaVA converter, `ffn_down` = fc1 and `ffn_up` = fc2 included.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
import torch
from compose import CLIP_MEAN, CLIP_STD
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quantize
from model import Config
from sentencepiece import SentencePieceProcessor

LICENSE = "mit"
NAME = "tinyllava demo"
DESCRIPTION = "A LLaVA-1.5 of 8.8 million parameters that knows simple drawings, for demonstrations and tests."
CONTEXT = 2048
# "USER: " and "ASSISTANT: " are what llama.cpp recognises its built-in "vicuna" template by.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + ' ' }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
VISION_PARTS = {"attn_q": "attn_q", "attn_k": "attn_k", "attn_v": "attn_v", "attn_out": "attn_out", "ln1": "ln1",
                "ln2": "ln2", "fc1": "ffn_down", "fc2": "ffn_up"}  # fmt: skip


def average(folders: list[Path]) -> dict[str, np.ndarray]:
    """The mean of several checkpoints' weights."""
    states = [load_weights(folder) for folder in folders]
    return {name: np.mean([state[name] for state in states], axis=0) for name in states[0]}


def load_weights(folder: Path) -> dict[str, np.ndarray]:
    """The checkpoint's three files as float32 arrays."""
    state: dict[str, torch.Tensor] = {}
    for i in range(3):
        state |= torch.load(folder / f"weights-{i}.pt", map_location="cpu")
    return {name: value.float().numpy() for name, value in state.items()}


def add(writer: GGUFWriter, name: str, array: np.ndarray) -> None:
    """One tensor: a matrix as Q8_0, anything else as F32."""
    if array.ndim == 2 and name.endswith(".weight") and "position" not in name:
        raw = quantize(np.ascontiguousarray(array, np.float32), GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, raw, raw_dtype=GGMLQuantizationType.Q8_0)
    else:
        writer.add_tensor(name, np.ascontiguousarray(array, np.float32))


def add_general(writer: GGUFWriter, kind: str) -> None:
    """The keys that every file has."""
    writer.add_type(kind)
    writer.add_name(NAME)
    writer.add_description(DESCRIPTION)
    writer.add_license(LICENSE)
    writer.add_file_type(LlamaFileType.MOSTLY_Q8_0)


def write_vision(path: Path, weights: dict[str, np.ndarray], c: Config) -> None:
    """The mmproj file: CLIP ViT and projector."""
    writer = GGUFWriter(path, "clip")
    add_general(writer, "mmproj")
    for key, flag in (("has_text_encoder", False), ("has_vision_encoder", True), ("has_llava_projector", True)):
        writer.add_bool(f"clip.{key}", flag)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", False)
    writer.add_bool("clip.use_silu", False)
    sizes = {"image_size": c.image_px, "patch_size": c.patch_px, "embedding_length": c.vision_width,
             "feed_forward_length": c.vision_ffn, "block_count": c.vision_blocks, "projection_dim": c.width,
             "attention.head_count": c.vision_heads}  # fmt: skip
    for key, size in sizes.items():
        writer.add_uint32(f"clip.vision.{key}", size)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", c.norm_eps)
    writer.add_array("clip.vision.image_mean", list(CLIP_MEAN))
    writer.add_array("clip.vision.image_std", list(CLIP_STD))
    writer.add_array("clip.vision.feature_layer", [c.vision_blocks])  # all stored blocks run
    writer.add_string("clip.vision.image_aspect_ratio", "pad")
    writer.add_string("clip.vision.mm_projector_type", "mlp2x_gelu")
    patch = weights["vision.patch_embd"].reshape(c.vision_width, 3, c.patch_px, c.patch_px)
    writer.add_tensor("v.patch_embd.weight", patch.astype(np.float16))
    add(writer, "v.class_embd", weights["vision.class_embd"])
    add(writer, "v.position_embd.weight", weights["vision.position_embd"])
    for end in ("weight", "bias"):
        add(writer, f"v.pre_ln.{end}", weights[f"vision.pre_ln.{end}"])
        for i in range(c.vision_blocks):
            for ours, theirs in VISION_PARTS.items():
                add(writer, f"v.blk.{i}.{theirs}.{end}", weights[f"vision.blk.{i}.{ours}.{end}"])
        for part in (0, 2):
            add(writer, f"mm.{part}.{end}", weights[f"mm_{part}.{end}"])
    finish(writer)


def add_tokenizer(writer: GGUFWriter, spm: SentencePieceProcessor) -> None:
    """Pieces, scores and kinds as llama.cpp's converter writes them."""
    ids = range(spm.get_piece_size())
    kinds = [2 if spm.is_unknown(i) else 3 if spm.is_control(i) else 6 if spm.is_byte(i) else 1 for i in ids]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([spm.id_to_piece(i) for i in ids])
    writer.add_token_scores([spm.get_score(i) for i in ids])
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(True)
    writer.add_chat_template(CHAT_TEMPLATE)


def write_language(path: Path, weights: dict[str, np.ndarray], spm: SentencePieceProcessor, c: Config) -> None:
    """The model file: LLaMA and its tokenizer.  q and k already turn adjacent pairs, so no permutation."""
    writer = GGUFWriter(path, "llama")
    add_general(writer, "model")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(c.width)
    writer.add_block_count(c.blocks)
    writer.add_feed_forward_length(c.ffn)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_rope_dimension_count(c.width // c.heads)
    writer.add_rope_freq_base(c.rope_base)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_vocab_size(c.vocabulary)
    add_tokenizer(writer, spm)
    for name in ("token_embd", "output_norm", "output"):
        add(writer, f"{name}.weight", weights[f"{name}.weight"])
    for i in range(c.blocks):
        for part in (
            "attn_norm",
            "attn_q",
            "attn_k",
            "attn_v",
            "attn_output",
            "ffn_norm",
            "ffn_gate",
            "ffn_up",
            "ffn_down",
        ):
            add(writer, f"blk.{i}.{part}.weight", weights[f"blk.{i}.{part}.weight"])
    finish(writer)


def finish(writer: GGUFWriter) -> None:
    """Flush a writer to its file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Write both files and print their sizes and checksums."""
    spm, target = SentencePieceProcessor(model_file=sys.argv[1]), Path(sys.argv[2])
    weights = average([Path(name) for name in sys.argv[3:]])
    target.mkdir(parents=True, exist_ok=True)
    write_vision(target / "demo-mmproj.gguf", weights, Config())
    write_language(target / "demo-model.gguf", weights, spm, Config())
    for name in ("demo-model.gguf", "demo-mmproj.gguf"):
        data = (target / name).read_bytes()
        print(f"{name} {len(data):,} bytes sha256 {hashlib.sha256(data).hexdigest()}")


if __name__ == "__main__":
    main()
