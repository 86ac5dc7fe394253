"""What transformers makes of the small checkpoints in its own layout: answers, and names when it saves them."""

import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors import safe_open
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from golden.checkpoints import CHECKPOINTS, CheckpointSpec, write_checkpoint
from golden.manifest import record, save_json, versions
from golden.pictures import picture

IMAGE = 512  # the id of <image>
BEFORE, AFTER = [1, 300, 290], [310, 320, 305, 288]  # token ids around the picture
N_TOKENS = 8
# Width and height for which no resizing and no choice between grids comes in: one tile, and 2x2 tiles.
SIZE = {"hf-llava": (28, 28), "hf-llava-new": (28, 28), "hf-next": (56, 56), "hf-next-new": (56, 56)}


def inputs(spec: CheckpointSpec, model: Any) -> dict[str, Any]:
    """Pixels, and the prompt's ids with <image> as often as the picture has tokens."""
    side = spec.vision.image_size
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    grids = [list(pair) for pair in spec.vision.pinpoints]
    if grids:
        processor = LlavaNextImageProcessorPil(**size, image_grid_pinpoints=grids)
    else:
        processor = LlavaImageProcessorPil(**size)
    batch = dict(processor(Image.fromarray(picture(*SIZE[spec.name])), return_tensors="pt"))
    with torch.no_grad():
        n_image_tokens = len(model.get_image_features(**batch).pooler_output[0])
    ids = torch.tensor([[*BEFORE, *[IMAGE] * n_image_tokens, *AFTER]])
    return batch | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def answer(spec: CheckpointSpec, model: Any) -> dict[str, Any]:
    """Logits after the prompt, and greedy tokens, the whole sequence anew for each."""
    batch, logits, tokens = inputs(spec, model), None, []
    for _ in range(N_TOKENS):
        with torch.no_grad():
            last = model(**batch, use_cache=False).logits[0, -1]
        best = torch.topk(last, 2)
        if best.values[0] - best.values[1] < 0.02:
            raise SystemExit(f"{spec.name}: two tokens are too close to tell apart: take another prompt")
        logits = last if logits is None else logits
        tokens.append(int(best.indices[0]))
        batch["input_ids"] = torch.cat([batch["input_ids"], best.indices[None, :1]], dim=1)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return {"logits": [round(float(x), 5) for x in logits], "greedy": tokens}


def saved_arrays(model: Any) -> dict[str, Any]:
    """name -> [shape, crc32] of what save_pretrained writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with safe_open(Path(folder) / "model.safetensors", "pt") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}
    return {
        name: [list(a.shape), zlib.crc32(np.ascontiguousarray(a.view(torch.int16).numpy()))]
        for name, a in arrays.items()
    }


def make() -> None:
    """hf-convert.json.gz: checkpoint -> "logits" and "greedy" in float32, "saved": name -> [shape, crc32]"""
    made = {}
    for name in SIZE:
        spec = CHECKPOINTS[name]
        kind = "LlavaNextForConditionalGeneration" if spec.vision.pinpoints else "LlavaForConditionalGeneration"
        load = getattr(transformers, kind).from_pretrained
        with tempfile.TemporaryDirectory() as temporary:
            folder = write_checkpoint(Path(temporary) / name, spec)
            exact, info = load(folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
            if info["missing_keys"] or info["unexpected_keys"]:
                raise SystemExit(f"{name}: {info}")
            made[name] = answer(spec, exact.eval()) | {"saved": saved_arrays(load(folder))}
        print(name, made[name]["greedy"])
    path = save_json("hf-convert.json.gz", made)
    tolerance = "1e-3 of the logits' range: float32 sums in another order; bf16 projectors are stored as f16"
    record(path, "hf-convert", versions("torch", "transformers", "safetensors", "numpy"), tolerance)
