"""What each tensor is called: in GGUF, in an original LLaVA checkpoint, and in transformers.

Three people named the same arrays. The original LLaVA (haotian-liu/LLaVA) keeps the names of the models that it
joined; transformers puts all three parts under "model." (since 4.52; before, see OLDER); and GGUF's names are
those of two scripts of llama.cpp, convert_legacy_llama.py and convert_image_encoder_to_gguf.py. Where those do
something odd, files in the wild are odd, so this table and tinyllava/convert follow:

- In the vision tower ``ffn_down`` is the *first* layer of the MLP (fc1, which widens) and ``ffn_up`` the second:
  the script of 2023 mixed them up. In the language model ``ffn_up`` and ``ffn_down`` mean what they say.
- The tower's last block is not stored, and ``clip.vision.block_count`` is one less than the checkpoint's number
  of layers: LLaVA takes its features before that block. For the same reason there is no ``v.post_ln``.
- ``v.patch_embd.weight`` is F16 whatever type is asked for, and so are the projector's matrices when F32 is.
  Vectors are always F32.
- The rows of ``attn_q`` and ``attn_k`` of the architecture "llama" are in another order: the two features that
  RoPE rotates together are neighbours there, and half a head apart in the checkpoint (permuted_rows).

``{i}`` stands for the number of a block. A row's names go on with ".weight" or ".bias", unless it is ``whole``.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

Part = Literal["language", "tower", "projector", "newline", "unused"]


@dataclass(frozen=True)
class Row:
    """One array, or one per block, by its three names."""

    gguf: str
    original: str
    transformers: str
    whole: bool = False


_O, _T = "model.layers.{i}.", "model.language_model.layers.{i}."
LANGUAGE = (
    Row("token_embd", "model.embed_tokens", "model.language_model.embed_tokens"),
    Row("output_norm", "model.norm", "model.language_model.norm"),
    Row("output", "lm_head", "lm_head"),  # absent from a tied model: token_embd serves as output, too
    Row("blk.{i}.attn_norm", _O + "input_layernorm", _T + "input_layernorm"),
    Row("blk.{i}.attn_q", _O + "self_attn.q_proj", _T + "self_attn.q_proj"),
    Row("blk.{i}.attn_k", _O + "self_attn.k_proj", _T + "self_attn.k_proj"),
    Row("blk.{i}.attn_v", _O + "self_attn.v_proj", _T + "self_attn.v_proj"),
    Row("blk.{i}.attn_output", _O + "self_attn.o_proj", _T + "self_attn.o_proj"),
    Row("blk.{i}.ffn_norm", _O + "post_attention_layernorm", _T + "post_attention_layernorm"),
    Row("blk.{i}.ffn_gate", _O + "mlp.gate_proj", _T + "mlp.gate_proj"),
    Row("blk.{i}.ffn_up", _O + "mlp.up_proj", _T + "mlp.up_proj"),
    Row("blk.{i}.ffn_down", _O + "mlp.down_proj", _T + "mlp.down_proj"),
)

_O, _T = "model.vision_tower.vision_tower.vision_model.", "model.vision_tower.vision_model."
_OB, _TB = _O + "encoder.layers.{i}.", _T + "encoder.layers.{i}."
TOWER = (  # in the order in which transformers' CLIPVisionModel, and so the script, lists them
    Row("v.class_embd", _O + "embeddings.class_embedding", _T + "embeddings.class_embedding", whole=True),
    Row("v.patch_embd", _O + "embeddings.patch_embedding", _T + "embeddings.patch_embedding"),
    Row("v.position_embd", _O + "embeddings.position_embedding", _T + "embeddings.position_embedding"),
    Row("v.pre_ln", _O + "pre_layrnorm", _T + "pre_layrnorm"),  # the typing error is CLIP's
    Row("v.blk.{i}.attn_k", _OB + "self_attn.k_proj", _TB + "self_attn.k_proj"),
    Row("v.blk.{i}.attn_v", _OB + "self_attn.v_proj", _TB + "self_attn.v_proj"),
    Row("v.blk.{i}.attn_q", _OB + "self_attn.q_proj", _TB + "self_attn.q_proj"),
    Row("v.blk.{i}.attn_out", _OB + "self_attn.out_proj", _TB + "self_attn.out_proj"),
    Row("v.blk.{i}.ln1", _OB + "layer_norm1", _TB + "layer_norm1"),
    Row("v.blk.{i}.ffn_down", _OB + "mlp.fc1", _TB + "mlp.fc1"),  # fc1 widens: see above
    Row("v.blk.{i}.ffn_up", _OB + "mlp.fc2", _TB + "mlp.fc2"),
    Row("v.blk.{i}.ln2", _OB + "layer_norm2", _TB + "layer_norm2"),
    Row("v.post_ln", _O + "post_layernorm", _T + "post_layernorm"),  # known, and left out
)

PROJECTOR = (
    Row("mm.0", "model.mm_projector.0", "model.multi_modal_projector.linear_1"),
    Row("mm.2", "model.mm_projector.2", "model.multi_modal_projector.linear_2"),
    Row("mm", "model.mm_projector", ""),  # LLaVA v1: a single layer
)
NEWLINE = (Row("model.image_newline", "model.image_newline", "model.image_newline", whole=True),)

# How other layouts spell the beginnings of these names: beginning -> the original's or transformers' beginning.
OLDER = {
    "language_model.model.": "model.",  # transformers before 4.52: a LlamaForCausalLM inside
    "language_model.lm_head.": "lm_head.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
    "image_newline": "model.image_newline",
    "mm_projector.": "model.mm_projector.",
    "vision_proj.": "model.mm_projector.",  # ShareGPT4V
    "vit.vision_tower.vision_model.": _T,
    "vision_model.": _T,  # a CLIP tower in its own folder
    "model.vision_tower.embeddings.": _T + "embeddings.",  # transformers 5 without its "vision_model."
    "model.vision_tower.encoder.": _T + "encoder.",
    "model.vision_tower.p": _T + "p",  # pre_layrnorm, post_layernorm
}

# What checkpoints hold and GGUF has no use for, as regular expressions for whole names.
UNUSED = (
    r".*\.rotary_emb\.inv_freq",  # computed from rope_theta
    r"(.*\.)?position_ids",  # 0, 1, 2, ...
    r"text_model\..*|text_projection\.weight|visual_projection\.weight|logit_scale",  # CLIP's text half
)

# MobileVLM's projectors have many arrays; their names change in their beginnings only.
_LDP = (("model.mm_projector.", "mm."), ("mm.mlp.mlp", "mm.model.mlp"), ("mm.peg.peg", "mm.model.peg"))



@dataclass(frozen=True)
class ProjectorKind:
    """A kind of projector: how it is told from its tensors, and what a file says of it."""

    name: str  # llama.cpp's
    sign: str  # how the name of a tensor begins that only this kind has
    matrices: str = ""  # regular expression; the first reads the tower's features, the last gives embeddings
    stored_as: str = ""  # the value of clip.projector_type, where that is not the name
    runs: bool = False  # whether vision/projector.py computes it


_LINEAR = r"mm\.\d{1,4}\.weight"
PROJECTOR_KINDS = (  # the first whose sign is there counts
    ProjectorKind("ldp", "mm.model.mb_block."),  # MobileVLM
    ProjectorKind("ldpv2", "mm.model.peg."),  # MobileVLM V2
    ProjectorKind("resampler", "resampler."),  # MiniCPM-V
    ProjectorKind("mlp_norm", "mm.3.weight", _LINEAR, "mlp"),  # Yi-VL: Linear, LayerNorm, GELU, Linear, LayerNorm
    ProjectorKind("mlp", "mm.2.weight", _LINEAR, runs=True),  # LLaVA-1.5 and 1.6
    ProjectorKind("linear", "mm.0.weight", _LINEAR, "mlp", runs=True),
    ProjectorKind("linear", "mm.weight", r"mm\.weight", "mlp", runs=True),  # LLaVA of April 2023
)
RUNNING_PROJECTORS = tuple(dict.fromkeys(kind.name for kind in PROJECTOR_KINDS if kind.runs))
# The values of clip.projector_type that a converter writes.
PROJECTOR_TYPES = tuple(
    dict.fromkeys(kind.stored_as or kind.name for kind in PROJECTOR_KINDS if kind.sign.startswith("mm."))
)


def find_projector(names: Collection[str]) -> ProjectorKind | None:
    """The kind of the projector among tensors with these names; None if no sign of any is there."""
    return next((kind for kind in PROJECTOR_KINDS if any(name.startswith(kind.sign) for name in names)), None)


def projector_matrices(names: Collection[str]) -> list[str]:
    """The projector's matrices in order: the first reads the tower's features, the last gives embeddings.

    >>> projector_matrices(["mm.10.weight", "mm.2.weight", "mm.2.bias"])
    ['mm.2.weight', 'mm.10.weight']
    """
    kind = find_projector(names)
    found = [name for name in names if kind and re.fullmatch(kind.matrices, name)]
    return sorted(found, key=lambda name: (len(name), name))


@dataclass(frozen=True)
class Identity:
    """What a checkpoint's array is: the part it belongs to, GGUF's name for it, its block's number if any."""

    part: Part
    gguf: str
    block: int | None = None


def _spellings() -> dict[str, tuple[Part, str]]:
    """Every name of every row, with its endings -> (part, GGUF's name)."""
    parts: dict[Part, tuple[Row, ...]] = {
        "language": LANGUAGE, "tower": TOWER, "projector": PROJECTOR, "newline": NEWLINE,
    }  # fmt: skip
    found: dict[str, tuple[Part, str]] = {}
    for part, rows in parts.items():
        for row in rows:
            for ending in ("",) if row.whole else (".weight", ".bias"):
                for name in (row.original, row.transformers):
                    if name:
                        found[name + ending] = (part, row.gguf + ending)
    return found


SPELLINGS = _spellings()


def identify(name: str) -> Identity | None:
    """What the array ``name`` of a checkpoint is, in any of the layouts; None if no LLaVA is known to have it.

    >>> identify("language_model.model.layers.7.self_attn.q_proj.weight")
    Identity(part='language', gguf='blk.7.attn_q.weight', block=7)
    """
    if any(re.fullmatch(pattern, name) for pattern in UNUSED):
        return Identity("unused", "")
    for beginning, usual in OLDER.items():
        if name.startswith(beginning):
            name = usual + name.removeprefix(beginning)
            break
    block = re.search(r"\.layers\.(\d{1,5})\.", name)
    template = name if block is None else f"{name[: block.start(1)]}{{i}}{name[block.end(1) :]}"
    if template in SPELLINGS:
        part, gguf = SPELLINGS[template]
        number = None if block is None else int(block[1])
        return Identity(part, gguf.replace("{i}", str(number)), number)
    if name.startswith("model.mm_projector."):
        for old, new in _LDP:
            name = name.replace(old, new, 1)
        return Identity("projector", name)
    return None
