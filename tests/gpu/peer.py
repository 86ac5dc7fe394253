"""transformers on the same card with the same weights, in half precision as usual, or in float64 as the truth.

    llama = language(random_file(VICUNA_7B, "F16"), torch.float16)
    seconds = time_prefill(llama, embeds)           # embeds (n, n_embd), NumPy's
    error = logits(llama, embeds) - logits(language(file, torch.float64), embeds)

Needs torch and transformers. Times are medians after a warm-up, in seconds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from golden.models import halves_from_pairs, hf_name
from tinyllava.language.config import read_config
from tinyllava.study.peers.torch import llama_settings

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WARM_UP, REPEAT = 3, 10

# GGUF's names in a block of the tower -> transformers'. These random files call the MLP's layers by what they do;
# names.py's table of files in the wild does not.
CLIP = {
    "ln1": "layer_norm1",
    "ln2": "layer_norm2",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.out_proj",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}


class Vision(nn.Module):
    """CLIP's tower and LLaVA's projector, as LlavaModel.get_image_features runs them."""

    def __init__(self, tower: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.tower = tower
        self.projector = projector

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(n_tiles, 3, H, W) -> (n_tiles, n_patches, n_embd_llm). The tower's last block runs, but is not used."""
        found = self.tower(pixels, output_hidden_states=True)
        return self.projector(found.hidden_states[-2][:, 1:])


# ---- models


def language(file: Any, dtype: torch.dtype = torch.float16) -> Any:
    """The language model of a file, opened or random, on the card."""
    c = read_config(file)
    config = llama_settings(
        c,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_base},
        tie_word_embeddings="output.weight" not in file.tensors,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = empty(transformers.LlamaForCausalLM, config, dtype)
    copies: dict[Any, torch.Tensor] = {}
    for name, tensor in file.tensors.items():
        heads = {"attn_q": c.n_head, "attn_k": c.n_head_kv}.get(name.split(".")[-2], 0)
        turned = heads if c.rope_kind == "norm" else 0
        fill(model, hf_name(name), tensor, turned, copies)
    return exact(model, c) if dtype == torch.float64 else model


def vision(file: Any, dtype: torch.dtype = torch.float16) -> Vision:
    """The image encoder and projector of a file, opened or random, on the card."""
    meta = {key.removeprefix("clip.vision."): value for key, value in file.metadata.items()}
    config = transformers.CLIPVisionConfig(
        hidden_size=meta["embedding_length"],
        intermediate_size=meta["feed_forward_length"],
        num_hidden_layers=meta["block_count"] + 1,  # the file lacks the last one, as LLaVA does not use it
        num_attention_heads=meta["attention.head_count"],
        image_size=meta["image_size"],
        patch_size=meta["patch_size"],
        layer_norm_eps=meta["attention.layer_norm_epsilon"],
        hidden_act="gelu" if meta.get("clip.use_gelu") else "quick_gelu",
    )
    width, n_llm = meta["embedding_length"], file.tensors["mm.2.weight"].shape[0]
    with torch.device(DEVICE):
        layers = nn.Linear(width, n_llm), nn.GELU(), nn.Linear(n_llm, n_llm)
    encoder = Vision(empty(transformers.CLIPVisionModel, config, dtype), nn.Sequential(*layers).to(dtype)).eval()
    # transformers has moved the tower's parts up and down between versions: find them by how their names end.
    full_names = [name for name, _ in encoder.tower.named_parameters()]
    names = {name.split("embeddings.")[-1].split("encoder.")[-1]: name for name in full_names}
    names = {f"pre_layrnorm.{n.split('.')[-1]}" if "pre_layrnorm" in n else n: full for n, full in names.items()}
    for name, tensor in file.tensors.items():
        if name.startswith("mm."):
            fill(encoder.projector, name.removeprefix("mm."), tensor)
        else:
            fill(encoder.tower, names[_clip_name(name)], tensor)
    return encoder


def _clip_name(name: str) -> str:
    """``v.blk.3.ffn_up.bias`` -> ``layers.3.mlp.fc1.bias``"""
    _, *rest = name.split(".")
    if rest[0] == "blk":
        return f"layers.{rest[1]}.{CLIP[rest[2]]}.{rest[3]}"
    other = {"patch_embd": "patch_embedding", "position_embd": "position_embedding", "pre_ln": "pre_layrnorm"}
    return "class_embedding" if rest[0] == "class_embd" else f"{other[rest[0]]}.{rest[1]}"


def empty(kind: Any, config: Any, dtype: torch.dtype) -> Any:
    """A model on the card with whatever numbers its constructor draws there, which takes no time."""
    with torch.device(DEVICE):
        return kind._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


@torch.no_grad()
def fill(model: nn.Module, name: str, tensor: Any, n_turned: int = 0, copies: Any = None) -> None:
    """Copy a file's tensor into a parameter. Rows of ``n_turned`` heads go from GGUF's order to transformers'.

    In a file of the architecture "llama", the features that RoPE pairs are neighbours; here they are half a head
    apart. ``copies`` keeps what random tensors of one seed share.
    """
    into = model.get_parameter(name)
    seed = getattr(tensor, "seed", None)
    key = (tensor.type, tensor.shape, n_turned, seed) if len(tensor.shape) > 1 and seed is not None else None
    if copies is not None and key in copies:
        into.copy_(copies[key])
        return
    values = tensor.dequantize()
    if n_turned:
        values = halves_from_pairs(values, n_turned)
    into.copy_(torch.from_numpy(np.ascontiguousarray(values)).to(DEVICE).reshape(into.shape))
    if copies is not None and key is not None:
        copies[key] = into


# ---- the truth: transformers' norms and angles are float32 whatever the model's dtype is


class ExactNorm(nn.Module):
    """RMSNorm in its input's dtype."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class ExactAngles(nn.Module):
    """RoPE's cos and sin from float64 angles, features that are paired half a head apart."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        pair = torch.arange(config.n_pair, dtype=torch.float64, device=DEVICE)
        self.frequency = config.rope_base ** (-2 * pair / config.n_rot) / config.rope_scale

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        angle = position_ids[..., None].double() * self.frequency  # (1, n, n_pair)
        angle = torch.cat([angle, angle], dim=-1)  # (1, n, head_dim)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


def exact(model: Any, config: Any) -> Any:
    """The model with nothing in float32."""
    inner = model.model
    inner.rotary_emb = ExactAngles(config)
    inner.norm = ExactNorm(inner.norm.weight, config.norm_eps)
    for layer in inner.layers:
        for name in ("input_layernorm", "post_attention_layernorm"):
            setattr(layer, name, ExactNorm(getattr(layer, name).weight, config.norm_eps))
    return model


# ---- answers


def tensor_for(model: nn.Module, values: Any) -> torch.Tensor:
    """NumPy's numbers, as a batch of one, on the card, in the model's dtype."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(DEVICE, next(model.parameters()).dtype)[None]


@torch.no_grad()
def logits(model: Any, embeds: Any) -> np.ndarray:
    """Embeddings (n, n_embd) -> the logits after each, float64 (n, n_vocab)."""
    return model(inputs_embeds=tensor_for(model, embeds), use_cache=False).logits[0].double().cpu().numpy()


@torch.no_grad()
def embeddings(encoder: Vision, pixels: Any) -> np.ndarray:
    """A tile (3, H, W) -> its embeddings, float64 (n_patches, n_embd_llm)."""
    return encoder(tensor_for(encoder, pixels))[0].double().cpu().numpy()


# ---- times


@torch.no_grad()
def median(call: Callable[[], Any], repeat: int = REPEAT) -> float:
    """Seconds of a call, from the card's first to its last piece of work."""
    for _ in range(WARM_UP):
        call()
    return statistics.median(_seconds(call) for _ in range(repeat))


def _seconds(call: Callable[[], Any]) -> float:
    if DEVICE == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    call()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last)) / 1000


def time_encode(encoder: Vision, pixels: Any) -> float:
    """A tile (3, H, W), through the tower and the projector."""
    x = tensor_for(encoder, pixels)
    return median(lambda: encoder(x))


def time_prefill(model: Any, embeds: Any) -> float:
    """A prompt (n, n_embd) into a new cache, and the last token's logits."""
    x = tensor_for(model, embeds)
    return median(lambda: model(inputs_embeds=x, use_cache=True, logits_to_keep=1))


@torch.no_grad()
def time_decode(model: Any, context: Any, steps: int = 64, repeat: int = 3) -> float:
    """One token after ``context`` (n, n_embd): a forward pass with the cache, argmax on the card. Wall time."""
    x = tensor_for(model, context)

    def decode(n: int) -> float:
        found = model(inputs_embeds=x, use_cache=True, logits_to_keep=1)
        token = found.logits[:, -1].argmax(-1, keepdim=True)
        _wait()
        start = time.perf_counter()
        for _ in range(n):
            found = model(input_ids=token, past_key_values=found.past_key_values, use_cache=True)
            token = found.logits[:, -1].argmax(-1, keepdim=True)
        _wait()
        return (time.perf_counter() - start) / n

    decode(WARM_UP)
    return statistics.median(decode(steps) for _ in range(repeat))


@torch.no_grad()
def time_generate(model: Any, context: Any, steps: int = 64, repeat: int = 3) -> float:
    """One token of ``generate()``, greedy, its work on the host included: a long answer's time less a short's."""
    x = tensor_for(model, context)
    mask = torch.ones(x.shape[:2], dtype=torch.long, device=DEVICE)

    def answer(n: int) -> float:
        _wait()
        start = time.perf_counter()
        model.generate(inputs_embeds=x, attention_mask=mask, do_sample=False, max_new_tokens=n, min_new_tokens=n)
        _wait()
        return time.perf_counter() - start

    answer(WARM_UP)
    return statistics.median((answer(steps + 1) - answer(1)) / steps for _ in range(repeat))


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def measure(model: Any, encoder: Vision, embeds: Any, pixels: Any) -> dict[str, float]:
    """All times: ``embeds`` (2928, n_embd) stand for a long text; 616 of them for a prompt with a picture."""
    return {
        "encode_s": time_encode(encoder, pixels),
        "prefill_picture_s": time_prefill(model, embeds[:616]),
        "prefill_text_s": time_prefill(model, embeds),
        "decode_s": time_decode(model, embeds[:616]),
        "generate_s": time_generate(model, embeds[:616]),
    }


def about() -> dict[str, str]:
    """Who was measured."""
    return {"torch": torch.__version__, "transformers": transformers.__version__, "attention": "sdpa"}
