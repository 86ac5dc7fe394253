"""Models at their true shapes that exist in memory alone: what a backend asks of an open file, over random blocks.

    file = random_file(LLAMA_7B, "Q4_K_M")
    llama = load_llama(file, read_config(file), ops)

The layers share the same bytes, so a 34B model takes no more memory than one of its layers; on a device each has a
copy of its own. The weights have mean 0 and a size of about 0.02, as trained ones have.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import numpy as np

from tests.true_shapes import Shape, type_of
from tinyllava.quant.blocks import TYPES, dequantize

YI_34B = Shape(7168, 60, 56, 8, 20480, 64000)  # LLaVA-1.6-34B

# Half-precision fields that make the random numbers of a block weights of about 0.02.
SCALES = {
    "Q4_0": {"d": 0.0043},
    "Q8_0": {"d": 0.00027},
    "Q4_K": {"d": 6e-5, "dmin": 4.5e-4},
    "Q5_K": {"d": 3e-5, "dmin": 4.65e-4},
    "Q6_K": {"d": 1.5e-5},
}


@cache
def random_rows(kind: str, n_rows: int, n_cols: int, seed: int = 0) -> np.ndarray:
    """Rows of blocks of random numbers, (n_rows, bytes of a row)."""
    rng, block = np.random.default_rng(seed), TYPES[kind]
    if kind in ("F16", "F32"):
        values = rng.standard_normal((n_rows, n_cols), np.float32) * np.float32(0.02)
        return values.astype(np.float16 if kind == "F16" else np.float32).view(np.uint8)
    raw = rng.integers(0, 256, (n_rows, n_cols // block.block_size, block.nbytes), dtype=np.uint8)
    for name, value in SCALES[kind].items():
        at = block.offset(name)
        raw[:, :, at : at + 2] = np.array([value], np.float16).view(np.uint8)
    return raw.reshape(n_rows, -1)


class RandomTensor:
    """Stands in for files.gguf.Tensor."""

    def __init__(self, name: str, kind: str, shape: tuple[int, ...], seed: int = 0) -> None:
        self.name, self.type, self.shape, self.seed = name, kind, shape, seed
        self.n_elements = int(np.prod(shape))
        self.nbytes = TYPES[kind].row_bytes(shape[-1]) * (self.n_elements // shape[-1])

    def as_matrix(self) -> RandomTensor:
        return RandomTensor(self.name, self.type, (self.shape[0], self.n_elements // self.shape[0]), self.seed)

    @property
    def raw(self) -> np.ndarray:
        return random_rows(self.type, self.n_elements // self.shape[-1], self.shape[-1], self.seed)

    def dequantize(self, dtype: Any = np.float32) -> np.ndarray:
        if len(self.shape) == 1:  # a norm's weights, or a bias
            small = np.random.default_rng(self.seed).standard_normal(self.shape) * 0.02
            return (small + ("bias" not in self.name)).astype(dtype)
        return dequantize(self.type, self.raw, dtype).reshape(self.shape)

    def rows(self, ids: np.ndarray, dtype: Any = np.float32) -> np.ndarray:
        return dequantize(self.type, self.raw[np.asarray(ids)], dtype)


def random_file(shape: Shape, ftype: str, n_layer: int | None = None, *, own: bool = False) -> Any:
    """Stands in for an open GGUF file of a language model; with ``own``, each tensor has numbers of its own."""
    n_layer = n_layer or shape.n_layer
    head_dim = shape.n_embd // shape.n_head
    tensors: dict[str, RandomTensor] = {}

    def add(name: str, *size: int, layer: int = 0) -> None:
        kind = "F32" if len(size) == 1 else type_of(name.split(".")[-2], layer, n_layer, ftype)
        seed = len(tensors) if own else crc32(name.split(".")[-2].encode())  # the same for each layer's
        tensors[name] = RandomTensor(name, kind, size, seed)

    add("token_embd.weight", shape.n_vocab, shape.n_embd)
    add("output.weight", shape.n_vocab, shape.n_embd)
    add("output_norm.weight", shape.n_embd)
    kv = head_dim * shape.n_head_kv
    for i in range(n_layer):
        sizes = {"attn_q": shape.n_embd, "attn_k": kv, "attn_v": kv, "attn_output": shape.n_embd}
        for name, rows in {**sizes, "ffn_gate": shape.n_ff, "ffn_up": shape.n_ff}.items():
            add(f"blk.{i}.{name}.weight", rows, shape.n_embd, layer=i)
        add(f"blk.{i}.ffn_down.weight", shape.n_embd, shape.n_ff, layer=i)
        add(f"blk.{i}.attn_norm.weight", shape.n_embd)
        add(f"blk.{i}.ffn_norm.weight", shape.n_embd)
    metadata = {
        "general.architecture": "llama",
        "llama.context_length": 4096,
        "llama.embedding_length": shape.n_embd,
        "llama.block_count": n_layer,
        "llama.feed_forward_length": shape.n_ff,
        "llama.attention.head_count": shape.n_head,
        "llama.attention.head_count_kv": shape.n_head_kv,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    return SimpleNamespace(path=Path(f"random {ftype}"), metadata=metadata, tensors=tensors)


def random_mmproj(n_llm: int, ftype: str = "F16") -> Any:
    """Stands in for LLaVA-1.5's image encoder: CLIP ViT-L/14-336 but its last block, and two projector layers."""
    n_embd, n_ff, n_block, patch = 1024, 4096, 23, 14
    tensors: dict[str, RandomTensor] = {}

    def add(name: str, *size: int) -> None:
        kind = ftype if len(size) > 1 and name != "v.position_embd.weight" else "F32"
        tensors[name] = RandomTensor(name, kind, size, 1000 + len(tensors))

    def add_pair(name: str, *size: int) -> None:
        add(f"{name}.weight", *size)
        add(f"{name}.bias", size[0])

    add("v.class_embd", n_embd)
    add("v.patch_embd.weight", n_embd, 3, patch, patch)
    add("v.position_embd.weight", 577, n_embd)
    add_pair("v.pre_ln", n_embd)
    for i in range(n_block):
        for norm in ("ln1", "ln2"):
            add_pair(f"v.blk.{i}.{norm}", n_embd)
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            add_pair(f"v.blk.{i}.{name}", n_embd, n_embd)
        add_pair(f"v.blk.{i}.ffn_up", n_ff, n_embd)
        add_pair(f"v.blk.{i}.ffn_down", n_embd, n_ff)
    add_pair("mm.0", n_llm, n_embd)
    add_pair("mm.2", n_llm, n_llm)
    metadata = {
        "general.architecture": "clip",
        "clip.has_vision_encoder": True,
        "clip.has_llava_projector": True,
        "clip.projector_type": "mlp",
        "clip.use_gelu": False,
        "clip.vision.image_size": 336,
        "clip.vision.patch_size": patch,
        "clip.vision.embedding_length": n_embd,
        "clip.vision.feed_forward_length": n_ff,
        "clip.vision.block_count": n_block,
        "clip.vision.projection_dim": 768,
        "clip.vision.attention.head_count": 16,
        "clip.vision.attention.layer_norm_epsilon": 1e-5,
        "clip.vision.image_mean": np.array([0.48145467, 0.4578275, 0.40821072], np.float32),
        "clip.vision.image_std": np.array([0.26862955, 0.2613026, 0.2757771], np.float32),
    }
    return SimpleNamespace(path=Path(f"random mmproj {ftype}"), metadata=metadata, tensors=tensors)
