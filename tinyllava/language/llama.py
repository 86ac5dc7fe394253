"""LLaMA: a decoder-only transformer (Touvron et al. 2023). One forward pass, to be read top-down.

It serves what GGUF calls the architectures "llama" (LLaMA 1 to 3, Vicuna, Mistral, Yi) and
"qwen2": they differ in their numbers, in the features that RoPE pairs, and in whether attention has biases.

Letters in the shapes: n tokens in this call, m tokens in the cache once they are added, d = n_embd.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tinyllava.files.gguf import GGUFFile
from tinyllava.language.cache import KVCache
from tinyllava.language.config import LlamaConfig
from tinyllava.ops import Array, Matrix, Ops
from tinyllava.tap import NULL, Tap
from tinyllava.weights import array, load_weights, matrix, vector

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Layer:
    """One transformer block: the tensors ``blk.{i}.<field>.weight``."""

    attn_norm: Array = vector("n_embd")
    attn_q: Matrix = matrix("n_head * head_dim", "n_embd")
    attn_k: Matrix = matrix("n_head_kv * head_dim", "n_embd")
    attn_v: Matrix = matrix("n_head_kv * head_dim", "n_embd")
    attn_output: Matrix = matrix("n_embd", "n_head * head_dim")
    attn_q_bias: Array | None = vector("n_head * head_dim", name="attn_q.bias", optional=True)
    attn_k_bias: Array | None = vector("n_head_kv * head_dim", name="attn_k.bias", optional=True)
    attn_v_bias: Array | None = vector("n_head_kv * head_dim", name="attn_v.bias", optional=True)
    attn_output_bias: Array | None = vector("n_embd", name="attn_output.bias", optional=True)
    ffn_norm: Array = vector("n_embd")
    ffn_gate: Matrix = matrix("n_ff", "n_embd")
    ffn_up: Matrix = matrix("n_ff", "n_embd")
    ffn_down: Matrix = matrix("n_embd", "n_ff")
    ffn_gate_bias: Array | None = vector("n_ff", name="ffn_gate.bias", optional=True)
    ffn_up_bias: Array | None = vector("n_ff", name="ffn_up.bias", optional=True)
    ffn_down_bias: Array | None = vector("n_embd", name="ffn_down.bias", optional=True)


@dataclass(frozen=True)
class Llama:
    """All weights. ``output`` is None when the head is tied: token_embd then serves for both."""

    config: LlamaConfig
    blk: tuple[Layer, ...]
    token_embd: Matrix = matrix("n_vocab", "n_embd")
    output_norm: Array = vector("n_embd")
    output: Matrix | None = matrix("n_vocab", "n_embd", optional=True)
    rope_freqs: Array | None = array("n_pair", optional=True)  # LLaMA-3.1: a divisor for each pair's angle


def load_llama(file: GGUFFile, config: LlamaConfig, ops: Ops) -> Llama:
    """The weights of the model in ``file``. ModelError for a tensor that is missing or of another shape."""
    blk = tuple(
        load_weights(Layer, file, config, ops.layer(i), prefix=f"blk.{i}.") for i in range(config.n_layer)
    )
    return load_weights(Llama, file, config, ops, config=config, blk=blk)


def embed(ids: list[int], llama: Llama, ops: Ops) -> Array:
    """Token ids (n,) -> embeddings (n, d)."""
    return ops.embed(llama.token_embd, ids)


def forward(x: Array, llama: Llama, cache: KVCache, ops: Ops, tap: Tap = NULL) -> Array:
    """Embeddings x (n, d), after what ``cache`` holds, through every block -> (n, d), ready for the head.

    The embeddings may be a picture's or tokens': both are treated alike, and the mask is causal for both, as in
    the original LLaVA. Appends n tokens to the cache; ContextError if they do not fit.
    """
    config = llama.config
    cache.check_room(len(x))
    angles = next_angles(len(x), llama, cache, ops)
    x = tap("inp_embd", x)  # (n, d)
    for i in range(config.n_layer):
        here, x = ops.layer(i), ops.to_layer(i, x)  # the backend of block i; most models have one for all
        x = run_block(x, i, llama, cache, angles[here], here, tap.at(f"blk.{i}"))  # (n, d)
    x = ops.to_layer(None, x)
    cache.advance(len(x))
    return tap("result_norm", ops.rms_norm(x, llama.output_norm, config.norm_eps))  # (n, d)


def unembed(x: Array, llama: Llama, ops: Ops, tap: Tap = NULL) -> Array:
    """The head: what ``forward`` returned (n, d) -> logits (n, n_vocab)."""
    head = llama.token_embd if llama.output is None else llama.output
    return tap("result_output", ops.linear(x, head))  # (n, n_vocab)


def run_block(
    x: Array, i: int, llama: Llama, cache: KVCache, angles: tuple[Array, Array], ops: Ops, tap: Tap
) -> Array:
    """Block i: x + attention(norm(x)), then + feed_forward(norm(...)): (n, d) -> (n, d). Fills its KV cache."""
    layer, config = llama.blk[i], llama.config
    cos, sin = angles  # (n, n_pair) each
    y = tap("attn_norm", ops.rms_norm(x, layer.attn_norm, config.norm_eps))  # (n, d)
    q, k, v = project_qkv(y, layer, config, ops, tap)  # (n, n_head | n_head_kv, head_dim)
    q = tap("attn_q_rope", ops.rope(q, cos, sin, config.rope_kind))
    k = tap("attn_k_rope", ops.rope(k, cos, sin, config.rope_kind))
    k, v = cache.append(i, k, v)  # (m, n_head_kv, head_dim) each
    x = tap("ffn_inp", ops.add(x, attend(q, k, v, layer, ops, tap)))  # (n, d)
    y = tap("ffn_norm", ops.rms_norm(x, layer.ffn_norm, config.norm_eps))
    return tap("l_out", ops.add(x, feed_forward(y, layer, ops, tap)))  # (n, d)


def project_qkv(
    x: Array, layer: Layer, config: LlamaConfig, ops: Ops, tap: Tap
) -> tuple[Array, Array, Array]:
    """x (n, d) -> q (n, n_head, head_dim), k and v (n, n_head_kv, head_dim)."""
    weights = (layer.attn_q, layer.attn_k, layer.attn_v)
    biases = (layer.attn_q_bias, layer.attn_k_bias, layer.attn_v_bias)
    products = ops.linears(x, *zip(weights, biases, strict=True))  # (n, heads * head_dim) each
    q, k, v = (y.reshape(len(x), -1, config.head_dim) for y in products)
    return tap("attn_q", q), tap("attn_k", k), tap("attn_v", v)


def attend(q: Array, k: Array, v: Array, layer: Layer, ops: Ops, tap: Tap) -> Array:
    """Causal attention of q (n, n_head, head_dim) to k, v (m, n_head_kv, head_dim), mixed back -> (n, d)."""
    if tap.wants("attn_weights"):
        tap("attn_weights", ops.attention_weights(q, k, causal=True))  # (n_head, n, m)
    mixed = ops.attention(q, k, v, causal=True).reshape(len(q), -1)  # (n, n_head * head_dim)
    mixed = tap("attn_mixed", mixed)
    return tap("attn_output", ops.linear(mixed, layer.attn_output, layer.attn_output_bias))  # (n, d)


def feed_forward(x: Array, layer: Layer, ops: Ops, tap: Tap) -> Array:
    """down(silu(gate(x)) * up(x)): x (n, d) -> (n, d)."""
    gate, up = ops.linears(x, (layer.ffn_gate, layer.ffn_gate_bias), (layer.ffn_up, layer.ffn_up_bias))
    gate, up = tap("ffn_gate", gate), tap("ffn_up", up)  # (n, n_ff) each
    hidden = tap("ffn_swiglu", ops.swiglu(gate, up))  # (n, n_ff)
    return tap("ffn_down", ops.linear(hidden, layer.ffn_down, layer.ffn_down_bias))  # (n, d)


def next_angles(n: int, llama: Llama, cache: KVCache, ops: Ops) -> dict[Ops, tuple[Array, Array]]:
    """cos and sin (n, n_pair) for the next n tokens, in the arrays of each backend that computes blocks.

    They are slices of tables of all positions, which the cache keeps once they are computed.
    """
    if not cache.angles:
        cos, sin = rope_angles(0, cache.n_ctx, llama, ops)  # (n_ctx, n_pair) each
        cache.angles = {here: (here.array(cos), here.array(sin)) for here in dict.fromkeys(cache.layers)}
    angles = {}
    for here, (cos, sin) in cache.angles.items():
        start = cache.positions[here]
        angles[here] = here.slice_at(cos, start, n), here.slice_at(sin, start, n)
    return angles


def rope_angles(start: int, n: int, llama: Llama, ops: Ops) -> tuple[Floats, Floats]:
    """cos and sin (n, n_pair) of the angles by which RoPE turns the n tokens from position ``start`` on.

    NumPy's, in float64: in float32, an angle of a few thousand radians has lost half its digits.
    """
    config = llama.config
    frequency = config.rope_base ** (-2.0 * np.arange(config.n_pair) / config.n_rot)  # (n_pair,)
    if llama.rope_freqs is not None:
        frequency = frequency / ops.numpy(llama.rope_freqs).astype(np.float64)
    position = np.arange(start, start + n) / config.rope_scale  # (n,)
    angle = position[:, None] * frequency  # (n, n_pair)
    return np.cos(angle), np.sin(angle)


# The taps of the forward pass, each with its value's shape. The names are llama.cpp's where it has one.
TAPS = {
    "inp_embd": ("n", "n_embd"),
    "blk.{i}.attn_norm": ("n", "n_embd"),
    "blk.{i}.attn_q": ("n", "n_head", "head_dim"),
    "blk.{i}.attn_k": ("n", "n_head_kv", "head_dim"),
    "blk.{i}.attn_v": ("n", "n_head_kv", "head_dim"),
    "blk.{i}.attn_q_rope": ("n", "n_head", "head_dim"),
    "blk.{i}.attn_k_rope": ("n", "n_head_kv", "head_dim"),
    "blk.{i}.attn_weights": ("n_head", "n", "m"),
    "blk.{i}.attn_mixed": ("n", "n_head * head_dim"),
    "blk.{i}.attn_output": ("n", "n_embd"),
    "blk.{i}.ffn_inp": ("n", "n_embd"),
    "blk.{i}.ffn_norm": ("n", "n_embd"),
    "blk.{i}.ffn_gate": ("n", "n_ff"),
    "blk.{i}.ffn_up": ("n", "n_ff"),
    "blk.{i}.ffn_swiglu": ("n", "n_ff"),
    "blk.{i}.ffn_down": ("n", "n_embd"),
    "blk.{i}.l_out": ("n", "n_embd"),
    "result_norm": ("n", "n_embd"),
    "result_output": ("n", "n_vocab"),
}
