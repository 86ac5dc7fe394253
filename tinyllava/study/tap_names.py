"""Every activation that a run can show, and what llama.cpp and transformers call the same one.

Ours are the taps of the forward passes, with the prefix of their stage:

    pixels, image_tokens          the whole picture's, before and after the tower
    vit.blk.0.attn_q              the vision tower's; one entry for each tile along the first axis
    mm.0.linear                   the projector's, the same
    llm.blk.0.attn_q_rope         the language model's; one row for each token

``{i}`` stands for a number. Names and shapes come from the tables beside the forward passes; this module adds
the other programs' names, and what must be done to their arrays before numbers can be compared:

    turned          rows of q and k in the checkpoint's order: the features that RoPE pairs are half a head apart.
                    In a GGUF file of the architecture "llama" they are neighbours (names.py, convert/).
    channels_first  a convolution's result, (tiles, features, rows, columns) for our (tiles, patches, features)

llama.cpp gives names in its graphs with ``cb`` (src/models/llama.cpp, tools/mtmd/models/llava.cpp, of 0c1e57098).
It uses one name for several tensors, and none for others; then the operation that made the tensor stands in front,
or is all there is: ``ROPE Qcur-0``, ``ADD mm.0.bias``. transformers' names are those of modules, of which a
forward hook sees the output, or with ``<`` at the end the input (transformers 5.23.0).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from tinyllava.language.llama import TAPS
from tinyllava.vision.encoder import PICTURE_TAPS, TOWERS
from tinyllava.vision.projector import KINDS

Program = Literal["tinyllava", "llama.cpp", "transformers"]
Order = Literal["same", "turned", "channels_first"]
Part = Literal["vit", "llm"]


@dataclass(frozen=True)
class Entry:
    """One activation, or one for each block, by its three names."""

    name: str
    shape: tuple[str, ...]  # of one firing; letters as in the tables
    llama_cpp: tuple[str, ...] = ()  # spellings; the first that a dump has counts
    transformers: str = ""
    order: Order = "same"  # of transformers' array; llama.cpp's is ours

    @property
    def stage(self) -> str:
        """Where on the walk: "vit", "mm", "llm", or the name itself."""
        return self.name.split(".")[0]


# ours -> (llama.cpp's spellings between commas, transformers' module below PREFIXES, order)
_OTHERS: dict[str, tuple[str, str, Order]] = {
    "pixels": ("", "pixel_values", "same"),
    "vit.patch_embd": ("", "vit:embeddings.patch_embedding", "channels_first"),
    "vit.inp_embd": ("", "vit:embeddings", "same"),
    "vit.pre_ln": ("pre_ln", "vit:pre_layrnorm", "same"),  # the typing error is CLIP's
    "vit.blk.{i}.ln1": ("layer_inp_normed-{i}", "vit:encoder.layers.{i}.layer_norm1", "same"),
    "vit.blk.{i}.attn_q": ("RESHAPE Qcur-{i}, Qcur-{i}", "vit:encoder.layers.{i}.self_attn.q_proj", "same"),
    "vit.blk.{i}.attn_k": ("RESHAPE Kcur-{i}, Kcur-{i}", "vit:encoder.layers.{i}.self_attn.k_proj", "same"),
    "vit.blk.{i}.attn_v": ("RESHAPE Vcur-{i}, Vcur-{i}", "vit:encoder.layers.{i}.self_attn.v_proj", "same"),
    "vit.blk.{i}.attn_weights": ("", "vit:encoder.layers.{i}.self_attn.weights", "same"),
    "vit.blk.{i}.attn_mixed": ("kqv_out-{i}", "vit:encoder.layers.{i}.self_attn.out_proj<", "same"),
    "vit.blk.{i}.attn_out": ("attn_out-{i}", "vit:encoder.layers.{i}.self_attn.out_proj", "same"),
    "vit.blk.{i}.ffn_inp": ("ffn_inp-{i}", "vit:encoder.layers.{i}.layer_norm2<", "same"),
    "vit.blk.{i}.ln2": ("ffn_inp_normed-{i}", "vit:encoder.layers.{i}.layer_norm2", "same"),
    "vit.blk.{i}.ffn_up": ("ffn_up_b-{i}", "vit:encoder.layers.{i}.mlp.fc1", "same"),
    "vit.blk.{i}.ffn_act": (
        "ffn_gelu_quick-{i}, ffn_gelu-{i}, ffn_gelu_erf-{i}, ffn_silu-{i}",
        "vit:encoder.layers.{i}.mlp.fc2<",
        "same",
    ),
    "vit.blk.{i}.ffn_down": ("ffn_out-{i}", "vit:encoder.layers.{i}.mlp.fc2", "same"),
    "vit.blk.{i}.l_out": ("layer_out-{i}", "vit:encoder.layers.{i}", "same"),
    "vit.features": ("GET_ROWS patches", "mm:linear_1<", "same"),
    "mm.0.linear": ("ADD mm.0.bias", "mm:linear_1", "same"),
    "mm.0.act": ("GELU", "mm:act", "same"),
    "mm.1.linear": ("ADD mm.2.bias", "mm:linear_2", "same"),
    "image_tokens": ("MTMD_DEBUG_EMBEDDINGS", "", "same"),
    "llm.inp_embd": ("embd, inp_embd", "llm:layers.0<", "same"),
    "llm.blk.{i}.attn_norm": ("attn_norm-{i}", "llm:layers.{i}.input_layernorm", "same"),
    "llm.blk.{i}.attn_q": ("RESHAPE Qcur-{i}", "llm:layers.{i}.self_attn.q_proj", "turned"),
    "llm.blk.{i}.attn_k": ("RESHAPE Kcur-{i}", "llm:layers.{i}.self_attn.k_proj", "turned"),
    "llm.blk.{i}.attn_v": ("RESHAPE Vcur-{i}, Vcur-{i}", "llm:layers.{i}.self_attn.v_proj", "same"),
    "llm.blk.{i}.attn_q_rope": ("ROPE Qcur-{i}, Qcur-{i}", "", "same"),
    "llm.blk.{i}.attn_k_rope": ("ROPE Kcur-{i}, Kcur-{i}", "", "same"),
    "llm.blk.{i}.attn_weights": ("kq_soft_max-{i}", "llm:layers.{i}.self_attn.weights", "same"),
    "llm.blk.{i}.attn_mixed": ("kqv_out-{i}", "llm:layers.{i}.self_attn.o_proj<", "same"),
    "llm.blk.{i}.attn_output": ("attn_out-{i}", "llm:layers.{i}.self_attn.o_proj", "same"),
    "llm.blk.{i}.ffn_inp": ("ffn_inp-{i}", "llm:layers.{i}.post_attention_layernorm<", "same"),
    "llm.blk.{i}.ffn_norm": ("ffn_norm-{i}", "llm:layers.{i}.post_attention_layernorm", "same"),
    "llm.blk.{i}.ffn_gate": ("ffn_gate_b-{i}, ffn_gate-{i}", "llm:layers.{i}.mlp.gate_proj", "same"),
    "llm.blk.{i}.ffn_up": ("ffn_up_b-{i}, ffn_up-{i}", "llm:layers.{i}.mlp.up_proj", "same"),
    "llm.blk.{i}.ffn_swiglu": ("ffn_swiglu-{i}", "llm:layers.{i}.mlp.down_proj<", "same"),
    "llm.blk.{i}.ffn_down": ("ffn_out-{i}", "llm:layers.{i}.mlp.down_proj", "same"),
    "llm.blk.{i}.l_out": ("l_out-{i}", "llm:layers.{i}", "same"),
    "llm.result_norm": ("result_norm", "llm:norm", "same"),
    "llm.result_output": ("result_output", "lm_head", "same"),
}
# How transformers' names begin: in a whole LLaVA of any version, in its parts alone, in the original.
PREFIXES = {
    "vit:": r"(?:model\.)?(?:vision_tower\.)*(?:vision_model\.)?",
    "mm:": r"(?:model\.)?multi_modal_projector\.",
    "llm:": r"(?:model\.)?(?:language_model\.)?(?:model\.)?",
    "": r"(?:language_model\.)?",
}
_ORIGINAL = {"mm_projector.0": "linear_1", "mm_projector.1": "act", "mm_projector.2": "linear_2"}
_ONLY_VISION = re.compile(r"pre_ln|(layer_out|layer_inp_normed|ffn_inp_normed)-\d+")


def _collect() -> dict[str, Entry]:
    """The forward passes' tables in the order of the walk, with the other programs' names."""
    shapes = {"pixels": PICTURE_TAPS["pixels"]}
    for prefix, kinds in ("vit", TOWERS), ("mm", KINDS):
        shapes |= {f"{prefix}.{name}": shape for kind in kinds.values() for name, shape in kind.taps.items()}
    shapes["image_tokens"] = PICTURE_TAPS["image_tokens"]
    shapes |= {f"llm.{name}": shape for name, shape in TAPS.items()}
    entries = {}
    for name, shape in shapes.items():
        llama_cpp, transformers, order = _OTHERS.get(name, ("", "", "same"))
        spellings = tuple(llama_cpp.split(", ")) if llama_cpp else ()
        entries[name] = Entry(name, shape, spellings, transformers, order)
    return entries


ENTRIES = _collect()
#: llama.cpp's spelling of the vision tower and the language model -> ours
_FROM_CB = {
    part: {cb: e.name for e in ENTRIES.values() if e.stage in stages for cb in e.llama_cpp}
    for part, stages in {"vit": ("vit", "mm", "image_tokens"), "llm": ("llm",)}.items()
}


def entry(name: str) -> Entry | None:
    """The entry of our name for one activation, ``llm.blk.3.attn_q``; None if there is no such tap."""
    return ENTRIES.get(re.sub(r"(?<=\.blk\.)\d+(?=\.)", "{i}", name))


def walk(name: str) -> tuple[int, int, int]:
    """Where on the walk our name for an activation stands, to sort by: blocks one after the other.

    The prompt's ``ids`` come before the language model, names that nobody knows last.
    """
    known = entry(name)
    if known is None:
        return (_RUNS["llm.inp_embd"] - 1, 1, 0) if name == "ids" else (len(ENTRIES), 0, 0)
    number = re.search(r"\.blk\.(\d+)\.", name)
    return _RUNS[known.name], int(number[1]) if number else 0, list(ENTRIES).index(known.name)


def _number_runs() -> dict[str, int]:
    """Entries that repeat together, block by block, share a number; all others have their own."""
    runs: dict[str, int] = {}
    last = ""
    for name, e in ENTRIES.items():
        group = e.stage if "{i}" in name else name
        runs[name] = len(runs) if group != last else max(runs.values())
        last = group
    return runs


_RUNS = _number_runs()


def from_llama_cpp(name: str, part: Part, operation: str = "", source: str = "") -> tuple[str, int] | None:
    """Our name for a tensor of llama.cpp's graph, and the rank of its spelling (0 is the best); None if unknown.

    ``operation`` and the second ``source`` are what made it, where a dump tells.

    >>> from_llama_cpp("Qcur-3", "llm", "ROPE", "inp_pos")
    ('llm.blk.3.attn_q_rope', 0)
    """
    number = re.search(r"-(\d+)$", name)
    template = name if number is None else name[: number.start()] + "-{i}"
    known = _FROM_CB[part]
    ways = [f"{operation} {template}", f"{operation} {source}"]
    if number is None:
        ways.append(operation)
    if not operation or not any(cb.endswith(f" {template}") for cb in known):
        ways.append(template)  # one name, one tensor
    for way in ways:
        if way in known:
            ours = known[way]
            rank = ENTRIES[ours].llama_cpp.index(way)
            return (ours if number is None else ours.replace("{i}", number[1])), rank
    return None


def part_of(names: Iterable[str]) -> Part:
    """Whose graph llama.cpp's names are from: both have a kqv_out, but only the vision tower a pre_ln."""
    return "vit" if any(_ONLY_VISION.fullmatch(name) for name in names) else "llm"


def _transformers_patterns() -> list[tuple[re.Pattern[str], str]]:
    patterns = []
    for e in ENTRIES.values():
        if e.transformers:
            prefix, colon, rest = e.transformers.rpartition(":")
            body = re.escape(rest).replace(re.escape("{i}"), r"(\d+)")
            patterns.append((re.compile(PREFIXES[prefix + colon] + body), e.name))
    return patterns


_PATTERNS = _transformers_patterns()


def full_name(transformers: str) -> str:
    """An entry's name in LlavaForConditionalGeneration of transformers 5: ``llm:norm`` with its beginning."""
    parts = {"vit": "vision_tower", "mm": "multi_modal_projector", "llm": "language_model"}
    part, _, rest = transformers.rpartition(":")
    return f"model.{parts[part]}.{rest}" if part else rest


def from_transformers(name: str) -> str | None:
    """Our name for the output of a module, or with ``<`` at the end for its input; None if there is none.

    >>> from_transformers("model.language_model.layers.7.self_attn.q_proj")
    'llm.blk.7.attn_q'
    """
    for old, new in _ORIGINAL.items():
        if name.removesuffix("<").endswith(old):
            name = f"multi_modal_projector.{new}" + "<" * name.endswith("<")
    for pattern, ours in _PATTERNS:
        match = pattern.fullmatch(name)
        if match:
            return ours.replace("{i}", match[1]) if match.groups() else ours
    return None
