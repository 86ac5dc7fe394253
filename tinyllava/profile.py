"""The choices in which implementations of LLaVA differ, each as one named value.

The original LLaVA, transformers and llama.cpp run the same weights, and still give different embeddings
and prompts: they pad, resize, tile, merge and approximate differently. Whatever differs is a field here.
The code that computes takes these values as arguments and never asks which profile it is in.

    llava      haotian-liu/LLaVA, as in PyPI's llava-torch 1.2.2.post1: what the models were trained with
    hf         transformers 5.23.0, LlavaForConditionalGeneration and LlavaNextForConditionalGeneration
    llava-cli  llama-llava-cli, as in llama-cpp-python 0.3.7 (llama.cpp's examples/llava)
    mtmd       llama-mtmd-cli, as in llama-cpp-python 0.3.36 (llama.cpp's tools/mtmd)

golden/known_differences.toml says where each value stands in their sources, and what it changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tinyllava.errors import UsageError

Colour = tuple[int, int, int]  # red, green, blue, each 0..255
Exif = Literal["ignore", "rotate"]
OneTile = Literal["by_file", "crop", "pad_then_resize", "resize_then_pad"]
PadPlace = Literal["centre", "top_left"]
Resample = Literal["bicubic", "bilinear_point", "bicubic_point"]
Real = Literal["float64", "float32"]
PinpointOrder = Literal["width_height", "height_width"]
Rounding = Literal["floor", "ceil", "floor_of_7_digits"]  # of a positive number of pixels or patches
MergeRule = Literal["by_file", "spatial", "flat"]
Overview = Literal["first", "last"]
ClassToken = Literal["first", "last"]
Blocks = Literal["stored", "count_less_one", "feature_layer_or_count_less_one"]
Gelu = Literal["gelu_erf", "gelu_tanh"]
Wording = Literal["conversation", "hub", "native", "chat_template"]
SpacePrefix = Literal["each_text", "first_text"]

# Text that means the model has begun to play the user, or to write markup that its tokenizer does not know.
RUNAWAY_TEXTS = ("###", "<|im_end|>", "<|im_start|>", "USER:")


@dataclass(frozen=True)
class Profile:
    """One implementation's answers. The defaults are the original LLaVA's."""

    name: str
    """What --compat and load(compat=) call it."""

    # ---- from a file to pixels

    exif: Exif = "ignore"
    """A camera's rotation mark. "ignore": pixels as they are stored; "rotate": turned as the mark says."""

    one_tile: OneTile = "by_file"
    """LLaVA-1.5, a picture that is not square: what makes it one square tile.

    "pad_then_resize": grown to a square, then resized; "resize_then_pad": resized to fit, then padded;
    "crop": its shorter side resized to the tile's, the middle cut out; "by_file": padded first, or cropped
    where clip.vision.image_aspect_ratio is "square".
    """

    pad_place: PadPlace = "centre"
    """Where the picture lies in LLaVA-1.5's padding; in the centre, an odd pixel goes right or below."""

    pad_colour: Colour | Literal["mean"] = "mean"
    """LLaVA-1.5's padding. "mean": int(255 * mean) of the file's own mean, (122, 116, 104) for CLIP."""

    resample: Resample = "bicubic"
    """LLaVA-1.5's filter. "bicubic" is Pillow's, which averages all pixels that a smaller picture's pixel
    covers; the two "_point" filters look at the 2x2 or 4x4 pixels around a point only (see resample.py)."""

    # ---- LLaVA-1.6: from pixels to tiles, from features to tokens

    pinpoint_order: PinpointOrder = "width_height"
    """How a pair in image_grid_pinpoints is read. Among resolutions that serve equally well the first wins,
    so the order decides between upright and lying grids even where the list holds both."""

    size_precision: Real = "float64"
    """In what the scale of a resize is computed before its sizes are rounded: differs by a pixel at times."""

    small_pictures: Literal["tiled", "overview_only"] = "tiled"
    """A picture that fits into one tile is enlarged and tiled like any other, or is its overview alone."""

    tiles_of_flat_files: Literal["all", "overview_only"] = "all"
    """A file with pinpoints whose mm_patch_merge_type is "flat". "overview_only": square pictures are their
    overview alone, others are treated as in LLaVA-1.5."""

    anyres_resample: Resample = "bicubic"
    """LLaVA-1.6's filter, for the overview and for the tiles."""

    anyres_pad_colour: Colour = (0, 0, 0)
    """LLaVA-1.6's padding around the resized picture."""

    merge: MergeRule = "by_file"
    """How tiles become tokens. "by_file": what clip.vision.mm_patch_merge_type says; "spatial": row after row
    of the whole picture, padding included; "flat": tile after tile."""

    unpad_rounding: Rounding = "floor"
    """The picture's shorter side in patches, when padding is cut away."""

    overview: Overview = "first"
    """The whole picture, stretched to one square tile, comes before or after the tiles."""

    # ---- the vision tower and the projector

    class_token: ClassToken = "first"
    """Where the class embedding stands among the patches. Position embeddings and the rows that go on (all
    but the first) stay in place, so "last" gives each patch its neighbour's position and passes the class
    token on in place of the first patch."""

    blocks: Blocks = "stored"
    """How many blocks run. "stored": all in the file, or those before clip.vision.feature_layer; files hold
    just the blocks that the projector was trained on. The others run one fewer than block_count says."""

    post_norm: Literal["never", "if_stored"] = "never"
    """v.post_ln. LLaVA takes hidden_states[k], which for every k is without CLIP's last norm."""

    vit_gelu: Gelu = "gelu_erf"
    """What clip.use_gelu means. transformers' "gelu" is exact, ggml's is the tanh approximation."""

    projector_gelu: Gelu = "gelu_erf"
    """The activation between the projector's layers."""

    # ---- the conversation

    wording: Wording = "conversation"
    """The text around a question: a table in text/prompt.py."""

    templates: Literal["by_file", "vicuna"] = "by_file"
    """Which of the wording's templates a model gets by default: its own, or Vicuna's whatever the model."""

    space_prefix: SpacePrefix = "each_text"
    """Where SentencePiece puts its space: before each stretch of text, or not after a picture."""

    stop_texts: tuple[str, ...] = RUNAWAY_TEXTS
    """Texts that end an answer, beside the end tokens. The original stops at its template's separator, which
    is an end token; the rest is here so that a model that runs on does not answer itself."""

    # ---- default sampling, as far as nobody says otherwise (text/sampling.py)

    temperature: float = 0.2
    """0 is greedy: always the most probable token."""

    top_k: int = 50
    """The most probable tokens that are drawn from; 0: all. The original's cli.py sets none: 50 is what
    transformers' generate() draws from then."""

    top_p: float = 1.0
    """The probability that the tokens drawn from have together; 1: all."""

    min_p: float = 0.0
    """The share of the best token's probability that others must reach; 0: none."""

    max_tokens: int = 512
    """Default limit of an answer's length in tokens; -1: all that the context has room for."""


LLAVA = Profile("llava")

PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        LLAVA,
        Profile(
            "hf",
            exif="rotate",
            one_tile="crop",
            pinpoint_order="height_width",
            unpad_rounding="floor_of_7_digits",
            wording="hub",
            space_prefix="first_text",
            stop_texts=(),
            temperature=0.0,
            max_tokens=20,
        ),
        Profile(
            "llava-cli",
            one_tile="pad_then_resize",
            pad_place="top_left",
            pad_colour=(122, 116, 104),
            resample="bilinear_point",
            size_precision="float32",
            tiles_of_flat_files="overview_only",
            anyres_resample="bicubic_point",
            merge="spatial",
            blocks="count_less_one",
            post_norm="if_stored",
            vit_gelu="gelu_tanh",
            projector_gelu="gelu_tanh",
            wording="native",
            templates="vicuna",
            temperature=0.8,
            top_k=40,
            top_p=0.95,
            min_p=0.05,
            max_tokens=256,
        ),
        Profile(
            "mtmd",
            one_tile="resize_then_pad",
            pad_colour=(122, 116, 104),
            size_precision="float32",
            small_pictures="overview_only",
            merge="flat",
            overview="last",
            class_token="last",
            blocks="feature_layer_or_count_less_one",
            post_norm="if_stored",
            vit_gelu="gelu_tanh",
            projector_gelu="gelu_tanh",
            wording="chat_template",
            stop_texts=("ASSISTANT:",),
            top_k=40,
            top_p=0.95,
            min_p=0.05,
            max_tokens=-1,
        ),
    )
}


def profile(name: str = "llava") -> Profile:
    """The profile called ``name``. UsageError names those that exist."""
    try:
        return PROFILES[name]
    except KeyError:
        raise UsageError("profile", repr(name), wanted=" or ".join(PROFILES)) from None
