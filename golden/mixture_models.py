"""Models of which only names, shapes and a few settings matter: what llama.cpp's mixtures look at.

Rows have their true lengths, or ones that are multiples of the same block sizes; there are two rows a matrix.
"""

from typing import Any, NamedTuple


class Skeleton(NamedTuple):
    """GGUF metadata and the shape of each tensor, in NumPy's order."""

    metadata: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]


def language_model(
    architecture: str, n_layer: int, n_embd: int, n_ff: int, n_head: int, n_head_kv: int, *, tied: bool = False
) -> Skeleton:
    """A LLaMA or Qwen2, its layers in the order of the original checkpoints."""
    prefix = f"{architecture}."
    metadata = {
        "general.architecture": architecture,
        prefix + "context_length": 512,
        prefix + "embedding_length": n_embd,
        prefix + "block_count": n_layer,
        prefix + "feed_forward_length": n_ff,
        prefix + "attention.head_count": n_head,
        prefix + "attention.head_count_kv": n_head_kv,
        prefix + "attention.layer_norm_rms_epsilon": 1e-5,
    }
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (2, n_embd)}
    for i in range(n_layer):
        blk = f"blk.{i}."
        for name in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up"):
            shapes[f"{blk}{name}.weight"] = (2, n_embd)
        shapes[f"{blk}attn_output.weight"] = (2, n_embd)
        shapes[f"{blk}ffn_down.weight"] = (2, n_ff)
        shapes[f"{blk}attn_norm.weight"] = shapes[f"{blk}ffn_norm.weight"] = (n_embd,)
        if architecture == "qwen2":
            shapes[f"{blk}attn_v.bias"] = (2,)
    shapes["output_norm.weight"] = (n_embd,)
    if not tied:
        shapes["output.weight"] = (2, n_embd)
    return Skeleton(metadata, shapes)


def image_encoder(n_layer: int, n_embd: int, n_ff: int, n_llm: int, patch: int = 14) -> Skeleton:
    """A CLIP with the two-layer projector, in the layout of LLaVA's converter (ffn_down is the first matrix)."""
    shapes: dict[str, tuple[int, ...]] = {
        "v.class_embd": (n_embd,),
        "v.patch_embd.weight": (n_embd, 3, patch, patch),
        "v.position_embd.weight": (17, n_embd),
        "v.pre_ln.weight": (n_embd,),
    }
    for i in range(n_layer):
        blk = f"v.blk.{i}."
        for name in ("attn_q", "attn_k", "attn_v", "attn_out", "ffn_down"):
            shapes[f"{blk}{name}.weight"], shapes[f"{blk}{name}.bias"] = (2, n_embd), (2,)
        shapes[f"{blk}ffn_up.weight"], shapes[f"{blk}ffn_up.bias"] = (2, n_ff), (2,)
        shapes[f"{blk}ln1.weight"] = shapes[f"{blk}ln2.weight"] = (n_embd,)
    shapes |= {"mm.0.weight": (2, n_embd), "mm.0.bias": (2,), "mm.2.weight": (2, n_llm), "mm.2.bias": (2,)}
    shapes["model.image_newline"] = (n_llm,)
    return Skeleton({"general.architecture": "clip"}, shapes)


SKELETONS = {
    "7b": language_model("llama", 32, 256, 512, 32, 32),
    "13b": language_model("llama", 40, 256, 256, 40, 40),
    "65b": language_model("llama", 80, 256, 256, 64, 64),
    "70b": language_model("llama", 80, 256, 256, 64, 8),
    "mistral": language_model("llama", 32, 256, 256, 32, 8),
    "yi-34b": language_model("llama", 60, 256, 256, 56, 8),
    "qwen2-7b": language_model("qwen2", 28, 256, 256, 28, 4),
    "qwen2-72b": language_model("qwen2", 80, 256, 256, 64, 8),
    "smollm2": language_model("llama", 30, 576, 1536, 9, 3, tied=True),
    "tied": language_model("llama", 3, 256, 256, 4, 4, tied=True),
    "odd": language_model("llama", 9, 100, 352, 5, 5),
    "odd-ff": language_model("llama", 17, 256, 100, 8, 2),
    "clip-large": image_encoder(23, 256, 256, 256),
    "clip-odd": image_encoder(5, 96, 100, 128),
    "siglip": image_encoder(27, 1152, 4304, 256),
}
