"""What llama.cpp's quantizer does, through the C functions that llama-quantize calls."""

import ctypes
import tempfile
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from llama_cpp._ctypes_extensions import load_shared_library

from golden.manifest import record, save_json, versions
from golden.mixture_models import SKELETONS, Skeleton
from golden.quantize_samples import BLOCKS, SAMPLES

# llama-quantize's name -> its number (enum llama_ftype in llama.h)
FILE_TYPES = {
    "F32": 0, "F16": 1, "BF16": 32, "Q4_0": 2, "Q4_1": 3, "Q5_0": 8, "Q5_1": 9, "Q8_0": 7,
    "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12, "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15,
    "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30,
}  # fmt: skip

# These ask for the number of heads, and on an image encoder, which has none in llama.cpp, they abort.
NEED_HEADS = ("Q2_K", "IQ4_NL", "IQ4_XS")


def quantize_file(source: Path, target: Path, name: str, threads: int = 2) -> None:
    """llama-quantize SOURCE TARGET NAME"""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.allow_requantize = FILE_TYPES[name], threads, True
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)) != 0:
        raise SystemExit(f"llama.cpp cannot quantize {source} to {name}")


def quantize_rows(type_name: str, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """ggml_quantize_chunk without an importance matrix: x (n_rows, n_cols) -> bytes (n_rows, row_bytes)."""
    kind = gguf.GGMLQuantizationType[type_name]
    size, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    out = np.zeros((x.shape[0], x.shape[1] // size * n_bytes), np.uint8)
    folder = Path(llama_cpp.__file__).parent / "lib"
    chunk = load_shared_library("ggml-base", folder).ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    chunk(int(kind), x.ctypes.data, out.ctypes.data, 0, *x.shape, None)
    return out


def write_skeleton(path: Path, skeleton: Skeleton) -> None:
    """The model as a file of zeros: vectors F32, the rest F16."""
    writer = gguf.GGUFWriter(path, str(skeleton.metadata["general.architecture"]))
    for key, value in skeleton.metadata.items():
        if isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
    for name, shape in skeleton.shapes.items():
        writer.add_tensor(name, np.zeros(shape, np.float32 if len(shape) == 1 else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_mixtures() -> None:
    """quantize-mixtures.json.gz: model -> mixture -> type of each tensor, in the skeleton's order."""
    choices: dict[str, dict[str, list[str]]] = {}
    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, None)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.gguf", Path(folder) / "out.gguf"
        for model, skeleton in SKELETONS.items():
            write_skeleton(source, skeleton)
            choices[model] = {}
            for name in FILE_TYPES:
                if skeleton.metadata["general.architecture"] == "clip" and name in NEED_HEADS:
                    continue
                quantize_file(source, target, name)
                types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(target).tensors}
                choices[model][name] = [types[tensor] for tensor in skeleton.shapes]
    path = save_json("quantize-mixtures.json.gz", choices)
    record(path, "quantize-mixtures", versions("llama-cpp-python", "gguf"), "exact: names of block formats")


def make_errors() -> None:
    """quantize-errors.json: sample -> block format -> root of the mean squared error of ggml's quantizer."""
    errors: dict[str, dict[str, float]] = {}
    llama_cpp.llama_backend_init()
    for sample, make in SAMPLES.items():
        x = make()
        errors[sample] = {}
        for name in BLOCKS:
            raw = quantize_rows(name, x)
            y = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name]).astype(np.float64)
            errors[sample][name] = float(f"{np.sqrt(np.mean((y - x) ** 2)):.6g}")
    path = save_json("quantize-errors.json", errors)
    tolerance = "1.01 times the error at most"
    record(path, "quantize-errors", versions("llama-cpp-python", "gguf", "numpy"), tolerance)
