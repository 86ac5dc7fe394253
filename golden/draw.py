"""Random weights that are the same on every machine: a seed and a tensor's name decide its values.

RandomState's stream is frozen (NEP 19). `random_sample` needs no logarithm or sine, so even the last bit does
not depend on the C library. A tensor's own name seeds it, so that adding a tensor changes no other.
"""

import zlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Array = np.ndarray[Any, np.dtype[np.float32]]


def uniform(seed: int, name: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> Array:
    """float32 values, uniform around `mean`, with the given standard deviation."""
    stream = np.random.RandomState([seed, zlib.crc32(name.encode())])  # frozen by NEP 19
    half_width = std * np.sqrt(3.0)
    return (mean + half_width * (2.0 * stream.random_sample(shape) - 1.0)).astype(np.float32)


def weights(seed: int, shapes: dict[str, tuple[int, ...]], gains: dict[str, float]) -> dict[str, Array]:
    """Draw every tensor by what its name says it is.

    A matrix with n inputs gets the standard deviation gain / sqrt(n), so that unit inputs give outputs of
    size `gain`. Norm weights lie around 1, all else (biases, embeddings of positions) around 0.
    `gains` maps the word before ".weight" to a gain; default 1.
    """
    drawn = {}
    for name, shape in shapes.items():
        word = name.removesuffix(".weight").split(".")[-1]
        if name.endswith(".weight") and (word.endswith(("norm", "_ln")) or word in ("ln1", "ln2")):
            drawn[name] = uniform(seed, name, shape, std=0.3, mean=1.0)
        elif len(shape) == 1:
            drawn[name] = uniform(seed, name, shape, std=gains.get("bias", 0.3))
        else:
            n_inputs = int(np.prod(shape[1:]))
            drawn[name] = uniform(seed, name, shape, std=gains.get(word, 1.0) / np.sqrt(n_inputs))
    return drawn


def add_tensor(writer: gguf.GGUFWriter, name: str, values: Array, dtype: str) -> None:
    """Add a tensor; a matrix in `dtype` (any type that gguf-py can quantize), a vector always in F32.

    A matrix whose rows do not fill whole blocks of `dtype` is written in F16, as llama-quantize would.
    """
    if values.ndim < 2 or dtype == "F32":
        writer.add_tensor(name, values)
        return
    kind = gguf.GGMLQuantizationType[dtype]
    if values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = gguf.GGMLQuantizationType.F16
    if kind == gguf.GGMLQuantizationType.F16:
        writer.add_tensor(name, values.astype(np.float16))
    else:
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)


def finish(writer: gguf.GGUFWriter) -> None:
    """Write header, metadata and tensors, and close."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def open_writer(path: str | Path, arch: str) -> gguf.GGUFWriter:
    """A gguf writer for architecture `arch` ("llama", "qwen2", "clip"); it writes general.architecture."""
    return gguf.GGUFWriter(str(path), arch)
