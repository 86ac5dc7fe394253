"""PyTorch on the CPU as a program of worker.py: transformers' models of the files' sizes in bfloat16.

Weights are random: speed does not depend on them, and the memory is what a checkpoint in bfloat16 takes.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tinyllava.errors import UsageError
from tinyllava.files.gguf import open_gguf
from tinyllava.language.config import LlamaConfig, read_config
from tinyllava.profile import profile
from tinyllava.study.peers.worker import Work
from tinyllava.vision.config import VisionConfig

BYTES = 2  # of a bfloat16
ROOM = 1 << 30  # for PyTorch itself and what passes between layers


class Torch:
    """transformers' LlamaForCausalLM, and CLIPVisionModel with LLaVA's projector behind it."""

    def __init__(self, work: Work) -> None:
        torch.set_num_threads(work.threads or 1)
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.bfloat16)
        _need_memory(work)
        self.llama = _llama(read_config(open_gguf(work.model)))
        self.cache = transformers.DynamicCache()
        if work.mmproj and work.pictures:
            config = VisionConfig.from_gguf(open_gguf(work.mmproj), profile(work.compat))
            self.tower, self.projector = _tower(config), _projector(config)
            tiles = [_n_tiles(size, config) for size in work.pictures]
            self.pictures = [torch.randn(n, 3, config.image_px, config.image_px) for n in tiles]

    def prefill(self, ids: list[int]) -> None:
        """Read a prompt into an empty cache; the logits after its last token."""
        self.cache = transformers.DynamicCache()
        self._read(ids)

    def decode(self, ids: list[int], depth: int) -> None:
        """Read ids one by one after the first ``depth`` tokens; the logits after each."""
        if depth < self.cache.get_seq_length():
            self.cache.crop(depth - self.cache.get_seq_length())
        for token in ids:
            self._read([token])

    def _read(self, ids: list[int]) -> None:
        self.llama(torch.tensor([ids]), past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def encode(self, picture: int) -> int:
        """From a picture's tiles (n_tiles, 3, px, px) to its embeddings; returns how many."""
        seen = self.tower(self.pictures[picture]).last_hidden_state  # (n_tiles, 1 + n_patches, n_embd)
        found = self.projector(seen[:, 1:])  # (n_tiles, n_patches, n_embd of the language model)
        return int(found.shape[0] * found.shape[1])

    def about(self) -> dict[str, Any]:
        """Versions, and what kind of numbers."""
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        return {"versions": versions, "dtype": "bfloat16"}


def _need_memory(work: Work) -> None:
    """UsageError if the weights do not fit into the memory that is free."""
    files = [open_gguf(path) for path in (work.model, work.mmproj) if path]
    needed = BYTES * sum(tensor.n_elements for file in files for tensor in file.tensors.values()) + ROOM
    free = free_bytes()
    if free is not None and needed > free:
        found = f"torch needs {needed / 2**30:.1f} GiB for this model in bfloat16, {free / 2**30:.1f} are free"
        raise UsageError("--peer", found, wanted="more memory", hint="Take a smaller model")


def free_bytes() -> int | None:
    """Memory that a process may still take; None where nobody says."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found = [int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable")]
    except OSError:
        return None
    return found[0] if found else None


def _filled(model: nn.Module) -> nn.Module:
    """A model made without memory (device "meta"), with random weights: each row of a matrix the same."""
    model.to_empty(device="cpu")
    for weight in model.parameters():
        weight.copy_(0.02 * torch.randn(weight.shape[-1]))
    return model.eval()


def llama_settings(config: LlamaConfig, **more: Any) -> Any:
    """transformers' config for a model of these sizes."""
    return transformers.LlamaConfig(
        vocab_size=config.n_vocab,
        hidden_size=config.n_embd,
        intermediate_size=config.n_ff,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        num_key_value_heads=config.n_head_kv,
        head_dim=config.head_dim,
        max_position_embeddings=config.n_ctx_train,
        rms_norm_eps=config.norm_eps,
        **more,
    )


def _llama(config: LlamaConfig) -> Any:
    _same("architecture", config.architecture, "llama", "qwen2")
    settings = llama_settings(config)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(settings)
    model = _filled(model)
    model.model.rotary_emb = LlamaRotaryEmbedding(settings)  # its table is no weight
    return model


def _same(kind: str, found: str, *known: str) -> None:
    """UsageError unless transformers' model is the same as this kind of ours."""
    if found not in known:
        raise UsageError("--peer torch", f"{kind} {found}", wanted=" or ".join(known))


def _tower(config: VisionConfig) -> Any:
    _same("vision tower", config.tower, "clip")
    settings = transformers.CLIPVisionConfig(
        hidden_size=config.n_embd,
        intermediate_size=config.n_ff,
        num_hidden_layers=config.n_block,
        num_attention_heads=config.n_head,
        image_size=config.image_px,
        patch_size=config.patch_px,
    )
    with torch.device("meta"):
        model = transformers.CLIPVisionModel(settings)
    model = _filled(model)
    for name, buffer in model.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1]))
    return model


def _projector(config: VisionConfig) -> nn.Module:
    _same("projector", config.projector, "linear", "mlp")
    layers: list[nn.Module] = [nn.Linear(config.n_embd, config.n_embd_llm)]
    if config.projector == "mlp":
        layers += [nn.GELU(), nn.Linear(config.n_embd_llm, config.n_embd_llm)]
    return nn.Sequential(*layers).eval()


def _n_tiles(size: tuple[int, int], config: VisionConfig) -> int:
    """How many tiles a (width, height) is: its own and the overview, or one."""
    n = (size[0] // config.image_px) * (size[1] // config.image_px)
    return n + 1 if n > 1 else 1
