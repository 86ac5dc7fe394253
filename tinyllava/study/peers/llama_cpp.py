"""llama.cpp and ik_llama.cpp as programs of worker.py: their C functions, without sampling or Python loops.

Both with their own defaults, which are: memory-mapped weights, of which llama.cpp repacks some types at load and
ik_llama.cpp none (its run-time repacking is an option); flash attention; keys and values in half precision;
512 tokens at a time.
"""

from __future__ import annotations

import ctypes
from importlib.metadata import version
from typing import Any

from tinyllava.errors import UsageError
from tinyllava.study.peers.own import noise
from tinyllava.study.peers.worker import Work


class LlamaCpp:
    """llama.cpp through llama-cpp-python's low-level functions; pictures through its libmtmd."""

    package = "llama-cpp-python"

    def __init__(self, work: Work) -> None:
        self.work = work
        self.library = library = self._load()
        library.llama_backend_init()
        settings = library.llama_model_default_params()
        settings.n_gpu_layers = 0
        self.model = library.llama_model_load_from_file(str(work.model).encode(), settings)
        limits = library.llama_context_default_params()
        limits.n_ctx = work.n_ctx
        limits.n_batch, limits.n_ubatch = max(work.n_prompt, 1), min(512, max(work.n_prompt, 1))
        limits.n_threads = limits.n_threads_batch = work.threads
        self.context = library.llama_init_from_model(self.model, limits) if self.model else None
        if not self.context:
            raise UsageError("--peer", f"cannot load {work.model}", wanted="a file that it knows")
        self.vision = self._open_vision()

    def _open_vision(self) -> Mtmd | None:
        return Mtmd(self.model, self.work) if self.work.pictures else None

    def _load(self) -> Any:
        import llama_cpp

        return llama_cpp

    def _forget(self, depth: int) -> None:
        memory = self.library.llama_get_memory(self.context)
        self.library.llama_memory_seq_rm(memory, -1, depth, -1)

    def _batch(self, tokens: Any, n: int, past: int) -> Any:
        del past  # it counts itself
        return self.library.llama_batch_get_one(tokens, n)

    def _read(self, ids: list[int], past: int) -> None:
        tokens = (self.library.llama_token * len(ids))(*ids)  # must outlive the batch, which only points to it
        code = self.library.llama_decode(self.context, self._batch(tokens, len(ids), past))
        if code != 0:
            raise UsageError("--peer", f"llama_decode returned {code}", wanted="0")
        self.library.llama_get_logits_ith(self.context, -1)

    def prefill(self, ids: list[int]) -> None:
        """Read a prompt into an empty cache; the logits after its last token."""
        self._forget(0)
        self._read(ids, 0)

    def decode(self, ids: list[int], depth: int) -> None:
        """Read ids one by one after the first ``depth`` tokens; the logits after each."""
        self._forget(depth)
        for i, token in enumerate(ids):
            self._read([token], depth + i)

    def encode(self, picture: int) -> int:
        """A picture's embeddings; returns how many."""
        assert self.vision is not None
        return self.vision.encode(picture)

    def about(self) -> dict[str, Any]:
        """The package's version, and what processor features the library was built for."""
        system = self.library.llama_print_system_info()
        return {"versions": {self.package: version(self.package)}, "system": system.decode().strip()}


class Ik(LlamaCpp):
    """ik_llama.cpp through ik-llama-cpp-python: an older interface, which counts no positions itself."""

    package = "ik-llama-cpp-python"

    def _load(self) -> Any:
        from ik_llama_cpp import _ctypes_api as library

        c = library._lib  # the package binds no more of it than it uses
        c.llama_kv_cache_seq_rm.argtypes = [ctypes.c_void_p, *[ctypes.c_int32] * 3]
        c.llama_kv_cache_seq_rm.restype = ctypes.c_bool
        c.llama_print_system_info.restype = ctypes.c_char_p
        library.llama_print_system_info = c.llama_print_system_info
        return library

    def _forget(self, depth: int) -> None:
        if depth == 0:
            self.library.llama_kv_cache_clear(self.context)
        else:
            self.library._lib.llama_kv_cache_seq_rm(self.context, -1, depth, -1)

    def _batch(self, tokens: Any, n: int, past: int) -> Any:
        return self.library.llama_batch(n_tokens=n, token=tokens, all_pos_0=past, all_pos_1=1, all_seq_id=0)

    def _open_vision(self) -> None:
        return None  # the package comes without ik_llama.cpp's image encoder


class Mtmd:
    """llama.cpp's image encoder: from pixels over tiles to embeddings."""

    def __init__(self, model: Any, work: Work) -> None:
        from llama_cpp import mtmd_cpp

        self.library = mtmd_cpp
        settings = mtmd_cpp.mtmd_context_params_default()
        settings.use_gpu = settings.print_timings = False
        settings.n_threads = work.threads
        self.context = mtmd_cpp.mtmd_init_from_file(str(work.mmproj).encode(), model, settings)
        if not self.context:
            raise UsageError("--peer", f"cannot load {work.mmproj}", wanted="an image encoder that it knows")
        self.pictures = [noise(size) for size in work.pictures]

    def encode(self, picture: int) -> int:
        """Cut into tiles and encode them; returns the number of embeddings."""
        library, rgb = self.library, self.pictures[picture]
        data = rgb.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        bitmap = library.mtmd_bitmap_init(rgb.shape[1], rgb.shape[0], data)
        chunks = library.mtmd_input_chunks_init()
        marker = library.mtmd_default_marker()
        text = library.mtmd_input_text(marker, len(marker), True, True)
        bitmaps = (library.mtmd_bitmap_p_ctypes * 1)(bitmap)
        code = library.mtmd_tokenize(self.context, chunks, ctypes.byref(text), bitmaps, 1)
        n_tokens = self._encode_chunks(chunks) if code == 0 else 0
        library.mtmd_input_chunks_free(chunks)
        library.mtmd_bitmap_free(bitmap)
        if not n_tokens:
            raise UsageError("--peer", "llama.cpp cannot encode the picture", wanted="embeddings")
        return n_tokens

    def _encode_chunks(self, chunks: Any) -> int:
        library, n_tokens = self.library, 0
        for i in range(library.mtmd_input_chunks_size(chunks)):
            chunk = library.mtmd_input_chunks_get(chunks, i)
            if library.mtmd_input_chunk_get_type(chunk) != library.MTMD_INPUT_CHUNK_TYPE_IMAGE:
                continue
            if library.mtmd_encode_chunk(self.context, chunk) != 0:
                return 0
            library.mtmd_get_output_embd(self.context)
            n_tokens += library.mtmd_input_chunk_get_n_tokens(chunk)
        return n_tokens
