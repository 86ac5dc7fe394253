"""Stand-ins for the packages llama_cpp and ik_llama_cpp: a library that counts what it is called with."""

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
IK_SOURCE = SOURCE + '''
def forget(context, sequence, start, end): return llama_memory_seq_rm(context, sequence, start, end)
_lib = types.SimpleNamespace(llama_kv_cache_seq_rm=forget, llama_print_system_info=llama_print_system_info)
del llama_get_memory, llama_batch_get_one, llama_print_system_info
def llama_kv_cache_clear(context): llama_memory_seq_rm(context, -1, 0, -1)
def llama_batch(n_tokens, token, all_pos_0, all_pos_1, all_seq_id): return (n_tokens, all_pos_0, all_pos_1)
def llama_decode(context, batch):
    global held
    n, first, step = batch
    if (first, step) != (held, 1): return 1
    held += n
    return int(held > limits.n_ctx or n > limits.n_batch)
'''
METADATA = "Metadata-Version: 2.1\nName: {}\nVersion: 1.2.3\n"


def install(folder: Path, more: str = "") -> Path:
    """Write the packages into a folder, for PYTHONPATH; ``more`` replaces functions. Returns the folder."""
    (folder / "llama_cpp.py").write_text(SOURCE + more)
    (folder / "ik_llama_cpp").mkdir(exist_ok=True)
    (folder / "ik_llama_cpp" / "__init__.py").write_text("")
    (folder / "ik_llama_cpp" / "_ctypes_api.py").write_text(IK_SOURCE)
    for name in ("llama-cpp-python", "ik-llama-cpp-python"):
        info = folder / f"{name.replace('-', '_')}-1.2.3.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(METADATA.format(name))
    return folder
