"""The image embeddings of transformers' own LLaVA classes, which differ from the original's in places."""

from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from golden.clip_models import VISION, ClipSpec, hf_clip_config
from golden.makers.hf import load
from golden.manifest import record, save_arrays, versions
from golden.models import LANGUAGE, hf_config, hf_state_dict, original_clip
from golden.pictures import picture

COLUMN_STEP = 8  # as in original-images.npz
SIZES_15 = [(56, 56), (100, 60), (60, 100), (57, 333), (640, 480)]
SIZES_16 = [(56, 56), (40, 30), (100, 60), (112, 112), (113, 57), (200, 150), (333, 77)]

PROJECTOR = {"model.mm_projector.0": "linear_1", "model.mm_projector.2": "linear_2"}


def state_dict(spec: ClipSpec) -> dict[str, Any]:
    """A whole LLaVA by the names of transformers 5."""
    state = {}
    for name, values in original_clip(spec).items():
        if name.startswith("model.mm_projector"):
            layer, ending = name.rsplit(".", 1)
            name = f"model.multi_modal_projector.{PROJECTOR[layer]}.{ending}"
        state[name.replace("vision_tower.vision_tower.vision_model.", "vision_tower.")] = values
    for name, values in hf_state_dict(LANGUAGE["vicuna"]).items():
        state[name.replace("model.", "model.language_model.", 1)] = values
    return state


def pinpoints(spec: ClipSpec) -> list[list[int]]:
    """The original's list as it stands. transformers reads each pair as (height, width), where the original
    reads (width, height); so do the published checkpoints, and ties between grids end differently.
    """
    return [list(pair) for pair in spec.pinpoints]


def llava(spec: ClipSpec) -> Any:
    """LlavaForConditionalGeneration, or LlavaNext's where the spec has pinpoints."""
    vision = transformers.CLIPVisionConfig(**hf_clip_config(spec))
    text_config = hf_config(LANGUAGE["vicuna"])
    del text_config["architectures"], text_config["model_type"]
    text = transformers.LlamaConfig(**text_config)
    kind, more = "Llava", {}
    if spec.pinpoints:
        kind, more = "LlavaNext", {"image_grid_pinpoints": pinpoints(spec)}
    config = getattr(transformers, kind + "Config")(
        vision_config=vision,
        text_config=text,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        attn_implementation="eager",
        **more,
    )
    model = getattr(transformers, kind + "ForConditionalGeneration")(config)
    return load(model, state_dict(spec))


def processors(side: int) -> dict[str, Any]:
    """golden name -> image processor, on Pillow; "pad" is what the documentation tells to set."""
    grids = pinpoints(VISION["clip_16"])
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    return {
        "clip_15.default": LlavaImageProcessorPil(**size),
        "clip_15.pad": LlavaImageProcessorPil(**size, do_pad=True),
        "clip_16.default": LlavaNextImageProcessorPil(**size, image_grid_pinpoints=grids),
    }


def make_images() -> None:
    """hf-images.npz: <spec>.<default|pad>.<width>x<height>, columns 0, 8, 16, ..."""
    arrays = {}
    models = {name: llava(VISION[name]) for name in ("clip_15", "clip_16")}
    for case, processor in processors(VISION["clip_15"].image_size).items():
        model = models[case.split(".")[0]]
        for width, height in SIZES_16 if "16" in case else SIZES_15:
            batch = processor(Image.fromarray(picture(width, height)), return_tensors="pt")
            with torch.no_grad():
                features = model.get_image_features(**batch).pooler_output[0]
            arrays[f"{case}.{width}x{height}"] = np.ascontiguousarray(features.numpy()[:, ::COLUMN_STEP])
    path = save_arrays("hf-images.npz", arrays)
    tolerance = "1e-4 of the largest magnitude: float32 sums in another order"
    record(path, "hf-images", versions("torch", "transformers", "pillow", "numpy"), tolerance)
