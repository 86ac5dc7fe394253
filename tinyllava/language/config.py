"""The numbers of a language model, read from its GGUF metadata or, failing that, from its tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinyllava.errors import ModelError
from tinyllava.files.gguf import GGUFFile
from tinyllava.ops import RopeKind

# The architectures that llama.py computes, and which features RoPE pairs (llama_model_rope_type in llama.cpp):
# "norm" neighbours, for which converters permute wq and wk; "neox" those half a head apart, as in checkpoints.
ARCHITECTURES: dict[str, RopeKind] = {"llama": "norm", "qwen2": "neox"}


@dataclass(frozen=True)
class LlamaConfig:
    """What the forward pass needs to know. Made by :func:`read_config`."""

    architecture: str
    n_vocab: int  # rows of the embedding table; may exceed the tokenizer's tokens (padded checkpoints)
    n_ctx_train: int  # tokens the model was trained to read at once
    n_embd: int  # features of the residual stream
    n_layer: int
    n_head: int
    n_head_kv: int  # each serves n_head / n_head_kv query heads
    head_dim: int  # features of one head; n_head * head_dim need not be n_embd
    n_ff: int  # features inside the feed-forward network
    n_rot: int  # features of each head that RoPE rotates; even
    norm_eps: float
    rope_base: float  # pair i turns by position * rope_base ** (-2 i / n_rot)
    rope_scale: float  # positions are divided by it (linear scaling); 1 for none
    rope_kind: RopeKind

    @property
    def n_pair(self) -> int:
        """Pairs of features that RoPE rotates in each head."""
        return self.n_rot // 2


def read_config(file: GGUFFile) -> LlamaConfig:
    """The configuration of the language model in ``file``.

    Raises ModelError for an architecture that is not one of ARCHITECTURES, for a feature of LLaMA's relatives
    that is not implemented (experts, other RoPE scalings), and for numbers that are missing or make no sense.
    """
    architecture = str(file.metadata.get("general.architecture", "absent"))
    if architecture not in ARCHITECTURES:
        raise _not_a_language_model(file, architecture)
    keys = Keys(file, architecture)
    n_vocab, n_embd = _embedding_shape(file)
    n_head = keys.integer("attention.head_count")
    n_head_kv = keys.integer("attention.head_count_kv", n_head)
    if n_head_kv < 1 or n_head % n_head_kv:
        raise ModelError(file.path, f"{n_head} heads on {n_head_kv} kv heads", wanted="a multiple")
    head_dim = keys.integer("attention.key_length", n_embd // n_head)
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise ModelError(file.path, "attention.value_length differs from key_length", wanted="one head width")
    if is_mixture(file.metadata, file.tensors):
        raise ModelError(file.path, "a mixture of experts", wanted="a dense model")
    return LlamaConfig(
        architecture=architecture,
        n_vocab=n_vocab,
        n_ctx_train=keys.integer("context_length", 2048),
        n_embd=keys.equal("embedding_length", n_embd),
        n_layer=keys.integer("block_count", _count_blocks(file)),
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        n_ff=keys.integer("feed_forward_length", _ffn_width(file)),
        n_rot=_rotated_width(keys, head_dim),
        norm_eps=keys.number("attention.layer_norm_rms_epsilon", 1e-5),
        rope_base=keys.number("rope.freq_base", 10000.0),
        rope_scale=_rope_scale(keys),
        rope_kind=ARCHITECTURES[architecture],
    )


def is_mixture(metadata: Mapping[str, Any], names: Collection[str]) -> bool:
    """Whether a file is a mixture of experts, by its metadata or its tensors' names."""
    n_experts = metadata.get(f"{metadata.get('general.architecture')}.expert_count", 0)
    return n_experts not in (0, None) or any("_exps." in name for name in names)


class Keys:
    """Typed access to the metadata keys ``<prefix>.*`` of a file, with errors that name the key."""

    def __init__(self, file: GGUFFile, prefix: str) -> None:
        self.file = file
        self.prefix = prefix

    def get(self, key: str) -> Any:
        """The value, or None. A per-layer array whose entries agree counts as one number."""
        value = self.file.metadata.get(f"{self.prefix}.{key}")
        if isinstance(value, (list, tuple, np.ndarray)):
            if len({str(v) for v in value}) != 1:
                raise self.error(key, "differs from layer to layer", "one number for all layers")
            value = value[0]
        return value

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        value = self.get(key)
        value = default if value is None else value
        if value is None:
            raise self.error(key, "is missing", "a number")
        if not is_number(value) or int(value) != value or value < minimum:
            raise self.error(key, f"is {value!r}", f"a whole number of at least {minimum}")
        return int(value)

    def number(self, key: str, default: float) -> float:
        value = self.get(key)
        value = default if value is None else value
        if not is_number(value) or value <= 0:
            raise self.error(key, f"is {value!r}", "a positive number")
        return float(value)

    def equal(self, key: str, seen: int) -> int:
        """``seen``, which the tensors show; ModelError if the key is there and says otherwise."""
        said = self.integer(key, seen)
        if said != seen:
            raise self.error(key, f"is {said}", f"{seen}, the width of token_embd.weight")
        return seen

    def error(self, key: str, found: str, wanted: str) -> ModelError:
        return ModelError(f"{self.file.path}: {self.prefix}.{key}", found, wanted=wanted)


def is_number(value: Any) -> bool:
    """Whether a metadata value is a finite number; a bool is none."""
    numbers = (int, float, np.integer, np.floating)
    return isinstance(value, numbers) and not isinstance(value, bool) and math.isfinite(value)


def _not_a_language_model(file: GGUFFile, architecture: str) -> ModelError:
    wanted = f"a language model ({' or '.join(ARCHITECTURES)})"
    if architecture == "clip":
        hint = "Give this file as --mmproj, and the language model as -m"
        return ModelError(file.path, "an image encoder (architecture clip)", wanted=wanted, hint=hint)
    return ModelError(file.path, f"architecture {architecture}", wanted=wanted)


def _embedding_shape(file: GGUFFile) -> tuple[int, int]:
    table = file.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        hint = "A vocabulary-only file tokenizes but cannot answer"
        raise ModelError(file.path, "no token_embd.weight", wanted="a language model", hint=hint)
    return int(table.shape[0]), int(table.shape[1])


def _count_blocks(file: GGUFFile) -> int:
    numbers = [int(match[1]) for name in file.tensors if (match := re.match(r"blk\.(\d{1,6})\.", name))]
    return 1 + max(numbers, default=-1)


def _ffn_width(file: GGUFFile) -> int | None:
    tensor = file.tensors.get("blk.0.ffn_up.weight")
    return None if tensor is None else int(tensor.shape[0])


def _rotated_width(keys: Keys, head_dim: int) -> int:
    n_rot = keys.integer("rope.dimension_count", head_dim)
    if n_rot % 2 or n_rot > head_dim:
        raise keys.error("rope.dimension_count", f"is {n_rot}", f"an even number of at most {head_dim}")
    return n_rot


def _rope_scale(keys: Keys) -> float:
    """The divisor of positions: today's pair of keys, or the one that files of 2023 carry."""
    kind = keys.get("rope.scaling.type")
    if kind not in (None, "none", "linear"):
        raise keys.error("rope.scaling.type", f"is {kind!r}", "none or linear")
    if kind == "linear":
        return keys.number("rope.scaling.factor", 1.0)
    return keys.number("rope.scale_linear", 1.0) if kind is None else 1.0
