"""Models at their true shapes that exist in memory alone: what a backend asks of an open file, over random blocks.

    file = random_file(LLAMA_7B, "Q4_K_M")
    llama = load_llama(file, read_config(file), ops)

Tensors of one shape and type share the same bytes, so a 34B model takes no more memory than one of its blocks; on
a device each has a copy of its own. The weights have mean 0 and a size of about 0.02, as trained ones have.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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

    @property
    def raw(self) -> np.ndarray:
        return random_rows(self.type, self.n_elements // self.shape[-1], self.shape[-1], self.seed)

    def dequantize(self, dtype: Any = np.float32) -> np.ndarray:
        if len(self.shape) == 1:  # a norm
            return np.ones(self.shape, dtype)
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
        tensors[name] = RandomTensor(name, kind, size, len(tensors) if own else 0)

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
