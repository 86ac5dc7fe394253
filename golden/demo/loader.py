"""Read the exported GGUF pair back into the PyTorch model, and a picture as the original LLaVA reads it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from compose import CLIP_MEAN, CLIP_STD, IMAGE_PX
from export import VISION_PARTS
from gguf import GGUFReader
from gguf.quants import dequantize
from model import Config, TinyLlava
from PIL import Image
from torch import Tensor

PAD = (122, 116, 104)


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a GGUF file as float32, in NumPy's axis order."""
    return {
        t.name: dequantize(t.data, t.tensor_type).reshape(tuple(int(n) for n in t.shape[::-1])).astype(np.float32)
        for t in GGUFReader(path).tensors
    }


def load_pair(folder: Path) -> TinyLlava:
    """The exported model, evaluation mode, float32."""
    tensors = read_tensors(folder / "demo-mmproj.gguf") | read_tensors(folder / "demo-model.gguf")
    back = {theirs: ours for ours, theirs in VISION_PARTS.items()}
    state = {}
    for name, array in tensors.items():
        parts = name.split(".")
        if parts[0] == "v" and parts[1] == "blk":
            name = f"vision.blk.{parts[2]}.{back[parts[3]]}.{parts[4]}"
        elif parts[0] == "v":
            name = f"vision.{parts[1]}.{parts[2]}" if parts[1] == "pre_ln" else f"vision.{parts[1]}"
        elif parts[0] == "mm":
            name = f"mm_{parts[1]}.{parts[2]}"
        state[name] = torch.from_numpy(array.reshape(len(array), -1) if name == "vision.patch_embd" else array)
    model = TinyLlava(Config(), 1)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or any(not name.startswith("patch_head") for name in missing):
        raise SystemExit(f"missing {missing}, unexpected {unexpected}")
    return model.eval()


def square(image: Image.Image) -> Image.Image:
    """LLaVA's expand2square: centred on a square of the mean colour."""
    side = max(image.size)
    result = Image.new("RGB", (side, side), PAD)
    result.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return result


def network_input(image: Image.Image) -> Tensor:
    """(3, 168, 168): padded, resized with PIL's bicubic filter, normalised."""
    small = square(image.convert("RGB")).resize((IMAGE_PX, IMAGE_PX), Image.Resampling.BICUBIC)
    pixels = np.asarray(small, np.float32).transpose(2, 0, 1) / 255
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    return torch.from_numpy((pixels - mean) / std)
