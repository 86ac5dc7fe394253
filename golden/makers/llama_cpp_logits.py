"""What llama.cpp computes, through llama-cpp-python's C interface."""

import tempfile
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from golden.makers.hf import STORED_POSITIONS, prompt_ids
from golden.manifest import record, save_arrays, versions
from golden.models import LANGUAGE, write_language_model

DTYPES = ("F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")


class Model:
    """One model and one context, both freed by close().

    `exact`: keys and values in float32, no flash attention, so that only the order of sums is llama.cpp's.
    """

    def __init__(self, path: str | Path, n_ctx: int = 1024, exact: bool = True) -> None:
        self.model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = n_ctx
        params.n_threads = params.n_threads_batch = 2
        if exact:
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
            params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.n_past = 0

    def logits(self, ids: list[int]) -> np.ndarray[Any, Any]:
        """Feed `ids` after what was fed before; the logits at each of them, (n_ids, n_vocab)."""
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i] = int(token), self.n_past + i
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
        if llama_cpp.llama_decode(self.context, batch) != 0:
            raise SystemExit("llama_decode failed")
        self.n_past += len(ids)
        rows = [llama_cpp.llama_get_logits_ith(self.context, i) for i in range(len(ids))]
        copies = np.stack([np.ctypeslib.as_array(row, (self.n_vocab,)).copy() for row in rows])
        llama_cpp.llama_batch_free(batch)
        return copies

    def close(self) -> None:
        """Free the C side."""
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)


def make_language() -> None:
    """llama-cpp-language.npz: <spec>.logits at the positions and for the ids of hf-language.npz"""
    arrays = {}
    with tempfile.TemporaryDirectory() as folder:
        for spec in LANGUAGE.values():
            path = Path(folder) / f"{spec.name}.gguf"
            write_language_model(path, spec)
            model = Model(path)
            arrays[f"{spec.name}.logits"] = model.logits(prompt_ids(spec).tolist())[STORED_POSITIONS]
            model.close()
    path = save_arrays("llama-cpp-language.npz", arrays)
    tolerance = "2e-4 absolute: float32 sums in another order; logits lie within 14"
    record(path, "llama-cpp-language", versions("llama-cpp-python", "gguf", "numpy"), tolerance)


def make_quantized() -> None:
    """llama-cpp-quantized.npz: <dtype>.logits of llama_gqa, its matrices in each type that gguf writes"""
    spec, arrays = LANGUAGE["llama_gqa"], {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in DTYPES:
            path = Path(folder) / f"{dtype}.gguf"
            write_language_model(path, spec, dtype)
            model = Model(path)
            arrays[f"{dtype}.logits"] = model.logits(prompt_ids(spec).tolist())[STORED_POSITIONS]
            model.close()
    path = save_arrays("llama-cpp-quantized.npz", arrays)
    tolerance = (
        "none: llama.cpp rounds activations to 8 bits (F16, BF16: 16). Compute the truth in float64 from the "
        "same file; a fast mode must not be further from it than these logits are"
    )
    record(path, "llama-cpp-quantized", versions("llama-cpp-python", "gguf", "numpy"), tolerance)
