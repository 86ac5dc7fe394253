"""The choices in which implementations of LLaVA differ, each as one named value.

The original LLaVA, transformers and llama.cpp run the same weights, and still give different embeddings
and prompts: they pad, resize, tile, merge and approximate differently. Whatever differs is a field here.
The code that computes takes these values as arguments and never asks which profile it is in.

A Literal with one member is a choice of which one alternative exists in tinyllava so far.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tinyllava.errors import UsageError

Rounding = Literal["floor", "ceil"]  # of a positive number of pixels or patches
Resample = Literal["bicubic"]  # a filter of Pillow's: antialiased, rounded to 8 bits after each pass
Colour = tuple[int, int, int]  # red, green, blue, each 0..255
Gelu = Literal["gelu_erf", "gelu_tanh"]


@dataclass(frozen=True)
class Profile:
    """One implementation's answers. Every field is read somewhere, or names the one way that exists."""

    name: str
    """What --compat and load(compat=) call it."""

    # ---- from a file to pixels

    exif: Literal["ignore"] = "ignore"
    """A camera's rotation mark. "ignore": pixels as stored (PIL's convert("RGB"), as llava/serve/cli.py)."""

    square_order: Literal["pad_then_resize"] = "pad_then_resize"
    """LLaVA-1.5, a picture that is not square: grow it to a square first, then shrink that to one tile."""

    pad_place: Literal["centre"] = "centre"
    """Where the picture lies in its padding; an odd pixel goes right or below (expand2square)."""

    pad_colour: Colour | Literal["mean"] = "mean"
    """LLaVA-1.5's padding. "mean": int(255 * mean) of the file's own mean, (122, 116, 104) for CLIP."""

    anyres_pad_colour: Colour = (0, 0, 0)
    """LLaVA-1.6's padding around the resized picture (resize_and_pad_image)."""

    resample: Resample = "bicubic"
    """The filter of every resize."""

    # ---- LLaVA-1.6: from pixels to tiles, from features to tokens

    grid_rule: Literal["width_height"] = "width_height"
    """Among resolutions that serve equally well the file's first wins; pinpoints are (width, height)."""

    small_pictures: Literal["tiled"] = "tiled"
    """A picture that fits into one tile is enlarged and tiled like any other."""

    fit_rounding: Rounding = "ceil"
    """The resized picture's shorter side inside its resolution (resize_and_pad_image)."""

    overview: Literal["first"] = "first"
    """The whole picture, stretched to one square tile, comes before the tiles."""

    merge: Literal["by_file"] = "by_file"
    """How tiles become tokens: what clip.vision.mm_patch_merge_type says ("flat" when it says nothing)."""

    unpad_rounding: Rounding = "floor"
    """The picture's shorter side in patches, when padding is cut away (unpad_image)."""

    newline: Literal["row"] = "row"
    """image_newline stands at the end of each row of the merged map, and not after the overview."""

    # ---- the vision tower and the projector

    class_token: Literal["first"] = "first"
    """The class embedding takes position 0, patches the positions after it."""

    blocks: Literal["stored"] = "stored"
    """How many blocks run: all that the file stores, unless clip.vision.feature_layer says otherwise.

    Files hold just the blocks that the projector was trained on. llama.cpp runs one fewer of them.
    """

    post_norm: Literal["never"] = "never"
    """v.post_ln, if stored. LLaVA takes hidden_states[k], which for every k is without CLIP's last norm."""

    vit_gelu: Gelu = "gelu_erf"
    """What clip.use_gelu means: hidden_act "gelu" of transformers, which is exact. ggml: the tanh form."""

    projector_gelu: Gelu = "gelu_erf"
    """torch.nn.GELU() between the projector's layers (multimodal_projector/builder.py). ggml: tanh."""

    # ---- the conversation

    prompt: Literal["conversation"] = "conversation"
    """The text around a question: the original's conversation templates with the picture on its own line."""

    bos: Literal["once"] = "once"
    """The beginning-of-sequence token: once, before everything (tokenizer_image_token)."""

    stop: Literal["template"] = "template"
    """What ends an answer beside the end tokens: the template's separator (KeywordsStoppingCriteria)."""

    temperature: float = 0.2
    """Default sampling temperature (llava/serve/cli.py)."""

    max_tokens: int = 512
    """Default limit of an answer's length in tokens (llava/serve/cli.py, max_new_tokens)."""


PROFILES: dict[str, Profile] = {"llava": Profile("llava")}


def profile(name: str = "llava") -> Profile:
    """The profile called ``name``. UsageError names those that exist."""
    try:
        return PROFILES[name]
    except KeyError:
        raise UsageError("profile", repr(name), wanted=" or ".join(PROFILES)) from None
