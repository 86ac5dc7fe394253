"""The image embeddings of today's llama.cpp (libmtmd): not what LLaVA was trained with, see the README."""

import ctypes
import tempfile
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import mtmd_cpp

from golden.clip_models import VISION, ClipSpec, write_mmproj
from golden.manifest import record, save_arrays, versions
from golden.models import LANGUAGE, write_language_model
from golden.pictures import picture

COLUMN_STEP = 8  # as in original-images.npz
SIZES = {
    "clip_15": [(56, 56), (100, 60), (60, 100), (57, 333), (640, 480)],
    "clip_16": [(56, 56), (40, 30), (100, 60), (113, 57), (333, 77)],
    "clip_gelu": [(56, 56)],
    "clip_silu": [(56, 56)],
}


class Mtmd:
    """A language model's vocabulary and a vision file, opened by libmtmd; no flash attention."""

    def __init__(self, folder: str, spec: ClipSpec, dtype: str = "F32") -> None:
        language = LANGUAGE["vicuna" if spec.n_llm == LANGUAGE["vicuna"].n_embd else "mistral"]
        model_path, vision_path = Path(folder) / "language.gguf", Path(folder) / "mmproj.gguf"
        write_language_model(model_path, language)
        write_mmproj(vision_path, spec, dtype)
        self.n_llm = spec.n_llm
        model_params = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(model_path).encode(), model_params)
        params = mtmd_cpp.mtmd_context_params_default()
        params.use_gpu = params.print_timings = params.warmup = False
        params.n_threads = 2
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = mtmd_cpp.mtmd_init_from_file(str(vision_path).encode(), self.model, params)
        if not self.context:
            raise SystemExit(f"{spec.name}: libmtmd does not load it")

    def chunks_of(self, rgb: np.ndarray[Any, Any]) -> Any:
        """A prompt that is nothing but a picture, cut by libmtmd into pieces of text and picture."""
        rgb = np.ascontiguousarray(rgb)
        data = rgb.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        bitmap = mtmd_cpp.mtmd_bitmap_init(rgb.shape[1], rgb.shape[0], data)
        chunks = mtmd_cpp.mtmd_input_chunks_init()
        marker = mtmd_cpp.mtmd_default_marker()
        text = mtmd_cpp.mtmd_input_text(marker, len(marker), False, True)
        bitmaps = (mtmd_cpp.mtmd_bitmap_p_ctypes * 1)(bitmap)
        status = mtmd_cpp.mtmd_tokenize(self.context, chunks, ctypes.byref(text), bitmaps, 1)
        mtmd_cpp.mtmd_bitmap_free(bitmap)
        if status != 0:
            raise SystemExit(f"mtmd_tokenize: status {status}")
        return chunks

    def embed(self, size: tuple[int, int]) -> np.ndarray[Any, Any]:
        """The embeddings that take the place of golden picture `size`, (n_image_tokens, n_llm)."""
        return self.embed_chunks(self.chunks_of(picture(*size)))

    def embed_chunks(self, chunks: Any) -> np.ndarray[Any, Any]:
        """The embeddings of all pictures among `chunks`, which are freed."""
        parts = []
        for i in range(mtmd_cpp.mtmd_input_chunks_size(chunks)):
            chunk = mtmd_cpp.mtmd_input_chunks_get(chunks, i)
            if mtmd_cpp.mtmd_input_chunk_get_type(chunk) != mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_IMAGE:
                continue
            if mtmd_cpp.mtmd_encode_chunk(self.context, chunk) != 0:
                raise SystemExit("mtmd_encode_chunk failed")
            shape = (mtmd_cpp.mtmd_input_chunk_get_n_tokens(chunk), self.n_llm)
            parts.append(np.ctypeslib.as_array(mtmd_cpp.mtmd_get_output_embd(self.context), shape).copy())
        mtmd_cpp.mtmd_input_chunks_free(chunks)
        return np.concatenate(parts)

    def close(self) -> None:
        """Free the C side."""
        mtmd_cpp.mtmd_free(self.context)
        llama_cpp.llama_model_free(self.model)


def make_images() -> None:
    """llama-cpp-images.npz: <spec>.<width>x<height>, columns 0, 8, 16, ..."""
    arrays = {}
    for name, sizes in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            mtmd = Mtmd(folder, VISION[name])
            for width, height in sizes:
                arrays[f"{name}.{width}x{height}"] = mtmd.embed((width, height))[:, ::COLUMN_STEP].copy()
            mtmd.close()
    path = save_arrays("llama-cpp-images.npz", arrays)
    tolerance = "2e-3 of the 2-norm: patches and the activation's table are rounded to F16"
    record(path, "llama-cpp-images", versions("llama-cpp-python", "gguf", "numpy"), tolerance)
