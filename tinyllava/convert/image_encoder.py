"""The mmproj file: vision tower and projector, tensor for tensor as convert_image_encoder_to_gguf.py writes them.

Its metadata is that script's, and three keys that today's loaders want: general.type, image_aspect_ratio for
LLaVA-1.5 too, and clip.vision.feature_layer. The last one says after which block the features are taken; without
it llama.cpp runs one block fewer than the file holds, which is not what the projector was trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np

from tinyllava.convert.language_model import Plan
from tinyllava.convert.layout import Arrays
from tinyllava.convert.mixture import QUANTIZATION_VERSION, Mixture, Model, choose_types, mixture
from tinyllava.convert.tensors import Source, new_tensor
from tinyllava.errors import ModelError
from tinyllava.names import TOWER, find_projector

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HEAD_DIM = 64  # of every CLIP tower
PROJECTION_DIM = 768  # of CLIP-L; required by loaders, used by none
KEY = "clip.vision."
PASSED_ON = {  # keys of config.json that the guide's config has, and GGUF gets as they are
    "image_crop_resolution": int,
    "image_aspect_ratio": str,
    "image_split_resolution": int,
    "mm_patch_merge_type": str,
    "mm_projector_type": str,
}


@dataclass(frozen=True)
class VisionParameters:
    """What the file's metadata says of the tower and of the treatment of pictures."""

    n_embd: int
    n_ff: int
    n_head: int
    n_layer: int  # blocks of the checkpoint's tower; the file may hold one less
    feature_layer: int  # hidden state that the projector takes: 0 is block 0's input, k the output of block k - 1
    image_px: int
    patch_px: int
    norm_eps: float
    activation: str  # transformers' hidden_act
    projection_dim: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pinpoints: tuple[int, ...]  # width, height, width, height, ... px
    passed_on: dict[str, Any]

    @property
    def n_stored(self) -> int:
        """Blocks to store: all but the last as the script does, unless the last one's output is asked for."""
        return max(self.n_layer - 1, self.feature_layer)


def plan_image_encoder(
    tower: Arrays,
    projector: Arrays,
    parameters: VisionParameters,
    name: str,
    outtype: str | None = None,
    projector_type: str | None = None,
) -> Plan:
    """``projector`` with the newline, if there is one. ``outtype`` None for F16."""
    chosen = mixture(outtype or "F16")
    kind = projector_type or projector_type_of(projector)
    stored = sorted((n for n in tower if _is_stored(n, parameters.n_stored)), key=_place)
    missing = [n for n in _names(parameters.n_stored) if n not in tower]
    if missing:
        where = next(iter(tower.values())).where.partition(":")[0]
        found = f"no {missing[0]} (GGUF's name)" + (f" and {len(missing) - 1} other arrays" if missing[1:] else "")
        raise ModelError(where, found, wanted="a whole vision tower", hint="Download it again")
    sources = [Source(n, array) for n, array in projector.items()] + [Source(n, tower[n]) for n in stored]
    types = types_of(sources, chosen, set(projector))
    metadata = vision_metadata(parameters, chosen, name, kind)
    return Plan(metadata, [new_tensor(source, types[source.name]) for source in sources], chosen)


def types_of(sources: list[Source], chosen: Mixture, projector: set[str]) -> dict[str, str]:
    """The type of every tensor. The script's rule for F16 and F32; a mixture's for others, on top of F16's."""
    types = {}
    for source in sources:
        is_kernel = len(source.stored.shape) == 4  # of a convolution
        is_weight = source.is_matrix and (source.name.endswith(".weight") or source.name in projector)
        wide = chosen.name == "F32" and source.name not in projector
        types[source.name] = "F16" if is_kernel or (is_weight and not wide) else "F32"
    if chosen.name in ("F16", "F32"):
        return types
    tensors = {source.name: (source.shape, types[source.name]) for source in sources}
    return choose_types(chosen, Model("clip", 0, 0, 0), tensors)


def projector_type_of(projector: Arrays) -> str:
    """The value of clip.projector_type; as the script does, "mlp" of what it does not know."""
    kind = find_projector(projector)
    return kind.stored_as or kind.name if kind else "mlp"


def _is_stored(name: str, n_blocks: int) -> bool:
    if name.startswith("v.post_ln"):
        return False
    return not name.startswith("v.blk.") or int(name.split(".")[2]) < n_blocks


def _names(n_blocks: int) -> list[str]:
    """All names of a tower of so many blocks."""
    names = []
    for row in TOWER:
        endings = ("",) if row.whole else (".weight", ".bias")
        if row.gguf.startswith(("v.patch_embd", "v.position_embd")):
            endings = (".weight",)
        blocks = range(n_blocks) if "{i}" in row.gguf else range(row.gguf != "v.post_ln")
        names += [row.gguf.replace("{i}", str(i)) + ending for i in blocks for ending in endings]
    return names


def _place(name: str) -> tuple[int, int, str]:
    """Where the script puts a tensor: by block, then in the table's order, weight before bias."""
    parts = name.split(".")
    block = int(parts[2]) if parts[1] == "blk" else -1
    stem = name.removesuffix(".weight").removesuffix(".bias")
    template = stem if block < 0 else stem.replace(f".{block}.", ".{i}.", 1)
    order = [row.gguf for row in TOWER]
    return block, order.index(template), "" if name.endswith(".weight") else name


# ---- config.json and shapes -> parameters


def read_vision_parameters(
    tower: Arrays, vision: dict[str, Any], model: dict[str, Any], preprocessor: dict[str, Any], where: Path
) -> VisionParameters:
    """``vision``: the tower's own config, {} if there is none. ``model``: the LLaVA's config.json.

    What neither says, the arrays do, or CLIP. ModelError where they contradict each other.
    """
    n_embd, _, _, patch_px = _patch_shape(tower, where)
    n_positions = tower["v.position_embd.weight"].shape[0] if "v.position_embd.weight" in tower else 0
    side = isqrt(max(n_positions - 1, 0))
    image_px = _whole(vision, "image_size", side * patch_px, where)
    if n_positions < 2 or side * side != n_positions - 1 or image_px // patch_px != side:
        found = f"{n_positions} positions for tiles of {image_px} px in patches of {patch_px} px"
        raise ModelError(where, found, wanted="1 + a square number of patches")
    n_blocks = 1 + max((int(name.split(".")[2]) for name in tower if name.startswith("v.blk.")), default=0)
    n_layer = _whole(vision, "num_hidden_layers", n_blocks, where)
    if n_layer < n_blocks:
        raise ModelError(where, f"num_hidden_layers {n_layer}, but {n_blocks} blocks are there")
    n_head = _whole(vision, "num_attention_heads", max(1, n_embd // HEAD_DIM), where)
    if n_embd % n_head:
        raise ModelError(where, f"{n_head} heads of {n_embd} features", wanted="a divisor")
    fc1 = tower.get("v.blk.0.ffn_down.weight")  # fc1: names.py
    return VisionParameters(
        n_embd=n_embd,
        n_ff=fc1.shape[0] if fc1 is not None else 0,
        n_head=n_head,
        n_layer=n_layer,
        feature_layer=_feature_layer(model, vision, n_layer, where),
        image_px=image_px,
        patch_px=patch_px,
        norm_eps=float(vision.get("layer_norm_eps", 1e-5)),
        activation=_activation(vision, where),
        projection_dim=_whole(vision, "projection_dim", PROJECTION_DIM, where),
        mean=_colours(preprocessor, "image_mean", CLIP_MEAN, where),
        std=_colours(preprocessor, "image_std", CLIP_STD, where),
        pinpoints=_pinpoints(vision, model, where),
        passed_on=_passed_on(vision, model),
    )


def _patch_shape(tower: Arrays, where: Path) -> tuple[int, ...]:
    shape = tower["v.patch_embd.weight"].shape if "v.patch_embd.weight" in tower else ()
    if len(shape) != 4 or shape[2] != shape[3] or 0 in shape:
        raise ModelError(where, f"a patch embedding of shape {shape}", wanted="(features, 3, pixels, pixels)")
    return shape


def _whole(config: dict[str, Any], key: str, default: int, where: Path) -> int:
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or value < 1:
        raise ModelError(where, f"{key} is {value!r}", wanted="a whole number")
    return value


def _feature_layer(model: dict[str, Any], vision: dict[str, Any], n_layer: int, where: Path) -> int:
    """The hidden state that the projector takes, counted from 0; -2 in the configs of all LLaVAs."""
    layer = model.get("vision_feature_layer", model.get("mm_vision_select_layer"))
    layer = vision.get("vision_feature_layer", -2) if layer is None else layer
    if model.get("projector_hidden_act", "gelu") != "gelu":
        raise ModelError(where, f"projector_hidden_act {model['projector_hidden_act']!r}", wanted="gelu")
    strategy = model.get("vision_feature_select_strategy", model.get("mm_vision_select_feature", "patch"))
    if strategy not in ("default", "patch"):
        raise ModelError(where, f"features {strategy!r}, with the class embedding", wanted="patches alone")
    if type(layer) is not int or not -n_layer - 1 <= layer <= n_layer:
        found = f"features of layer {layer!r} of a tower with {n_layer} blocks"
        raise ModelError(where, found, wanted="one layer (mm_vision_select_layer, vision_feature_layer)")
    return layer if layer >= 0 else n_layer + 1 + layer


def _activation(vision: dict[str, Any], where: Path) -> str:
    kind = vision.get("hidden_act", "quick_gelu")
    if kind not in ("quick_gelu", "gelu", "silu"):
        raise ModelError(where, f"hidden_act {kind!r}", wanted="quick_gelu, gelu or silu")
    return str(kind)


def _colours(config: dict[str, Any], key: str, default: tuple[float, ...], where: Path) -> tuple[float, ...]:
    value = config.get(key, default)
    if not isinstance(value, list | tuple) or len(value) != 3 or not all(type(v) in (int, float) for v in value):
        raise ModelError(where, f"{key} is {value!r}", wanted="three numbers")
    return tuple(float(v) for v in value)


def _pinpoints(vision: dict[str, Any], model: dict[str, Any], where: Path) -> tuple[int, ...]:
    """Widths and heights in turn. transformers' pairs are (height, width), the original's (width, height).

    Published lists have every pair both ways round, and stand in the original's order in transformers' files,
    too. Then the order stays, since it decides between pairs that serve equally well; any other list is turned.
    """
    pairs = vision.get("image_grid_pinpoints") or model.get("image_grid_pinpoints") or []
    try:
        points = [(int(a), int(b)) for a, b in pairs]
    except (TypeError, ValueError):
        raise ModelError(where, f"image_grid_pinpoints {pairs!r}", wanted="pairs of whole numbers") from None
    turned = [(b, a) for a, b in points]
    if "text_config" in model and set(points) != set(turned):
        points = turned
    return tuple(px for point in points for px in point)


def _passed_on(vision: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """The treatment of pictures: from the vision config, or from the model's own."""
    found = {}
    for key, kind in PASSED_ON.items():
        value = vision.get(key, model.get(key))
        if isinstance(value, kind):
            found[key] = value
    if model.get("model_type") == "llava_next":  # transformers has this in its code
        found |= {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
    return found


# ---- parameters -> metadata


def vision_metadata(p: VisionParameters, chosen: Mixture, name: str, projector_type: str) -> dict[str, Any]:
    """Keys and values of the mmproj file."""
    keys: dict[str, Any] = {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "clip.has_text_encoder": False,
        "clip.has_vision_encoder": True,
        "clip.has_llava_projector": True,
        "general.file_type": np.uint32(chosen.file_type),
        "general.name": name,
        "general.description": "image encoder for LLaVA",
        "general.quantization_version": np.uint32(QUANTIZATION_VERSION),
        "clip.projector_type": projector_type,
        "clip.use_gelu": p.activation == "gelu",
        KEY + "image_size": np.uint32(p.image_px),
        KEY + "patch_size": np.uint32(p.patch_px),
        KEY + "embedding_length": np.uint32(p.n_embd),
        KEY + "feed_forward_length": np.uint32(p.n_ff),
        KEY + "projection_dim": np.uint32(p.projection_dim),
        KEY + "attention.head_count": np.uint32(p.n_head),
        KEY + "attention.layer_norm_epsilon": np.float32(p.norm_eps),
        KEY + "block_count": np.uint32(p.n_stored),
        KEY + "feature_layer": np.array([p.feature_layer], np.int32),
        KEY + "image_mean": np.array(p.mean, np.float32),
        KEY + "image_std": np.array(p.std, np.float32),
    }
    if p.activation == "silu":
        keys["clip.use_silu"] = True
    if p.pinpoints:
        keys[KEY + "image_grid_pinpoints"] = np.array(p.pinpoints, np.int32)
    return keys | {
        KEY + key: np.uint32(value) if isinstance(value, int) else value for key, value in p.passed_on.items()
    }
