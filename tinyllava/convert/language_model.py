"""The language model's file: LLaMA and its like (Vicuna, Mistral, Yi, LLaMA-3), and Qwen2.

Tensors equal those of convert_legacy_llama.py (for Qwen2, which it got wrong, of convert_hf_to_gguf.py).
Metadata is what both write. Sizes come from the arrays: config.json files leave out what they think is usual.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tinyllava.convert.mixture import QUANTIZATION_VERSION, Mixture, Model, choose_types, mixture
from tinyllava.convert.rope import RopeScaling, rope_freqs, rope_scaling
from tinyllava.convert.tensors import Source, new_tensor, one_vector
from tinyllava.convert.vocabulary import TYPES, Vocabulary, fit, read_vocabulary
from tinyllava.errors import ModelError
from tinyllava.files.gguf_write import NewTensor
from tinyllava.files.stored import StoredArray
from tinyllava.language.config import ARCHITECTURES
from tinyllava.quant.blocks import TYPES as BLOCK_TYPES

N_HEAD = 32  # transformers' default for all these models, and what llava-hf's config.json files leave out
NATIVE = {"F16": "F16", "BF16": "BF16", "F32": "F32", "F64": "F32"}  # a checkpoint's precision -> outtype
BLOCK = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
OTHER_MODELS = ("gemma", "phi", "mpt", "cohere", "stablelm", "falcon", "internlm", "chatglm", "qwen3")


@dataclass(frozen=True)
class Parameters:
    """What the file's metadata says of the model."""

    architecture: str
    n_vocab: int  # rows of the embeddings
    n_embd: int
    n_layer: int
    n_ctx: int  # tokens
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    norm_eps: float
    rope_base: float
    rope: RopeScaling


@dataclass
class Plan:
    """A file to be written: nothing of it has been read yet but sizes."""

    metadata: dict[str, Any]
    tensors: list[NewTensor]
    mixture: Mixture
    notes: list[str] = field(default_factory=list)


def plan_language_model(
    arrays: dict[str, StoredArray],
    config: dict[str, Any],
    folder: Path,
    outtype: str | None = None,
    *,
    vocabulary: Vocabulary | None = None,
    n_ctx: int = 0,
) -> Plan:
    """``arrays`` by GGUF's names; ``outtype`` None: the checkpoint's own precision; ``n_ctx`` 0: config's."""
    parameters = read_parameters(arrays, config, folder, n_ctx)
    chosen = mixture(outtype or NATIVE.get(arrays["blk.0.attn_q.weight"].dtype, "F16"))
    if vocabulary is None:
        vocabulary = read_vocabulary(folder, config, TYPES)
        fit(vocabulary, parameters.n_vocab)
    sources = [Source(name, stored, _heads(name, parameters)) for name, stored in arrays.items()]
    metadata = model_metadata(parameters, chosen, sources, name_of(folder, config)) | vocabulary.metadata()
    model = Model(parameters.architecture, parameters.n_layer, parameters.n_head, parameters.n_head_kv)
    now = {s.name: (s.shape, "F16" if s.is_matrix else "F32") for s in sources}
    types = choose_types(chosen, model, now)
    legacy = chosen.name == "Q8_0" and parameters.architecture == "llama"
    tensors = [new_tensor(source, types[source.name], legacy) for source in sources]
    if parameters.rope.kind == "llama3":
        tensors.insert(0, one_vector("rope_freqs.weight", rope_freqs(parameters.rope, parameters.rope_base)))
    notes = list(vocabulary.notes)
    if len(set(types.values()) - {"F32", chosen.base}) and BLOCK_TYPES[chosen.base].is_scalar is False:
        notes.append("some matrices have another type than the others, as in llama-quantize's mixtures")
    return Plan(metadata, tensors, chosen, notes)


def _heads(name: str, parameters: Parameters) -> int:
    """How many heads have their rows permuted, so that RoPE pairs neighbours; 0 for all but q and k."""
    if ARCHITECTURES[parameters.architecture] != "norm":
        return 0
    if ".attn_q." in name:
        return parameters.n_head
    return parameters.n_head_kv if ".attn_k." in name else 0


# ---- config.json and shapes -> parameters


def read_parameters(
    arrays: dict[str, StoredArray], config: dict[str, Any], where: Path, n_ctx: int = 0
) -> Parameters:
    """ModelError for arrays that are missing or do not fit together, and for models of another family."""
    kind = f"{config.get('model_type', '')} {config.get('architectures', '')}".lower()
    other = next((word for word in OTHER_MODELS if word in kind), None)
    if other or config.get("num_local_experts"):
        found = f"a language model of type {other or 'mixture of experts'}"
        raise ModelError(where / "config.json", found, wanted="LLaMA, Mistral, Yi or Qwen2")
    n_layer = _check_blocks(arrays, config, where)
    n_vocab, n_embd = _shape(arrays, "token_embd.weight")
    n_q, n_k = (_shape(arrays, f"blk.0.attn_{word}.weight")[0] for word in "qk")
    n_head = _number(config, "num_attention_heads", N_HEAD, where)
    head_dim = _number(config, "head_dim", n_q // n_head, where) if config.get("head_dim") else n_q // n_head
    if head_dim < 2 or n_q != n_head * head_dim or n_k % head_dim or n_head % (n_k // head_dim):
        found = f"{n_head} heads for {n_q} rows of q and {n_k} of k"
        raise ModelError(where / "config.json", found, wanted="a num_attention_heads that divides them")
    n_head_kv = n_k // head_dim
    if _number(config, "num_key_value_heads", n_head_kv, where) != n_head_kv:
        found = f"num_key_value_heads {config['num_key_value_heads']}"
        raise ModelError(where / "config.json", found, wanted=f"{n_head_kv}, as k's {n_k} rows say")
    theta, scaling = rope_scaling(config, head_dim, where)
    biased = {name for name in ("q", "k", "v", "output") if f"blk.0.attn_{name}.bias" in arrays}
    return Parameters(
        architecture="qwen2" if biased == {"q", "k", "v"} else "llama",
        n_vocab=n_vocab,
        n_embd=n_embd,
        n_layer=n_layer,
        n_ctx=n_ctx or _number(config, "max_sequence_length", 0, where) or _context(config, where),
        n_ff=_shape(arrays, "blk.0.ffn_up.weight")[0],
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_base=theta,
        rope=scaling,
    )


def _context(config: dict[str, Any], where: Path) -> int:
    return _number(config, "max_position_embeddings", 2048, where)


def _number(config: dict[str, Any], key: str, default: int, where: Path) -> int:
    """A whole number of config.json; the default also where it says null."""
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or value < (0 if default == 0 else 1):
        raise ModelError(where / "config.json", f"{key} is {value!r}", wanted="a whole number")
    return value


def _shape(arrays: dict[str, StoredArray], name: str) -> tuple[int, int]:
    shape = arrays[name].shape
    if len(shape) != 2 or 0 in shape:
        raise ModelError(arrays[name].where, f"shape {shape}", wanted="a matrix")
    return shape[0], shape[1]


def _check_blocks(arrays: dict[str, StoredArray], config: dict[str, Any], where: Path) -> int:
    """The number of blocks. ModelError names the first array that is missing."""
    stored = [int(name.split(".")[1]) for name in arrays if name.startswith("blk.")]
    n_layer = _number(config, "num_hidden_layers", max(stored, default=0) + 1, where)
    if max(stored, default=-1) >= n_layer:
        found = f"num_hidden_layers {n_layer}, but block {max(stored)} is there"
        raise ModelError(where / "config.json", found, wanted=str(max(stored) + 1))
    wanted = ["token_embd.weight", "output_norm.weight"]
    if config.get("tie_word_embeddings") is False:
        wanted.append("output.weight")
    wanted += [f"blk.{i}.{word}.weight" for i in range(n_layer) for word in BLOCK]
    missing = [name for name in wanted if name not in arrays]
    if missing:
        found = f"no {missing[0]} (GGUF's name)" + (f" and {len(missing) - 1} other arrays" if missing[1:] else "")
        hint = "Is a shard missing? Download the folder again"
        raise ModelError(where, found, wanted="a whole language model", hint=hint)
    return n_layer


# ---- parameters -> metadata


def model_metadata(
    parameters: Parameters, chosen: Mixture, sources: Sequence[Source], name: str
) -> dict[str, Any]:
    """Keys and values but for the tokenizer's."""
    p = parameters
    n_weights = sum(int(np.prod(source.shape)) for source in sources)
    keys: dict[str, Any] = {
        "general.architecture": p.architecture,
        "general.type": "model",
        "general.name": name,
        "general.size_label": size_label(n_weights),
        "general.file_type": np.uint32(chosen.file_type),
        "general.quantization_version": np.uint32(QUANTIZATION_VERSION),
    }
    numbers: dict[str, Any] = {
        "vocab_size": p.n_vocab,
        "context_length": p.n_ctx,
        "embedding_length": p.n_embd,
        "block_count": p.n_layer,
        "feed_forward_length": p.n_ff,
        "rope.dimension_count": p.head_dim,
        "attention.head_count": p.n_head,
        "attention.head_count_kv": p.n_head_kv,
        "attention.key_length": p.head_dim,
        "attention.value_length": p.head_dim,
        "attention.layer_norm_rms_epsilon": np.float32(p.norm_eps),
        "rope.freq_base": np.float32(p.rope_base),
        **p.rope.metadata(),
    }
    typed = {key: np.uint32(value) if isinstance(value, int) else value for key, value in numbers.items()}
    return keys | {f"{p.architecture}.{key}": value for key, value in typed.items()}


def name_of(folder: Path, config: dict[str, Any]) -> str:
    """A name for people: what config.json calls the model, or the folder, its words in upper case.

    >>> name_of(Path("checkpoints/llava-v1.5-7b"), {})
    'Llava v1.5 7B'
    """
    said = str(config.get("_name_or_path") or "")
    plain = said and said.count("/") <= 1 and not said.startswith((".", "/"))
    words = (said if plain else folder.resolve().name).split("/")[-1].replace("-", " ").split()
    return " ".join(_titled(word) for word in words) or "LLaVA"


def _titled(word: str) -> str:
    if word[0].isdecimal() and word[-1:] in "bm":
        return word.upper()
    version = word[0] == "v" and word[1:2].isdecimal()
    return word if version or not word.islower() else word.title()


def size_label(n: int) -> str:
    """Two digits and a unit.

    >>> size_label(6_738_415_616), size_label(148_096)
    ('6.7B', '148K')
    """
    power, unit = next(((p, u) for p, u in ((12, "T"), (9, "B"), (6, "M")) if n > 10**p), (3, "K"))
    scaled = n / 10**power
    return f"{scaled:.{1 if scaled < 9.5 else 0}f}{unit}"
