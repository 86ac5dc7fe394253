"""A stand-in for the package llama_cpp: what peer_llama_cpp.py calls, as a library that counts tokens."""

from __future__ import annotations

from pathlib import Path

SOURCE = '''
import ctypes, types
llama_token = ctypes.c_int32
held = 0
def llama_backend_init(): print("C libraries print")
def llama_model_default_params(): return types.SimpleNamespace()
def llama_model_load_from_file(path, settings): return None if path.endswith(b"other.gguf") else 1
def llama_context_default_params(): return types.SimpleNamespace()
def llama_init_from_model(model, limits): globals().update(limits=limits); return 2
def llama_get_memory(context): return 3
def llama_memory_seq_rm(memory, sequence, start, end): global held; held = min(held, start)
def llama_batch_get_one(tokens, n): return n
def llama_decode(context, n):
    global held
    held += n
    return int(held > limits.n_ctx or n > limits.n_batch)
def llama_get_logits_ith(context, i): return None
def llama_print_system_info(): return b"stub"
'''
METADATA = "Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: 1.2.3\n"


def install(folder: Path, more: str = "") -> Path:
    """Write the package into a folder, for PYTHONPATH; ``more`` replaces functions. Returns the folder."""
    (folder / "llama_cpp.py").write_text(SOURCE + more)
    info = folder / "llama_cpp_python-1.2.3.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(METADATA)
    return folder
