"""Which block format each tensor gets: the mixtures behind names such as Q4_K_M.

A mixture has a base format for most matrices, and gives more bits to those whose errors hurt most: the output
matrix, the value projections (small where heads share them, and what every head passes on) and the second
matrix of the feed-forward network, in some layers or in all. The choices are llama.cpp's, found by measuring the
perplexity of models (``llama_tensor_get_type`` in src/llama-quant.cpp); for an image encoder, too, where its
names are the same. "In order" below is llama.cpp's order of tensors: by layer, then by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple

from tinyllava.errors import ModelError, UsageError
from tinyllava.quant.blocks import TYPES


class Mixture(NamedTuple):
    """``file_type`` is what general.file_type says of such a file (``enum llama_ftype`` in llama.h)."""

    name: str
    base: str  # block format of most matrices
    file_type: int


MIXTURES = {
    m.name: m
    for m in (
        Mixture("F32", "F32", 0),
        Mixture("F16", "F16", 1),
        Mixture("BF16", "BF16", 32),
        Mixture("Q4_0", "Q4_0", 2),
        Mixture("Q4_1", "Q4_1", 3),
        Mixture("Q5_0", "Q5_0", 8),
        Mixture("Q5_1", "Q5_1", 9),
        Mixture("Q8_0", "Q8_0", 7),
        Mixture("Q2_K", "Q2_K", 10),
        Mixture("Q3_K_S", "Q3_K", 11),
        Mixture("Q3_K_M", "Q3_K", 12),
        Mixture("Q3_K_L", "Q3_K", 13),
        Mixture("Q4_K_S", "Q4_K", 14),
        Mixture("Q4_K_M", "Q4_K", 15),
        Mixture("Q5_K_S", "Q5_K", 16),
        Mixture("Q5_K_M", "Q5_K", 17),
        Mixture("Q6_K", "Q6_K", 18),
        Mixture("IQ4_NL", "IQ4_NL", 25),
        Mixture("IQ4_XS", "IQ4_XS", 30),
    )
}
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}  # as llama-quantize has them
QUANTIZATION_VERSION = 2  # general.quantization_version: the layouts of the blocks, GGML_QNT_VERSION in ggml.h

# Rows of this format must be multiples of 256; where they are not, this one of 32 stands in.
FALLBACK = {
    "Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL",
}  # fmt: skip

# Matrices by name that stay as they are: norms, what routes experts, and an image encoder's embeddings of
# positions and patches, which the loaders add and convolve as plain numbers.
KEPT = ("_norm.weight", "ffn_gate_inp.weight", "position_embd", ".patch_embd", "token_types.weight")


def mixture(name: str) -> Mixture:
    """The mixture of this name, in upper or lower case. UsageError with the nearest one if there is none."""
    upper = name.upper()
    found = MIXTURES.get(ALIASES.get(upper, upper))
    if found is None:
        close = get_close_matches(upper, list(MIXTURES), n=1, cutoff=0.5)
        hint = f"The nearest is {close[0]}" if close else ""
        raise UsageError(name, "not a type to quantize to", wanted=", ".join(MIXTURES), hint=hint)
    return found


@dataclass(frozen=True)
class Model:
    """What the choices depend on beside names and shapes. Counts are 0 for an image encoder."""

    architecture: str
    n_layer: int
    n_head: int  # of the first layer
    n_head_kv: int

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], where: object = "model") -> Model:
        """Read from a GGUF file's metadata. ModelError for a mixture of experts, whose rules are others."""
        architecture = str(metadata.get("general.architecture", ""))
        if metadata.get(f"{architecture}.expert_count", 0) or architecture == "falcon":
            found = f"a model of architecture {architecture} with rules of its own"
            raise ModelError(where, found, wanted="a dense model", hint="Use llama-quantize for it")
        if architecture == "clip":
            return cls(architecture, 0, 0, 0)
        n_head = _first(metadata.get(f"{architecture}.attention.head_count", 0))
        n_head_kv = _first(metadata.get(f"{architecture}.attention.head_count_kv", n_head))
        return cls(architecture, _first(metadata.get(f"{architecture}.block_count", 0)), n_head, n_head_kv)

    @property
    def heads_share_much(self) -> bool:
        """Whether four or more query heads share one value head, whose matrix is then small."""
        return self.n_head_kv > 0 and self.n_head // self.n_head_kv >= 4

    @property
    def is_70b(self) -> bool:
        """LLaMA-2 70B and its like: 80 layers, eight query heads to a value head."""
        shared = self.n_head != self.n_head_kv if self.architecture == "llama" else True
        return self.architecture in ("llama", "qwen2") and self.n_layer == 80 and shared


def _first(value: Any) -> int:
    """A count that may be given layer by layer."""
    return int(value if isinstance(value, int) else value[0])


def choose_types(
    chosen: Mixture, model: Model, tensors: Mapping[str, tuple[tuple[int, ...], str]]
) -> dict[str, str]:
    """The block format of every tensor: name -> type, from name -> (shape in NumPy's order, type now)."""
    types = {name: kind for name, (_, kind) in tensors.items()}
    order = sorted(tensors, key=_order)
    n_values = sum(_role(name) == "attn_v" for name in order)
    tied = "output.weight" not in tensors  # then token_embd is the output matrix as well
    counts = {"attn_v": 0, "ffn_down": 0}  # of the matrices so far
    for name in order:
        shape, _ = tensors[name]
        if not is_quantized(name, shape):
            continue
        kind = chosen.base
        if not TYPES[kind].is_scalar:
            role = _role(name)
            if role == "output" or (role == "token_embd" and tied):
                kind = _output(kind, shape[-1])
            elif role == "attn_v":
                kind = _attn_v(chosen, model, counts[role], n_values)
            elif role == "ffn_down":
                kind = _ffn_down(chosen, counts[role], model.n_layer)
            elif role == "attn_output":
                kind = {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(chosen.name, kind)
            if role in counts:
                counts[role] += 1
            kind = _fitting(kind, shape[-1])
        types[name] = kind
    return types


def is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is changed at all: matrices are, vectors and a few matrices that must not be are not."""
    n_dims = len(shape)
    while n_dims > 1 and shape[len(shape) - n_dims] == 1:  # leading 1s are none of GGUF's dimensions
        n_dims -= 1
    return n_dims >= 2 and name.endswith("weight") and not any(part in name for part in KEPT)


def _order(name: str) -> tuple[int, bytes]:
    layer = re.match(r"blk\.(\d+)\.", name)
    return int(layer[1]) if layer else -1, name.encode()


def _role(name: str) -> str:
    """What a matrix does, where it matters: the first that fits."""
    if name in ("output.weight", "token_embd.weight"):
        return name.removesuffix(".weight")
    if "attn_v.weight" in name or "attn_qkv.weight" in name:
        return "attn_v"
    if "attn_output.weight" in name:
        return "attn_output"
    return "ffn_down" if "ffn_down" in name else ""


def _more_bits(i: int, n: int) -> bool:
    """The first and the last eighth of n matrices, and every third of those between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _output(base: str, n_cols: int) -> str:
    if n_cols % TYPES[base].block_size or base == "Q8_0":
        return "Q8_0"
    return "Q6_K"


def _attn_v(chosen: Mixture, model: Model, i: int, n: int) -> str:
    kind = chosen.base
    if chosen.name == "Q2_K":
        kind = "Q4_K" if model.heads_share_much else "Q3_K"
    elif chosen.name == "Q3_K_M":
        kind = "Q5_K" if i < 2 else "Q4_K"
    elif chosen.name == "Q3_K_L" or (chosen.name in ("IQ4_NL", "IQ4_XS") and model.heads_share_much):
        kind = "Q5_K"
    elif chosen.name in ("Q4_K_M", "Q5_K_M") and _more_bits(i, n):
        kind = "Q6_K"
    elif chosen.name == "Q4_K_S" and i < 4:
        kind = "Q5_K"
    return "Q5_K" if model.is_70b and kind in ("Q3_K", "Q4_K") else kind


def _ffn_down(chosen: Mixture, i: int, n: int) -> str:
    if chosen.name == "Q2_K":
        return "Q3_K"
    if chosen.name == "Q3_K_M":
        return "Q5_K" if i < n // 16 else "Q4_K"
    if chosen.name == "Q3_K_L":
        return "Q5_K"
    if chosen.name in ("Q4_K_M", "Q5_K_M") and _more_bits(i, n):
        return "Q6_K"
    if chosen.name in ("Q4_K_S", "IQ4_NL", "IQ4_XS") and i < n // 8:
        return "Q5_K"
    return chosen.base


def _fitting(kind: str, n_cols: int) -> str:
    """The format itself, or one with smaller blocks that rows of n_cols fill, in the end F16."""
    for candidate in (kind, FALLBACK.get(kind, kind)):
        if n_cols % TYPES[candidate].block_size == 0:
            return candidate
    return "F16"
