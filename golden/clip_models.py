"""Small random CLIP vision towers with a LLaVA projector, as mmproj GGUF files and as checkpoints.

A LLaVA takes the features before the tower's last block. Such a file stores exactly the blocks that must
run: `n_block`; the checkpoint that it stands for has one more, so its features are hidden_states[-2].
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from golden.draw import Array, add_tensor, finish, open_writer, weights

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# (width, height) in pixels. With 56-px tiles these are LLaVA-1.6's own five grids.
PINPOINTS_56 = ((56, 112), (112, 56), (112, 112), (168, 56), (56, 168))


@dataclass(frozen=True)
class ClipSpec:
    """One vision tower with its projector, and how its file names things."""

    name: str
    seed: int
    image_size: int = 56  # pixels, square
    patch_size: int = 14  # pixels, square
    n_embd: int = 96
    n_head: int = 4  # head_dim 24: not a power of two
    n_ff: int = 192
    n_block: int = 3  # stored, and all of them run
    n_llm: int = 256  # the projector's output, the language model's n_embd
    norm_eps: float = 1e-5
    activation: str = "quick_gelu"  # or "gelu", "silu": transformers' hidden_act
    projector: str = "mlp"  # or "linear"
    naming: str = "legacy"  # the 2023 script's names, with ffn_up and ffn_down swapped; or "new"
    pinpoints: tuple[tuple[int, int], ...] = ()
    merge_type: str = ""  # "", "flat" or "spatial_unpad"
    omit: tuple[str, ...] = ()  # optional keys that the file lacks

    @property
    def n_position(self) -> int:
        """Patches of one tile, and one for the class embedding."""
        return (self.image_size // self.patch_size) ** 2 + 1


MINIMAL = (
    "general.file_type general.description general.name clip.has_text_encoder clip.has_vision_encoder "
    "clip.has_llava_projector clip.projector_type clip.use_gelu clip.vision.patch_size "
    "clip.vision.embedding_length clip.vision.feed_forward_length clip.vision.block_count "
    "clip.vision.projection_dim clip.vision.attention.layer_norm_epsilon clip.vision.image_mean "
    "clip.vision.image_std"
).split()

# Equal seeds mean equal weights: clip_15, clip_15_new and clip_min are three files of one model.
VISION = {
    spec.name: spec
    for spec in (
        ClipSpec("clip_15", 201),
        ClipSpec("clip_15_new", 201, naming="new"),
        ClipSpec("clip_min", 201, omit=tuple(MINIMAL)),
        ClipSpec("clip_16", 202, n_block=4, pinpoints=PINPOINTS_56, merge_type="spatial_unpad"),
        ClipSpec("clip_16_flat", 202, n_block=4, pinpoints=PINPOINTS_56, merge_type="flat"),
        ClipSpec(
            "clip_16_new", 202, n_block=4, pinpoints=PINPOINTS_56, merge_type="spatial_unpad", naming="new"
        ),
        ClipSpec("clip_gelu", 203, activation="gelu", n_llm=128),
        ClipSpec("clip_silu", 203, activation="silu", n_llm=128),
        ClipSpec("clip_linear", 204, projector="linear", n_llm=128),
    )
}

GAINS = {"attn_q": 1.5, "attn_k": 1.5, "patch_embd": 2.0, "position_embd": 6.0, "bias": 0.3}


def tensor_shapes(spec: ClipSpec) -> dict[str, tuple[int, ...]]:
    """New-style GGUF name -> shape as NumPy sees it: (outputs, inputs)."""
    n, n_ff = spec.n_embd, spec.n_ff
    shapes: dict[str, tuple[int, ...]] = {
        "v.class_embd": (n,),
        "v.patch_embd.weight": (n, 3, spec.patch_size, spec.patch_size),
        "v.position_embd.weight": (spec.n_position, n),
        "v.pre_ln.weight": (n,),
        "v.pre_ln.bias": (n,),
    }
    for block in (f"v.blk.{i}" for i in range(spec.n_block)):
        for name, shape in {
            **{f"attn_{word}": (n, n) for word in ("q", "k", "v", "out")},
            **{"ffn_up": (n_ff, n), "ffn_down": (n, n_ff), "ln1": (n,), "ln2": (n,)},
        }.items():
            shapes[f"{block}.{name}.weight"] = shape
            shapes[f"{block}.{name}.bias"] = shape[:1]
    layers = {"mm": (spec.n_llm, n)} if spec.projector == "linear" else None
    for name, shape in (layers or {"mm.0": (spec.n_llm, n), "mm.2": (spec.n_llm, spec.n_llm)}).items():
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = shape[:1]
    if "unpad" in spec.merge_type:
        shapes["v.image_newline"] = (spec.n_llm,)
    return shapes


def clip_tensors(spec: ClipSpec) -> dict[str, Array]:
    """All tensors by new-style GGUF name (ffn_up is the first of the two linear layers), float32.

    The patch kernel holds only values that F16 can, since legacy files always store it in F16.
    """
    tensors = weights(spec.seed, tensor_shapes(spec), GAINS)
    kernel = tensors["v.patch_embd.weight"]
    tensors["v.patch_embd.weight"] = kernel.astype(np.float16).astype(np.float32)
    return tensors


def legacy_name(name: str) -> str:
    """The 2023 script's name: it calls the first linear layer ffn_down and the second ffn_up."""
    if ".ffn_up." in name:
        return name.replace("ffn_up", "ffn_down")
    return name.replace("ffn_down", "ffn_up").replace("v.image_newline", "model.image_newline")


def metadata(spec: ClipSpec) -> dict[str, object]:
    """Key -> value, in the order of the file; a str, bool, int, float or list."""
    legacy_only = {
        "general.file_type": 0,
        "general.description": "image encoder for LLaVA",
        "clip.has_text_encoder": False,
        "clip.has_llava_projector": True,
    }
    keys: dict[str, object] = {
        "general.name": spec.name,
        **(legacy_only if spec.naming == "legacy" else {"general.type": "mmproj"}),
        "clip.has_vision_encoder": True,
        "clip.projector_type": "mlp",  # what the 2023 script says of a single linear layer too
        "clip.use_gelu": spec.activation == "gelu",
        "clip.use_silu": spec.activation == "silu",
        "clip.vision.image_size": spec.image_size,
        "clip.vision.patch_size": spec.patch_size,
        "clip.vision.embedding_length": spec.n_embd,
        "clip.vision.feed_forward_length": spec.n_ff,
        "clip.vision.block_count": spec.n_block,
        "clip.vision.attention.head_count": spec.n_head,
        "clip.vision.projection_dim": 64,
        "clip.vision.attention.layer_norm_epsilon": spec.norm_eps,
        "clip.vision.image_mean": list(CLIP_MEAN),
        "clip.vision.image_std": list(CLIP_STD),
    }
    if spec.activation != "silu":
        del keys["clip.use_silu"]
    if spec.pinpoints:
        keys["clip.vision.image_grid_pinpoints"] = [px for pinpoint in spec.pinpoints for px in pinpoint]
    if spec.merge_type:
        keys["clip.vision.mm_patch_merge_type"] = spec.merge_type
    return {key: value for key, value in keys.items() if key not in spec.omit}


def add_key(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    """Add one key with the GGUF type that the converters give it."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        raise TypeError(f"{key}: no GGUF type for {type(value).__name__}")


def write_mmproj(path: str | Path, spec: ClipSpec, dtype: str = "F32") -> None:
    """Write tower and projector as an mmproj GGUF. `dtype` is for matrices but not for patch_embd."""
    writer = open_writer(path, "clip")
    for key, value in metadata(spec).items():
        add_key(writer, key, value)
    legacy = spec.naming == "legacy"
    for name, values in clip_tensors(spec).items():
        own_dtype = ("F16" if legacy else "F32") if name == "v.patch_embd.weight" else dtype
        add_tensor(writer, legacy_name(name) if legacy else name, values, own_dtype)
    finish(writer)


HF_BLOCK_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.out_proj",
    "ln1": "layer_norm1",
    "ln2": "layer_norm2",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}
HF_NAMES = {
    "v.class_embd": "embeddings.class_embedding",
    "v.patch_embd.weight": "embeddings.patch_embedding.weight",
    "v.position_embd.weight": "embeddings.position_embedding.weight",
    "v.pre_ln.weight": "pre_layrnorm.weight",  # the typing error is transformers' own
    "v.pre_ln.bias": "pre_layrnorm.bias",
}


def hf_name(name: str) -> str:
    """transformers' name of a tensor of the tower, after "vision_model."."""
    if name in HF_NAMES:
        return HF_NAMES[name]
    _, _, index, word, ending = name.split(".")
    return f"encoder.layers.{index}.{HF_BLOCK_NAMES[word]}.{ending}"


def hf_clip(spec: ClipSpec) -> dict[str, Array]:
    """The tower as CLIPVisionModel: with one block more than the file, and a last norm.

    LLaVA uses neither; both are random, so that whoever runs them gets another answer.
    """
    whole = replace(spec, n_block=spec.n_block + 1)
    state = {
        "vision_model." + hf_name(name): values
        for name, values in clip_tensors(whole).items()
        if name.startswith("v.") and name != "v.image_newline"
    }
    last_norm = {f"v.post_ln.{ending}": (spec.n_embd,) for ending in ("weight", "bias")}
    for name, values in weights(spec.seed, last_norm, GAINS).items():
        state["vision_model." + name.replace("v.post_ln", "post_layernorm")] = values
    return state


def hf_clip_config(spec: ClipSpec) -> dict[str, Any]:
    """A CLIPVisionConfig of the tower: with one block more than the file, as in hf_clip()."""
    return {
        "hidden_size": spec.n_embd,
        "intermediate_size": spec.n_ff,
        "num_hidden_layers": spec.n_block + 1,
        "num_attention_heads": spec.n_head,
        "image_size": spec.image_size,
        "patch_size": spec.patch_size,
        "hidden_act": spec.activation,
        "layer_norm_eps": spec.norm_eps,
    }


def original_clip(spec: ClipSpec) -> dict[str, Array]:
    """Tower, projector and newline by the names in an original LLaVA checkpoint."""
    state = {"model.vision_tower.vision_tower." + name: values for name, values in hf_clip(spec).items()}
    for name, values in clip_tensors(spec).items():
        if name.startswith("mm."):
            state["model.mm_projector" + name[2:]] = values
        elif name == "v.image_newline":
            state["model.image_newline"] = values
    return state
