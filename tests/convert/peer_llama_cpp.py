"""A pair of files in today's llama.cpp: text, a picture, text, and what comes next."""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import mtmd_cpp

N_CTX = 512


def logits_after_picture(model_path: str, mmproj_path: str, rgb: Any, text: bytes) -> Any:
    """The logits (n_vocab,) after ``text``, in which libmtmd's marker stands for the picture ``rgb`` (h, w, 3)."""
    llama = llama_cpp.Llama(model_path, n_ctx=N_CTX, verbose=False)
    settings = mtmd_cpp.mtmd_context_params_default()
    settings.use_gpu = settings.print_timings = settings.warmup = False
    context = mtmd_cpp.mtmd_init_from_file(mmproj_path.encode(), llama.model, settings)
    assert context, "libmtmd does not load the image encoder"
    rgb = np.ascontiguousarray(rgb)
    pixels = rgb.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    bitmap = mtmd_cpp.mtmd_bitmap_init(rgb.shape[1], rgb.shape[0], pixels)
    chunks = mtmd_cpp.mtmd_input_chunks_init()
    prompt = mtmd_cpp.mtmd_input_text(text, len(text), True, True)
    bitmaps = (mtmd_cpp.mtmd_bitmap_p_ctypes * 1)(bitmap)
    assert mtmd_cpp.mtmd_tokenize(context, chunks, ctypes.byref(prompt), bitmaps, 1) == 0
    end = llama_cpp.llama_pos(0)
    evaluate = mtmd_cpp.mtmd_helper_eval_chunks
    assert evaluate(context, llama._ctx.ctx, chunks, 0, 0, N_CTX, True, ctypes.byref(end)) == 0
    last = llama_cpp.llama_get_logits_ith(llama._ctx.ctx, -1)
    logits = np.ctypeslib.as_array(last, shape=(llama.n_vocab(),)).copy()
    mtmd_cpp.mtmd_input_chunks_free(chunks)
    mtmd_cpp.mtmd_bitmap_free(bitmap)
    mtmd_cpp.mtmd_free(context)
    return logits
