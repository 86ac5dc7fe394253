"""What an mmproj GGUF file says of its vision tower, and what its tensors say where its keys do not.

Such files were written by several scripts over three years. Keys are missing, or disagree with the tensors;
shapes cannot be wrong, so sizes are taken from them wherever possible. What was inferred is in `notes`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np

from tinyllava.errors import ModelError
from tinyllava.files.gguf import GGUFFile
from tinyllava.names import RUNNING_PROJECTORS, find_projector, projector_matrices
from tinyllava.ops import Activation
from tinyllava.profile import LLAVA, Blocks, ClassToken, Profile
from tinyllava.vision.image import Size

Aspect = Literal["pad", "square", "anyres"]
Merge = Literal["flat", "spatial", "spatial_unpad"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_TILES = 256  # of one pinpoint; LLaVA-1.6 has 4. More is a damaged file, and would cost gigabytes
KEY = "clip.vision."
Floats3 = tuple[float, float, float]


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower's sizes and the picture's treatment."""

    n_embd: int  # features of a patch inside the tower
    n_ff: int  # features between the two layers of a block's MLP
    n_head: int
    n_block: int  # blocks that run
    n_embd_llm: int  # features of a token in the language model
    image_px: int  # side of a tile
    patch_px: int  # side of a patch
    norm_eps: float
    activation: Activation
    projector_activation: Activation
    projector: str  # its kind, a key of projector.KINDS
    mean: Floats3  # red, green, blue, of values in 0..1
    std: Floats3
    aspect: Aspect  # what becomes of a picture that is not one square tile: see anyres.plan_picture
    pinpoints: tuple[Size, ...]  # resolutions to choose from when aspect is "anyres", pixels
    merge: Merge
    ffn_swapped: bool  # the file calls the first layer ffn_down, as the 2023 script does
    newline: str | None  # what stands before the name of the tensor image_newline: "v." or "model."
    tower: str = "clip"  # its kind, a key of encoder.TOWERS
    class_token: ClassToken = "first"  # see profile.py
    post_norm: bool = False  # whether v.post_ln is stored and applied
    notes: tuple[str, ...] = ()  # what was inferred, for people

    @property
    def head_dim(self) -> int:
        """Features of one head."""
        return self.n_embd // self.n_head

    @property
    def grid_patches(self) -> int:
        """Patches along a tile's side. A remainder of pixels is left over, as a strided convolution does."""
        return self.image_px // self.patch_px

    @property
    def n_patches(self) -> int:
        """Patches of a tile, so tokens of a tile."""
        return self.grid_patches**2

    @classmethod
    def from_gguf(cls, file: GGUFFile, profile: Profile = LLAVA) -> VisionConfig:
        """Read keys and shapes. ModelError names what is missing, contradictory or not supported."""
        reader = Reader(file)
        projector = reader.projector_kind()
        reader.refuse_others(projector)
        n_embd = reader.shape("v.position_embd.weight", 2)[1]
        patch_px = reader.shape("v.patch_embd.weight", 4)[3]
        swapped = reader.shape("v.blk.0.ffn_down.weight", 2)[1] == n_embd
        pinpoints = reader.pinpoints(image_px := reader.image_px(patch_px))
        return cls(
            n_embd=n_embd,
            n_ff=reader.shape("v.blk.0.ffn_down.weight", 2)[0 if swapped else 1],
            n_head=reader.n_head(n_embd),
            n_block=reader.n_block(profile.blocks),
            n_embd_llm=reader.n_embd_llm(),
            image_px=image_px,
            patch_px=patch_px,
            norm_eps=reader.number(KEY + "attention.layer_norm_epsilon", 1e-5),
            activation=reader.activation(profile),
            projector_activation=profile.projector_gelu,
            projector=projector,
            mean=reader.colours(KEY + "image_mean", CLIP_MEAN),
            std=reader.colours(KEY + "image_std", CLIP_STD, least=0.0),
            aspect=reader.aspect(pinpoints),
            pinpoints=pinpoints,
            merge=reader.merge(),
            ffn_swapped=swapped,
            newline=reader.newline(),
            class_token=profile.class_token,
            post_norm=profile.post_norm == "if_stored" and "v.post_ln.weight" in file.tensors,
            notes=tuple(reader.notes),
        )


class Reader:
    """One file's keys and shapes, with checks; collects notes on what it had to infer."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.keys: dict[str, Any] = file.metadata
        self.notes: list[str] = []

    def error(self, found: str, wanted: str = "", hint: str = "") -> ModelError:
        return ModelError(self.file.path, found, wanted=wanted, hint=hint)

    # ---- single values

    def shape(self, name: str, n_axes: int) -> tuple[int, ...]:
        tensor = self.file.tensors.get(name)
        if tensor is None:
            raise self.error(f"tensor {name} is missing", hint="The file is incomplete or of another model")
        if len(tensor.shape) != n_axes or 0 in tensor.shape:
            raise self.error(f"{name}: shape {tuple(tensor.shape)}", wanted=f"{n_axes} axes, none empty")
        return tuple(int(n) for n in tensor.shape)

    def number(self, key: str, default: float) -> float:
        value = self.keys.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise self.error(f"{key} is {value!r}", wanted="a positive number")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.keys.get(key, False)
        if not isinstance(value, (bool, int)):
            raise self.error(f"{key} is {value!r}", wanted="true or false")
        return bool(value)

    def text(self, key: str, default: str) -> str:
        value = self.keys.get(key, default)
        if not isinstance(value, str):
            raise self.error(f"{key} is {value!r}", wanted="a string")
        return value

    def integers(self, key: str) -> list[int]:
        """A flat or nested array of integers, flattened; [] if the key is missing."""
        try:
            values = np.asarray(self.keys.get(key, []))
        except ValueError:  # arrays of different lengths in an array
            raise self.error(f"{key} is not an array of integers") from None
        if values.size and not np.issubdtype(values.dtype, np.integer):
            raise self.error(f"{key} is not an array of integers")
        return [int(value) for value in values.ravel()]

    def colours(self, key: str, default: Floats3, *, least: float = -math.inf) -> Floats3:
        """Three numbers above ``least``."""
        stored = self.keys.get(key, default)
        try:
            values = [float(value) for value in np.asarray(stored, float).ravel()[:3]]
        except (TypeError, ValueError):
            values = []
        if len(values) < 3 or not all(least < value < math.inf for value in values):
            raise self.error(f"{key} is {stored!r}", wanted=f"three numbers above {least}")
        return values[0], values[1], values[2]

    # ---- tower and projector

    def refuse_others(self, projector: str) -> None:
        """ModelError for a file that is no image encoder, or one that does not run."""
        names = self.file.tensors
        if not any(name.startswith("v.") for name in names):
            is_language_model = any(name.startswith("token_embd") for name in names)
            hint = "This is the language model; give the mmproj file" if is_language_model else ""
            raise self.error("no vision tower (no tensor named v.*)", wanted="an mmproj file", hint=hint)
        if (found := unsupported(projector, names)) is not None:
            raise self.error(*found)

    def image_px(self, patch_px: int) -> int:
        """The tile's side: the key, or what the number of stored positions allows."""
        n_patches = self.shape("v.position_embd.weight", 2)[0] - 1
        side = math.isqrt(max(n_patches, 0))
        if n_patches < 1 or side * side != n_patches:
            raise self.error(f"v.position_embd.weight has {n_patches + 1} rows", wanted="1 + a square number")
        if KEY + "image_size" not in self.keys:
            self.notes.append(f"no image_size: {side * patch_px} px, from the position embeddings")
            return side * patch_px
        image_px = int(self.number(KEY + "image_size", 0))
        if image_px // patch_px != side:
            raise self.error(
                f"image_size {image_px} with patches of {patch_px} px and {n_patches + 1} positions",
                wanted=f"an image_size of {side * patch_px}",
            )
        return image_px

    def n_head(self, n_embd: int) -> int:
        key = KEY + "attention.head_count"
        usual = max(1, n_embd // 64)
        if key not in self.keys:
            self.notes.append(f"no attention.head_count: {usual}, for heads of 64 features as in CLIP")
        n_head = int(self.number(key, usual))
        if n_head < 1 or n_embd % n_head:
            raise self.error(f"{key} {n_head}", wanted=f"a divisor of n_embd {n_embd}")
        return n_head

    def n_block(self, rule: Blocks) -> int:
        """How many blocks run: all that are stored, or those before the layer that feature_layer names.

        feature_layer counts hidden states as transformers does: 0 is what enters block 0, k what leaves
        block k - 1. The two other rules run block_count - 1, which is not what LLaVA was trained on.
        """
        n_stored = self._stored_blocks()
        said = int(self.number(KEY + "block_count", n_stored))
        if said > n_stored:
            raise self.error(f"{n_stored} blocks stored", wanted=f"{said}, its block_count")
        layers = self.integers(KEY + "feature_layer")
        if len(layers) > 1:
            raise self.error(f"features of several layers {layers}", wanted="one clip.vision.feature_layer")
        if layers and not 0 <= layers[0] <= n_stored:
            raise self.error(f"clip.vision.feature_layer {layers[0]}", wanted=f"0..{n_stored}")
        if layers and rule != "count_less_one":
            return layers[0]
        if rule != "stored":
            return said - 1
        if said < n_stored:
            self.notes.append(f"block_count says {said}, but {n_stored} blocks are stored, and run")
        return n_stored

    def _stored_blocks(self) -> int:
        """How many v.blk.{i} there are. ModelError if one between them is missing."""
        stored = {int(m[1]) for name in self.file.tensors if (m := re.match(r"v\.blk\.(\d{1,6})\.", name))}
        if stored != set(range(len(stored))):
            gap = min(set(range(len(stored))) - stored)
            raise self.error(f"block v.blk.{gap} is missing", hint="The file is incomplete")
        return len(stored)

    def activation(self, profile: Profile) -> Activation:
        """CLIP's QuickGELU unless the file says otherwise."""
        gelu, silu = self.flag("clip.use_gelu"), self.flag("clip.use_silu")
        if gelu and silu:
            raise self.error("clip.use_gelu and clip.use_silu are both true", wanted="at most one")
        return profile.vit_gelu if gelu else "silu" if silu else "gelu_quick"

    def projector_kind(self) -> str:
        """See the function of this name."""
        kind = projector_kind(self.keys, self.file.tensors)
        if not self.text("clip.projector_type", self.text(KEY + "projector_type", "")):
            self.notes.append(f"no projector_type: {kind!r}, from the tensors' names")
        return kind

    def n_embd_llm(self) -> int:
        """The rows of the projector's last matrix."""
        *_, last = ["mm.weight", *projector_matrices(self.file.tensors)]
        return self.shape(last, 2)[0]

    def newline(self) -> str | None:
        """The new name's prefix, or the old one's, or None."""
        return next((word for word in ("v.", "model.") if f"{word}image_newline" in self.file.tensors), None)

    # ---- the picture's treatment

    def pinpoints(self, image_px: int) -> tuple[Size, ...]:
        """image_grid_pinpoints: pairs (width, height), flat or nested. A 0 ends the list, as in llama.cpp."""
        key = KEY + "image_grid_pinpoints"
        values = self.integers(key)
        values = values[: values.index(0)] if 0 in values else values
        if len(values) % 2:
            raise self.error(f"{key} has {len(values)} numbers", wanted="pairs")
        sizes = tuple(Size(height, width) for width, height in zip(values[::2], values[1::2], strict=True))
        for size in sizes:
            whole = min(size) > 0 and size.width % image_px == 0 and size.height % image_px == 0
            if not whole or size.width * size.height > MAX_TILES * image_px**2:
                raise self.error(f"{key} has {size}", wanted=f"{MAX_TILES} tiles of {image_px} at most")
        return sizes

    def aspect(self, pinpoints: tuple[Size, ...]) -> Aspect:
        """Legacy files do not say: with pinpoints they are LLaVA-1.6, "anyres"; without, LLaVA-1.5, "pad"."""
        value = self.text(KEY + "image_aspect_ratio", "anyres" if pinpoints else "pad")
        if value not in get_args(Aspect):
            raise self.error(f"image_aspect_ratio {value!r}", wanted="pad, square or anyres")
        if value == "anyres" and not pinpoints:
            raise self.error("image_aspect_ratio 'anyres' without image_grid_pinpoints")
        return cast(Aspect, value)

    def merge(self) -> Merge:
        value = self.text(KEY + "mm_patch_merge_type", "flat")
        if value not in get_args(Merge):
            raise self.error(f"mm_patch_merge_type {value!r}", wanted="flat, spatial or spatial_unpad")
        if value == "spatial_unpad" and self.newline() is None:
            raise self.error("mm_patch_merge_type 'spatial_unpad' without the tensor image_newline")
        return cast(Merge, value)


# ---- what runs, from names alone


def unsupported(kind: str, names: Collection[str]) -> tuple[str, str] | None:
    """What does not run about an image encoder with tensors of these names, and what is wanted instead.

    ``kind`` is its projector's. None: it runs, unless a tensor is missing or a number is wrong.
    """
    if "v.class_embd" not in names:
        return "a vision tower without v.class_embd (SigLIP?)", "a CLIP tower"
    if any_begins(names, "v.blk.0.attn_qkv."):
        return "fused tensors attn_qkv", "separate attn_q, attn_k and attn_v"
    if kind not in ("", "unknown", *RUNNING_PROJECTORS):  # without a kind, some tensor is missing
        return f"projector {kind!r}", " or ".join(RUNNING_PROJECTORS)
    return None


def projector_kind(metadata: Mapping[str, Any], names: Collection[str]) -> str:
    """The projector's name in llama.cpp, e.g. "mlp"; "" if there is none, "unknown" if nothing names it.

    The tensors have the last word over a key that says "mlp": the 2023 converter writes that into every file,
    and older files have no such key.
    """
    said = str(metadata.get("clip.projector_type") or metadata.get(KEY + "projector_type") or "")
    if said not in ("", *RUNNING_PROJECTORS):
        return said
    seen = find_projector(names)
    return seen.name if seen else "unknown" if any_begins(names, "mm.") else ""


def any_begins(names: Collection[str], *prefixes: str) -> bool:
    """Whether any tensor's name begins with one of ``prefixes``."""
    return any(name.startswith(prefixes) for name in names)
