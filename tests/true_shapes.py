"""Models at their true shapes with weights that mean nothing: for memory and speed, which do not depend on values.

    write_llama("7b.gguf", LLAMA_7B, "Q4_K_M")
    write_mmproj("mmproj.gguf", VIT_L_15)

Every tensor of one shape and type of a language model shares the same random blocks, so writing costs disk but no
memory. An image encoder's are drawn one by one, as the golden ones are: it is small enough, and its output then
has the size that a trained one's has.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import gguf
import numpy as np

from golden.clip_models import ClipSpec, write_mmproj
from tinyllava.quant.blocks import TYPES

__all__ = ["LLAMA_1B", "LLAMA_7B", "MISTRAL_7B", "VIT_L_15", "VIT_L_16", "write_llama", "write_mmproj"]


@dataclass(frozen=True)
class Shape:
    """The sizes of a LLaMA."""

    n_embd: int
    n_layer: int
    n_head: int
    n_head_kv: int
    n_ff: int
    n_vocab: int


LLAMA_7B = Shape(4096, 32, 32, 32, 11008, 32000)  # LLaVA-1.5-7B and LLaVA-1.6-Vicuna-7B
MISTRAL_7B = Shape(4096, 32, 32, 8, 14336, 32000)  # LLaVA-1.6-Mistral-7B
LLAMA_1B = Shape(2048, 24, 32, 4, 5632, 32000)  # 1.26 billion weights

# CLIP ViT-L/14-336 without its last block, as LLaVA's files hold it; the projector leads to LLAMA_1B's width.
VIT_L_15 = ClipSpec(
    "vit-l-336", 301, image_size=336, n_embd=1024, n_head=16, n_ff=4096, n_block=23, n_llm=LLAMA_1B.n_embd
)
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
VIT_L_16 = replace(VIT_L_15, name="vit-l-336-anyres", pinpoints=PINPOINTS, merge_type="spatial_unpad")


@cache
def blocks(kind: str, n_rows: int, n_cols: int) -> np.ndarray:
    """Random bytes whose half-precision scales are small: finite weights of about the usual size."""
    block = TYPES[kind]
    rng = np.random.default_rng(0)
    n_blocks = n_cols // block.block_size
    raw = rng.integers(0, 256, (n_rows, n_blocks, block.nbytes), dtype=np.uint8)
    for field in block.fields:
        if field[1] == "<f2" and len(field) == 2:
            at = block.offset(field[0])
            raw[:, :, at : at + 2] = np.array([1e-4], np.float16).view(np.uint8)
    if kind in ("F16", "F32"):
        values = rng.standard_normal((n_rows, n_cols)).astype(np.float16 if kind == "F16" else np.float32)
        raw = (values * 0.02).astype(values.dtype).view(np.uint8)
    return raw.reshape(n_rows, -1)


def type_of(name: str, layer: int, n_layer: int, ftype: str) -> str:
    """The block type of a tensor. Q4_K_M and Q5_K_M keep output, and in half of the layers v and down, in Q6_K."""
    base = ftype.removesuffix("_M").removesuffix("_S")
    more_bits = layer < n_layer // 8 or layer >= 7 * n_layer // 8 or (layer - n_layer // 8) % 3 == 2
    if ftype.endswith("_M") and (name == "output" or (name in ("attn_v", "ffn_down") and more_bits)):
        return "Q6_K"
    return base


def write_llama(path: Path, shape: Shape, ftype: str) -> None:
    """Write a language model of the given sizes; its vocabulary is 256 bytes and placeholders."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(f"random {ftype}")
    writer.add_context_length(4096)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    _add_vocabulary(writer, shape.n_vocab)

    def add(name: str, n_rows: int, n_cols: int, layer: int = 0) -> None:
        kind = type_of(name.split(".")[-2], layer, shape.n_layer, ftype)
        raw = blocks(kind, n_rows, n_cols)
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[kind])

    kv = shape.n_embd // shape.n_head * shape.n_head_kv
    add("token_embd.weight", shape.n_vocab, shape.n_embd)
    add("output.weight", shape.n_vocab, shape.n_embd)
    writer.add_tensor("output_norm.weight", np.ones(shape.n_embd, np.float32))
    for i in range(shape.n_layer):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{norm}.weight", np.ones(shape.n_embd, np.float32))
        heads = {"attn_q": shape.n_embd, "attn_k": kv, "attn_v": kv, "attn_output": shape.n_embd}
        for name, rows in heads.items():
            add(f"blk.{i}.{name}.weight", rows, shape.n_embd, i)
        add(f"blk.{i}.ffn_gate.weight", shape.n_ff, shape.n_embd, i)
        add(f"blk.{i}.ffn_up.weight", shape.n_ff, shape.n_embd, i)
        add(f"blk.{i}.ffn_down.weight", shape.n_embd, shape.n_ff, i)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: gguf.GGUFWriter, n_vocab: int) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    types = [2, 3, 3, *[6] * 256]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*tokens, *(f"token {i}" for i in range(len(tokens), n_vocab))])
    writer.add_token_types([*types, *[1] * (n_vocab - len(types))])
    writer.add_token_scores([0.0] * n_vocab)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
