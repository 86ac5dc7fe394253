"""Activations as people get them out of transformers and llama.cpp, to be read by `tinyllava compare`."""

import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from golden.clip_models import VISION, write_mmproj
from golden.manifest import record, save_arrays, versions
from golden.models import LANGUAGE, write_language_model
from golden.pictures import picture

SIZE = (56, 56)  # one tile of clip_15: nothing to resize or to pad
SIZE_16 = (56, 100)  # two tiles of clip_16 and the overview
IMAGE_ID = 511
PROMPT = "hello world\n"
PROMPT_IDS = [1, *[IMAGE_ID] * 16, 259, 300, 333]  # "<image>Hi" by the vocabulary of the golden models
COMMON = ["-t", "1", "-n", "1", "-fa", "off"]


def make_hf() -> None:
    """hf-dump.npz: what golden/dump_transformers.py sees of LLaVA-1.5; inner modules of blocks 0 only."""
    import torch
    from PIL import Image

    from golden.dump_transformers import watch
    from golden.makers.hf_llava import llava, processors

    spec = VISION["clip_15"]
    model = llava(spec)
    model.config.image_token_id = IMAGE_ID
    batch = processors(spec.image_size)["clip_15.pad"](Image.fromarray(picture(*SIZE)), return_tensors="pt")
    ids = torch.tensor([PROMPT_IDS])
    seen = watch(model)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), **batch)
    arrays = {"pixel_values": batch["pixel_values"].numpy()}
    arrays |= {name: values for name, values in seen.items() if is_stored(name)}
    path = save_arrays("hf-dump.npz", arrays)
    tolerance = "1e-5 of the 2-norm: float32 sums in another order"
    record(path, "hf-dump", versions("torch", "transformers", "pillow", "numpy"), tolerance)


def make_original() -> None:
    """original-dump.npz: what golden/dump_transformers.py sees of the original LLaVA-1.6, as far as it differs
    from transformers: tower and projector on three tiles, and what leaves each block of the language model."""
    import torch

    from golden.dump_transformers import watch
    from golden.makers.original import IMAGE, embed, original_model, original_versions

    with tempfile.TemporaryDirectory() as folder:
        model = original_model(folder, VISION["clip_16"], "anyres")
    seen = watch(model)
    pixels, embeddings = embed(model, SIZE_16, [1, IMAGE, 259, 300, 333])
    with torch.no_grad():
        model(inputs_embeds=embeddings, use_cache=False)
    arrays = {"pixel_values": pixels.numpy()}
    arrays |= {k: v for k, v in seen.items() if is_stored(k, "layers.4") and not k.startswith("model.layers.0.")}
    path = save_arrays("original-dump.npz", arrays)
    record(path, "original-dump", original_versions(), "1e-5 of the 2-norm: float32 sums in another order")


def is_stored(name: str, unused: str = "layers.3") -> bool:
    """All but the inner modules of later blocks, the block that leads nowhere, and the whole model's output."""
    inner = any(f"layers.{i}{mark}" in name for i in (1, 2, 3) for mark in ".<")
    return bool(name) and not inner and unused not in name and not name.endswith(("rotary_emb", "post_layernorm"))


def make_llama_cpp(tools: str) -> None:
    """llama-cpp-dumps.npz: bytes of logs and of a raw file. `tools`: folder of llama.cpp's programs.

    llama-eval-callback may end before its log is written, so it is run until the log is whole.
    """
    files: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for spec in ("llama_bias", "qwen2"):
            write_language_model(folder / "model.gguf", LANGUAGE[spec])
            files[f"{spec}.txt"] = eval_callback(Path(tools), folder)
        files |= mtmd(Path(tools), folder, "clip_15", SIZE) | mtmd(Path(tools), folder, "clip_16", SIZE_16)
    path = save_arrays("llama-cpp-dumps.npz", {key: np.frombuffer(data, np.uint8) for key, data in files.items()})
    tolerance = "5e-5 absolute, as printed; mtmd's 1e-3 of the 2-norm: patches and GELU are rounded to F16"
    record(path, "llama-cpp-dumps", versions("llama-cpp-python", "numpy"), tolerance)


def eval_callback(tools: Path, folder: Path) -> bytes:
    """The printed graph of one prompt."""
    command = [tools / "llama-eval-callback", "-m", folder / "model.gguf", "-p", PROMPT, *COMMON]
    for _ in range(100):
        log = run([*command, "-ctk", "f32", "-ctv", "f32"])
        if b" result_output = " in log and log.count(b"sum = ") == log.count(b"common_debug_cb_eval:"):
            return log
    raise SystemExit("llama-eval-callback never wrote its whole log")


def mtmd(tools: Path, folder: Path, spec: str, size: tuple[int, int]) -> dict[str, bytes]:
    """The printed graph of the vision tower, and the embeddings: of tiles, those computed last."""
    from PIL import Image

    write_language_model(folder / "model.gguf", LANGUAGE["vicuna"])
    write_mmproj(folder / "mmproj.gguf", VISION[spec])
    Image.fromarray(picture(*size)).save(folder / "picture.png")
    pair = ["-m", folder / "model.gguf", "--mmproj", folder / "mmproj.gguf", "--image", folder / "picture.png"]
    more = ["-p", "Hi", "--chat-template", "vicuna", "--no-warmup", *COMMON]
    debug = {"MTMD_DEBUG_GRAPH": "1", "MTMD_DEBUG_EMBEDDINGS": str(folder / "embeddings")}
    log = run([tools / "llama-mtmd-cli", *pair, *more], debug)
    return {f"{spec}.txt": log, f"{spec}.embeddings": (folder / "embeddings").read_bytes()}


def run(command: list[Any], more: dict[str, str] | None = None) -> bytes:
    """A program's stdout."""
    environment = {**os.environ, **(more or {})}
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, check=True).stdout
