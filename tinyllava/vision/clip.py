"""The vision tower: one square tile becomes features, one row for each patch.

A Vision Transformer (Dosovitskiy et al. 2021) as trained by CLIP (Radford et al. 2021): norms come before
attention and MLP, there is one more norm right after the embeddings, and attention is bidirectional.
LLaVA reads the features of a late block, not the class token that CLIP itself was trained through.
Source of the names: llama.cpp's mmproj files. Of the maths: transformers' modeling_clip.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tinyllava.tap import NULL, Tap
from tinyllava.vision.config import VisionConfig
from tinyllava.weights import array, load_weights, matrix, vector

if TYPE_CHECKING:
    from tinyllava.files.gguf import GGUFFile
    from tinyllava.ops import Array, Matrix, Ops

# The taps of the forward pass, each with its value's shape; the caller's prefix ("vit.") comes before the name.
VISION_TAPS = {
    "patch_embd": ("n_patches", "n_embd"),  # after the patch convolution
    "inp_embd": ("1 + n_patches", "n_embd"),  # the class embedding in front, positions added
    "pre_ln": ("1 + n_patches", "n_embd"),  # what enters block 0
    "blk.{i}.ln1": ("1 + n_patches", "n_embd"),
    "blk.{i}.attn_q": ("1 + n_patches", "n_head", "head_dim"),
    "blk.{i}.attn_k": ("1 + n_patches", "n_head", "head_dim"),
    "blk.{i}.attn_v": ("1 + n_patches", "n_head", "head_dim"),
    "blk.{i}.attn_weights": ("n_head", "1 + n_patches", "1 + n_patches"),
    "blk.{i}.attn_mixed": ("1 + n_patches", "n_embd"),  # values as attention mixes them, heads side by side
    "blk.{i}.attn_out": ("1 + n_patches", "n_embd"),
    "blk.{i}.ffn_inp": ("1 + n_patches", "n_embd"),  # the residual stream after attention
    "blk.{i}.ln2": ("1 + n_patches", "n_embd"),
    "blk.{i}.ffn_up": ("1 + n_patches", "n_ff"),
    "blk.{i}.ffn_act": ("1 + n_patches", "n_ff"),
    "blk.{i}.ffn_down": ("1 + n_patches", "n_embd"),
    "blk.{i}.l_out": ("1 + n_patches", "n_embd"),  # the residual stream after the block
    "features": ("n_patches", "n_embd"),  # the last block's output without the class token's row
}


@dataclass(frozen=True)
class Block:
    """One transformer block: tensors v.blk.{i}.*"""

    ln1: Array = vector("n_embd")
    ln1_bias: Array = vector("n_embd", name="ln1.bias")
    attn_q: Matrix = matrix("n_embd", "n_embd")
    attn_q_bias: Array = vector("n_embd", name="attn_q.bias")
    attn_k: Matrix = matrix("n_embd", "n_embd")
    attn_k_bias: Array = vector("n_embd", name="attn_k.bias")
    attn_v: Matrix = matrix("n_embd", "n_embd")
    attn_v_bias: Array = vector("n_embd", name="attn_v.bias")
    attn_out: Matrix = matrix("n_embd", "n_embd")
    attn_out_bias: Array = vector("n_embd", name="attn_out.bias")
    ln2: Array = vector("n_embd")
    ln2_bias: Array = vector("n_embd", name="ln2.bias")
    ffn_up: Matrix = matrix("n_ff", "n_embd")
    ffn_up_bias: Array = vector("n_ff", name="ffn_up.bias")
    ffn_down: Matrix = matrix("n_embd", "n_ff")
    ffn_down_bias: Array = vector("n_embd", name="ffn_down.bias")


@dataclass(frozen=True)
class VisionWeights:
    """The vision tower: tensors v.*"""

    blocks: tuple[Block, ...]
    class_embd: Array = array("n_embd", name="v.class_embd")
    patch_embd: Matrix = matrix("n_embd", "3", "patch_px", "patch_px", name="v.patch_embd.weight")
    patch_embd_bias: Array | None = vector("n_embd", name="v.patch_embd.bias", optional=True)  # CLIP has none
    position_embd: Array = array("1 + n_patches", "n_embd", name="v.position_embd.weight")
    pre_ln: Array = vector("n_embd", name="v.pre_ln.weight")
    pre_ln_bias: Array = vector("n_embd", name="v.pre_ln.bias")
    post_ln: Array | None = vector("n_embd", name="v.post_ln.weight", optional=True)  # LLaVA does not use it
    post_ln_bias: Array | None = vector("n_embd", name="v.post_ln.bias", optional=True)


def load_vision(file: GGUFFile, config: VisionConfig, ops: Ops) -> VisionWeights:
    """The weights of the blocks that run. ModelError for a missing tensor or a wrong shape."""

    def name_in_file(name: str) -> str:
        # The 2023 conversion script calls the MLP's first layer ffn_down and its second ffn_up.
        if not config.ffn_swapped:
            return name
        swapped = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
        return ".".join(swapped.get(word, word) for word in name.split("."))

    blocks = tuple(
        load_weights(Block, file, config, ops, prefix=f"v.blk.{i}.", rename=name_in_file)
        for i in range(config.n_block)
    )
    return load_weights(VisionWeights, file, config, ops, blocks=blocks)


def tile_features(
    pixels: npt.NDArray[Any], weights: VisionWeights, config: VisionConfig, ops: Ops, tap: Tap = NULL
) -> Array:
    """One tile's features: normalised pixels (3, image_px, image_px) -> (n_patches, n_embd), row by row."""
    patches = split_patches(ops.array(pixels), config)  # (n_patches, 3 * patch_px * patch_px)
    x = tap("patch_embd", ops.linear(patches, weights.patch_embd, weights.patch_embd_bias))  # (n_patches, n_embd)
    both = [weights.class_embd[None], x]
    x = np.concatenate(both if config.class_token == "first" else both[::-1])  # (1 + n_patches, n_embd)
    x = tap("inp_embd", x + weights.position_embd)
    x = tap("pre_ln", ops.layer_norm(x, weights.pre_ln, weights.pre_ln_bias, config.norm_eps))
    for i, block in enumerate(weights.blocks):
        x = run_block(x, block, config, ops, tap.at(f"blk.{i}"))
    if config.post_norm and weights.post_ln is not None and weights.post_ln_bias is not None:
        x = ops.layer_norm(x, weights.post_ln, weights.post_ln_bias, config.norm_eps)
    return tap("features", x[1:])  # (n_patches, n_embd)


def split_patches(pixels: npt.NDArray[Any], config: VisionConfig) -> npt.NDArray[Any]:
    """(3, H, W) -> (n_patches, 3 * p * p): each patch's pixels in a row, colour by colour.

    A convolution whose stride is its kernel's size is a matrix product with these rows.
    """
    side, p = config.grid_patches, config.patch_px
    seen = pixels[:, : side * p, : side * p]  # (3, side * p, side * p): a remainder at the edge is not used
    grid = seen.reshape(3, side, p, side, p)
    return grid.transpose(1, 3, 0, 2, 4).reshape(side * side, 3 * p * p)


def run_block(x: Array, w: Block, config: VisionConfig, ops: Ops, tap: Tap) -> Array:
    """x + attention(ln1(x)), then + mlp(ln2(...)): (n, n_embd) -> (n, n_embd), n = 1 + n_patches."""
    normed = tap("ln1", ops.layer_norm(x, w.ln1, w.ln1_bias, config.norm_eps))
    x = tap("ffn_inp", ops.add(x, attend(normed, w, config, ops, tap)))
    normed = tap("ln2", ops.layer_norm(x, w.ln2, w.ln2_bias, config.norm_eps))
    return tap("l_out", ops.add(x, mlp(normed, w, config, ops, tap)))


def attend(x: Array, w: Block, config: VisionConfig, ops: Ops, tap: Tap) -> Array:
    """Multi-head attention in which every position sees every other: (n, n_embd) -> (n, n_embd)."""
    heads = (x.shape[0], config.n_head, config.head_dim)
    weights = (w.attn_q, w.attn_q_bias), (w.attn_k, w.attn_k_bias), (w.attn_v, w.attn_v_bias)
    q, k, v = (y.reshape(heads) for y in ops.linears(x, *weights))  # (n, n_head, head_dim) each
    q, k, v = tap("attn_q", q), tap("attn_k", k), tap("attn_v", v)
    if tap.wants("attn_weights"):
        tap("attn_weights", ops.attention_weights(q, k, causal=False))  # (n_head, n, n)
    mixed = tap("attn_mixed", ops.attention(q, k, v, causal=False).reshape(x.shape))  # (n, n_embd)
    return tap("attn_out", ops.linear(mixed, w.attn_out, w.attn_out_bias))


def mlp(x: Array, w: Block, config: VisionConfig, ops: Ops, tap: Tap) -> Array:
    """Two layers with an activation between: (n, n_embd) -> (n, n_embd)."""
    up = tap("ffn_up", ops.linear(x, w.ffn_up, w.ffn_up_bias))  # (n, n_ff)
    active = tap("ffn_act", ops.activation(up, config.activation))
    return tap("ffn_down", ops.linear(active, w.ffn_down, w.ffn_down_bias))  # (n, n_embd)
