"""Small random models, rebuilt from a seed, so that a golden file need only store a model's outputs.

    from golden.models import LANGUAGE, VISION, write_language_model, write_mmproj, hf_state_dict

    write_language_model("language.gguf", LANGUAGE["llama_gqa"])
    write_mmproj("mmproj.gguf", VISION["clip_16"])
    weights = hf_state_dict(LANGUAGE["llama_gqa"])      # the same weights by transformers' names

This file holds the language models; golden/clip_models.py holds the vision towers (ClipSpec, VISION).
Needs NumPy and gguf only.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from golden.clip_models import VISION, ClipSpec, clip_tensors, hf_clip, original_clip, write_mmproj
from golden.draw import Array, add_tensor, finish, open_writer, weights
from golden.vocab import N_TOKENS, VOCABULARIES, Vocabulary

__all__ = [
    "LANGUAGE",
    "VISION",
    "ClipSpec",
    "LlamaSpec",
    "clip_tensors",
    "hf_config",
    "hf_state_dict",
    "language_tensors",
    "original_clip",
    "write_language_model",
    "write_mmproj",
]


@dataclass(frozen=True)
class LlamaSpec:
    """One language model: everything that its file and its transformers config say."""

    name: str
    seed: int
    arch: str = "llama"  # "llama": rope on adjacent pairs; "qwen2": rope on halves, biases on q, k, v
    vocabulary: str = "spm"  # a key of golden.vocab.VOCABULARIES
    n_embd: int = 128
    n_head: int = 4
    n_head_kv: int = 2
    head_dim: int = 48  # not a power of two, and n_head * head_dim != n_embd
    n_ff: int = 256
    n_layer: int = 3
    n_ctx: int = 1024  # tokens
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    rope_factor: float = 1.0  # positions are divided by this ("linear" scaling)
    rope_factor_key: str = "rope.scaling.factor"  # or the old "rope.scale_linear"
    rope_freqs: bool = False  # LLaMA-3.1: each frequency has its own divisor, stored as a tensor
    tied: bool = False  # no output.weight: token_embd serves as output
    qkv_bias: bool = False
    output_bias: bool = False  # attn_output.bias
    ffn_bias: bool = False

    @property
    def n_vocab(self) -> int:
        """Tokens in the vocabulary, rows of token_embd."""
        return N_TOKENS


# LLaMA-3.1's rule, with a context so short that all three of its branches occur among 24 frequencies.
LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}

# vicuna is what the original LLaVA can load (its transformers wants n_head * head_dim == n_embd).
# llama_gqa is the one whose every row has a multiple of 256 values, so that K-quants fit it everywhere.
LANGUAGE = {
    spec.name: spec
    for spec in (
        LlamaSpec("llama_gqa", 101, n_embd=256, n_head=8, n_head_kv=2, head_dim=96, n_layer=2),
        LlamaSpec("vicuna", 100, n_embd=256, n_head=8, n_head_kv=8, head_dim=32, n_layer=2),
        LlamaSpec("llama_tied", 102, n_head_kv=4, tied=True),
        LlamaSpec("mistral", 103, rope_base=1e6, n_head=8, n_head_kv=2, head_dim=16),
        LlamaSpec("rope_linear", 104, rope_factor=4.0),
        LlamaSpec("rope_linear_old", 104, rope_factor=4.0, rope_factor_key="rope.scale_linear"),
        LlamaSpec("rope_freqs", 105, rope_freqs=True),
        LlamaSpec("llama_bias", 106, qkv_bias=True, output_bias=True, ffn_bias=True),
        LlamaSpec("qwen2", 107, "qwen2", "bpe", n_embd=192, rope_base=1e6, norm_eps=1e-6, qkv_bias=True),
    )
}

# Attention sharp enough that a wrong position shows, logits several units apart.
GAINS = {"attn_q": 1.5, "attn_k": 1.5, "ffn_down": 2.0, "output": 3.0, "bias": 0.5}


def tensor_shapes(spec: LlamaSpec) -> dict[str, tuple[int, ...]]:
    """GGUF name -> shape as NumPy sees it: (outputs, inputs)."""
    n_q, n_kv = spec.n_head * spec.head_dim, spec.n_head_kv * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (spec.n_vocab, spec.n_embd),
        "output_norm.weight": (spec.n_embd,),
    }
    if not spec.tied:
        shapes["output.weight"] = (spec.n_vocab, spec.n_embd)
    matrices = {
        "attn_q": (n_q, spec.n_embd, spec.qkv_bias),
        "attn_k": (n_kv, spec.n_embd, spec.qkv_bias),
        "attn_v": (n_kv, spec.n_embd, spec.qkv_bias),
        "attn_output": (spec.n_embd, n_q, spec.output_bias),
        "ffn_gate": (spec.n_ff, spec.n_embd, spec.ffn_bias),
        "ffn_up": (spec.n_ff, spec.n_embd, spec.ffn_bias),
        "ffn_down": (spec.n_embd, spec.n_ff, spec.ffn_bias),
    }
    for block in (f"blk.{i}" for i in range(spec.n_layer)):
        shapes[f"{block}.attn_norm.weight"] = shapes[f"{block}.ffn_norm.weight"] = (spec.n_embd,)
        for name, (n_out, n_in, has_bias) in matrices.items():
            shapes[f"{block}.{name}.weight"] = (n_out, n_in)
            if has_bias:
                shapes[f"{block}.{name}.bias"] = (n_out,)
    return shapes


def rope_divisors(spec: LlamaSpec) -> Array:
    """LLaMA-3.1's rope_freqs.weight: by what each of head_dim / 2 frequencies is divided."""
    frequency = spec.rope_base ** -(np.arange(0, spec.head_dim, 2) / spec.head_dim)
    turns = LLAMA3_ROPE["original_max_position_embeddings"] * frequency / (2 * np.pi)
    low, high, factor = (LLAMA3_ROPE[key] for key in ("low_freq_factor", "high_freq_factor", "factor"))
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)  # 0: slow, divide by factor; 1: fast, keep
    return (1.0 / ((1.0 - blend) / factor + blend)).astype(np.float32)


def language_tensors(spec: LlamaSpec) -> dict[str, Array]:
    """All tensors by GGUF name, float32, q and k in GGUF's row order."""
    gains = GAINS | {"token_embd": 3.0 if spec.tied else np.sqrt(spec.n_embd)}
    tensors = weights(spec.seed, tensor_shapes(spec), gains)
    if spec.rope_freqs:
        tensors["rope_freqs.weight"] = rope_divisors(spec)
    return tensors


def write_language_model(path: str | Path, spec: LlamaSpec, dtype: str = "F32") -> None:
    """Write the model as GGUF. `dtype` ("F32", "F16", "Q8_0", "Q4_0", ...) is for matrices."""
    writer = open_writer(path, spec.arch)
    writer.add_name(spec.name)
    add_hyperparameters(writer, spec)
    add_vocabulary(writer, VOCABULARIES[spec.vocabulary]())
    for name, values in language_tensors(spec).items():
        add_tensor(writer, name, values, dtype)
    finish(writer)


def add_hyperparameters(writer: gguf.GGUFWriter, spec: LlamaSpec) -> None:
    """The keys <arch>.*"""
    writer.add_context_length(spec.n_ctx)
    writer.add_embedding_length(spec.n_embd)
    writer.add_block_count(spec.n_layer)
    writer.add_feed_forward_length(spec.n_ff)
    writer.add_head_count(spec.n_head)
    writer.add_head_count_kv(spec.n_head_kv)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_rope_freq_base(spec.rope_base)
    writer.add_vocab_size(spec.n_vocab)
    if spec.n_head * spec.head_dim != spec.n_embd:
        writer.add_key_length(spec.head_dim)
        writer.add_value_length(spec.head_dim)
    if spec.rope_factor != 1.0:
        if spec.rope_factor_key == "rope.scaling.factor":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_float32(f"{spec.arch}.{spec.rope_factor_key}", spec.rope_factor)


def add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    """The keys tokenizer.ggml.*"""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.types))
    writer.add_bos_token_id(vocabulary.bos)
    writer.add_eos_token_id(vocabulary.eos)
    writer.add_add_bos_token(vocabulary.add_bos)
    if vocabulary.unk is not None:
        writer.add_unk_token_id(vocabulary.unk)
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
    if vocabulary.merges:
        writer.add_token_merges(list(vocabulary.merges))
    if vocabulary.pre is not None:
        writer.add_tokenizer_pre(vocabulary.pre)


HF_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
HF_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def halves_from_pairs(values: Array, n_head: int) -> Array:
    """Undo the converter's reordering of the rows of q or k (weight or bias).

    GGUF's arch llama rotates rows (0, 1), (2, 3), ... of a head, transformers (0, d/2), (1, d/2 + 1), ...
    """
    rows = values.reshape(n_head, -1, 2, *values.shape[1:])  # (head, pair, member, ...)
    return np.ascontiguousarray(rows.swapaxes(1, 2).reshape(values.shape))


def hf_name(name: str) -> str:
    """transformers' name of a tensor of the language model, e.g. model.layers.0.self_attn.q_proj.weight."""
    if name in HF_NAMES:
        return HF_NAMES[name]
    _, index, word, ending = name.split(".")
    return f"model.layers.{index}.{HF_LAYER_NAMES[word]}.{ending}"


def hf_state_dict(spec: LlamaSpec | ClipSpec) -> dict[str, Array]:
    """The same weights by transformers' names, q and k in transformers' row order.

    A language model as LlamaForCausalLM or Qwen2ForCausalLM, a vision tower as CLIPVisionModel with the
    prefix "vision_model." (transformers 5 has dropped it: strip it there).
    """
    if isinstance(spec, ClipSpec):
        return hf_clip(spec)
    state = {}
    for name, values in language_tensors(spec).items():
        if name == "rope_freqs.weight":
            continue  # transformers computes it from its config
        if spec.arch == "llama" and ".attn_q." in name:
            values = halves_from_pairs(values, spec.n_head)
        if spec.arch == "llama" and ".attn_k." in name:
            values = halves_from_pairs(values, spec.n_head_kv)
        state[hf_name(name)] = values
    return state


def hf_config(spec: LlamaSpec) -> dict[str, Any]:
    """config.json of the same model, with the keys that transformers has used since 4.31 (rope_scaling)."""
    config: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM" if spec.arch == "qwen2" else "LlamaForCausalLM"],
        "model_type": spec.arch,
        "vocab_size": spec.n_vocab,
        "hidden_size": spec.n_embd,
        "intermediate_size": spec.n_ff,
        "num_hidden_layers": spec.n_layer,
        "num_attention_heads": spec.n_head,
        "num_key_value_heads": spec.n_head_kv,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": spec.n_ctx,
        "rms_norm_eps": spec.norm_eps,
        "rope_theta": spec.rope_base,
        "tie_word_embeddings": spec.tied,
        "bos_token_id": VOCABULARIES[spec.vocabulary]().bos,
        "eos_token_id": VOCABULARIES[spec.vocabulary]().eos,
        "attention_bias": spec.qkv_bias,
        "mlp_bias": spec.ffn_bias,
    }
    if spec.rope_factor != 1.0:
        config["rope_scaling"] = {"rope_type": "linear", "type": "linear", "factor": spec.rope_factor}
    if spec.rope_freqs:
        config["rope_scaling"] = {"rope_type": "llama3", **LLAMA3_ROPE}
    return config
