"""What the original LLaVA computes: its own classes and functions, our weights, our pictures, float32."""

import tempfile
from typing import Any

import numpy as np
import torch
from llava.mm_utils import process_images, select_best_resolution
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.llava_arch import unpad_image
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from golden.clip_models import VISION, ClipSpec, hf_clip_config
from golden.manifest import record, save_arrays, versions
from golden.models import LANGUAGE, hf_config, hf_state_dict, original_clip
from golden.pictures import picture

IMAGE = -200  # the original's IMAGE_TOKEN_INDEX
SIZES_15 = [(56, 56), (100, 60), (60, 100), (2, 1), (3, 200), (640, 480), (57, 333), (112, 112)]
SIZES_16 = [(56, 56), (100, 60), (40, 30), (112, 112), (113, 57), (300, 20), (20, 300), (200, 150), (333, 77)]
COLUMN_STEP = 8  # every 8th number of an embedding is stored: the projector mixes all of them anyway
PIXELS = {"clip_15.pad": [(100, 60), (57, 333)], "clip_15.crop": [(100, 60)], "clip_16.anyres": [(40, 30)]}

# golden name -> (vision spec, image_aspect_ratio, sizes)
CASES: dict[str, tuple[str, str, list[tuple[int, int]]]] = {
    "clip_15.pad": ("clip_15", "pad", SIZES_15),
    "clip_15.crop": ("clip_15", "square", [(56, 56), (100, 60), (57, 333), (640, 480)]),
    "clip_16.anyres": ("clip_16", "anyres", SIZES_16),
    "clip_16_flat.anyres": ("clip_16_flat", "anyres", SIZES_16[1:4]),
    "clip_gelu.pad": ("clip_gelu", "pad", [(100, 60)]),
    "clip_silu.pad": ("clip_silu", "pad", [(100, 60)]),
    "clip_linear.pad": ("clip_linear", "pad", [(100, 60)]),
}

PINPOINTS_336 = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # LLaVA-1.6's own
PATCHES_PER_TILE_SIDE = 24


def save_tower(folder: str, spec: ClipSpec) -> None:
    """Write the vision tower where the original's loader expects one: config, weights, preprocessing."""
    config = CLIPVisionConfig(**hf_clip_config(spec))
    tower = CLIPVisionModel(config)
    state = {name: torch.from_numpy(values) for name, values in hf_state_dict(spec).items()}
    print(spec.name, tower.load_state_dict(state, strict=False))
    tower.save_pretrained(folder)
    side = spec.image_size
    crop = {"height": side, "width": side}
    CLIPImageProcessor(size={"shortest_edge": side}, crop_size=crop).save_pretrained(folder)


def original_model(folder: str, spec: ClipSpec, aspect_ratio: str) -> LlavaLlamaForCausalLM:
    """A whole LLaVA; its language model is golden "vicuna" where the widths agree, "mistral" elsewhere."""
    language = LANGUAGE["vicuna" if spec.n_llm == LANGUAGE["vicuna"].n_embd else "mistral"]
    save_tower(folder, spec)
    config = hf_config(language)
    for key in ("model_type", "architectures", "head_dim"):
        del config[key]
    config |= {
        "mm_vision_tower": folder,
        "mm_hidden_size": spec.n_embd,
        "mm_projector_type": "linear" if spec.projector == "linear" else "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": spec.merge_type or "flat",
        "image_aspect_ratio": aspect_ratio,
        "image_grid_pinpoints": [list(pinpoint) for pinpoint in spec.pinpoints],
    }
    model = LlavaLlamaForCausalLM(LlavaConfig(**config))
    model.get_vision_tower().load_model()
    weights = hf_state_dict(language) | original_clip(spec)
    state = {name: torch.from_numpy(values) for name, values in weights.items()}
    result = model.load_state_dict(state, strict=False)
    missing = [name for name in result.missing_keys if not name.endswith("position_ids")]
    if missing or result.unexpected_keys:
        raise SystemExit(f"{spec.name}: missing {missing}, unexpected {result.unexpected_keys}")
    return model.eval().float()


def embed(model: LlavaLlamaForCausalLM, size: tuple[int, int], ids: list[int]) -> tuple[Any, Any]:
    """(pixels, input embeddings) for a picture of `size` (width, height) at IMAGE in a prompt of `ids`."""
    image = Image.fromarray(picture(*size))
    pixels = process_images([image], model.get_vision_tower().image_processor, model.config)
    with torch.no_grad():
        embeddings = model.prepare_inputs_labels_for_multimodal(
            torch.tensor([ids]), None, None, None, None, pixels, image_sizes=[size]
        )[4]
    return pixels[0], embeddings


def make_images() -> None:
    """original-images.npz: <case>.<width>x<height>, and .pixels of some; columns 0, 8, 16, ... are stored"""
    arrays = {}
    for case, (name, aspect_ratio, sizes) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            model = original_model(folder, VISION[name], aspect_ratio)
            for width, height in sizes:
                pixels, embeddings = embed(model, (width, height), [5, IMAGE, 6])
                image = embeddings[0, 1:-1].numpy()  # (n_image_tokens, n_llm)
                arrays[f"{case}.{width}x{height}"] = np.ascontiguousarray(image[:, ::COLUMN_STEP])
                if (width, height) in PIXELS.get(case, []):
                    arrays[f"{case}.{width}x{height}.pixels"] = pixels.numpy()
    path = save_arrays("original-images.npz", arrays)
    tolerance = "1e-4 of the largest magnitude: float32 sums in another order; pixels 1e-6"
    record(path, "original-images", original_versions(), tolerance)


def make_answers() -> None:
    """original-answers.npz: logits at the last position, and 12 greedy tokens, of whole LLaVAs"""
    arrays: dict[str, Any] = {}
    ids = [1, 300, 290, IMAGE, 310, 320, 305, 288]
    for case in ("clip_15.pad", "clip_16.anyres"):
        name, aspect_ratio, _ = CASES[case]
        with tempfile.TemporaryDirectory() as folder:
            model = original_model(folder, VISION[name], aspect_ratio)
            for width, height in [(100, 60), (57, 333)]:
                _, embeddings = embed(model, (width, height), ids)
                logits, chosen = greedy(model, embeddings, n_tokens=12)
                arrays[f"{case}.{width}x{height}.logits"] = logits
                arrays[f"{case}.{width}x{height}.greedy"] = np.array(chosen, np.int32)
    arrays["ids"] = np.array(ids, np.int32)
    path = save_arrays("original-answers.npz", arrays)
    tolerance = "1e-3 absolute on logits; greedy tokens equal (the two best are far apart at each)"
    record(path, "original-answers", original_versions(), tolerance)


def greedy(model: LlavaLlamaForCausalLM, embeddings: Any, n_tokens: int) -> tuple[Any, list[int]]:
    """Logits after the prompt, and the most likely continuation; the whole sequence anew for each token."""
    first, chosen = None, []
    for _ in range(n_tokens):
        with torch.no_grad():
            logits = model(inputs_embeds=embeddings, use_cache=False).logits[0, -1]
        first = logits.numpy() if first is None else first
        best = torch.topk(logits, 2)
        if best.values[0] - best.values[1] < 0.01:
            raise SystemExit("two tokens are too close to tell apart: take another prompt")
        chosen.append(int(best.indices[0]))
        token = model.get_model().embed_tokens(best.indices[:1])  # (1, n_llm)
        embeddings = torch.cat([embeddings, token[None]], dim=1)
    return first, chosen


def grid_sizes() -> np.ndarray[Any, Any]:
    """(width, height) of 3,000 pictures: small ones, where ties are, around tile borders, and any."""
    random = np.random.RandomState(7)  # frozen by NEP 19
    small = random.randint(1, 337, (800, 2))
    borders = np.array([336, 504, 672, 1008])[random.randint(0, 4, (700, 2))]
    borders = borders + random.randint(-2, 3, (700, 2))
    thin = np.stack([random.randint(1, 30, 300), random.randint(1, 4000, 300)], axis=1)
    thin[::2] = thin[::2, ::-1]
    wide = random.randint(20, 4001, (1200, 2))
    return np.concatenate([small, borders, thin, wide])


def make_grid() -> None:
    """anyres-grid.npz: per picture size (width, height): the grid chosen, and the tokens after merging"""
    sizes = grid_sizes()
    grids, counts = [], []
    for width, height in sizes.tolist():
        grid_width, grid_height = select_best_resolution((width, height), PINPOINTS_336)
        side = PATCHES_PER_TILE_SIDE
        features = torch.empty(1, grid_height // 336 * side, grid_width // 336 * side)
        _, rows, columns = unpad_image(features, (width, height)).shape
        grids.append((grid_width, grid_height))
        counts.append(side * side + rows * (columns + 1))  # overview; a newline ends each row
    arrays = {"size": sizes.astype(np.int16), "grid": np.array(grids, np.int16)}
    arrays["n_tokens"] = np.array(counts, np.int16)
    path = save_arrays("anyres-grid.npz", arrays)
    record(path, "anyres-grid", original_versions(), "exact: integers", pinpoints=PINPOINTS_336)


def original_versions() -> dict[str, str]:
    """The versions that decide these numbers."""
    return versions("llava-torch", "transformers", "torch", "numpy", "pillow")
