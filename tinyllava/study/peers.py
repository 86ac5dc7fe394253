"""Other programs that run the same files, for bench.py to take turns with."""

from __future__ import annotations

import ctypes
from importlib import import_module
from typing import TYPE_CHECKING, Any

from tinyllava.errors import UsageError

if TYPE_CHECKING:
    from tinyllava.study.bench import Runner, Work

#: Peer -> the package that brings it. Both have the same low-level functions.
PEERS = {"llama.cpp": "llama_cpp", "ik": "ik_llama_cpp"}


def open_peer(name: str, work: Work, threads: int) -> Runner:
    """A peer with the model loaded. UsageError if there is none of that name, or its package is not installed."""
    if name not in PEERS:
        raise UsageError("--peer", name, wanted=" or ".join(PEERS))
    try:
        library = import_module(PEERS[name])
    except ImportError as error:
        hint = f"Install {PEERS[name].replace('_', '-')}-python"
        raise UsageError("--peer", f"{name}: {error}", wanted=f"the package {PEERS[name]}", hint=hint) from None
    return LlamaCpp(library, work, threads)


class LlamaCpp:
    """llama.cpp through llama-cpp-python's low-level functions, without its sampling and its Python loops."""

    def __init__(self, library: Any, work: Work, threads: int) -> None:
        self.library = library
        self._quiet = library.llama_log_callback(lambda *_: None)
        library.llama_log_set(self._quiet, ctypes.c_void_p(0))
        library.llama_backend_init()
        settings = library.llama_model_default_params()
        settings.n_gpu_layers = 0
        self.model = library.llama_model_load_from_file(str(work.model).encode(), settings)
        limits = library.llama_context_default_params()
        limits.n_ctx = work.n_prompt + work.n_answer + 1
        limits.n_batch, limits.n_ubatch = work.n_prompt, min(512, work.n_prompt)
        limits.n_threads = limits.n_threads_batch = threads
        self.context = library.llama_init_from_model(self.model, limits) if self.model else None
        if not self.context:
            raise UsageError("--peer", f"cannot load {work.model}", wanted="a file that it knows")

    def prefill(self, ids: list[int]) -> None:
        """Read a prompt into an empty cache; the logits after its last token."""
        library = self.library
        library.llama_memory_clear(library.llama_get_memory(self.context), True)
        self._read(ids)

    def decode(self, token: int) -> None:
        """One more token; the logits after it."""
        self._read([token])

    def _read(self, ids: list[int]) -> None:
        library = self.library
        tokens = (library.llama_token * len(ids))(*ids)  # must outlive the batch, which only points to it
        code = library.llama_decode(self.context, library.llama_batch_get_one(tokens, len(ids)))
        if code != 0:
            raise UsageError("--peer", f"llama_decode returned {code}", wanted="0")
        library.llama_get_logits(self.context)
