"""The demo's LLaVA-1.5 in PyTorch: CLIP ViT, two-layer projector, LLaMA.  For training and checking only.

Dimension letters: B rows, T tokens, P patches (144), D width, H heads, E width of a head, V vocabulary.
The rotary embedding turns adjacent pairs (2i, 2i+1), which is what GGUF's "llama" architecture means,
so q and k are exported without a permutation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Config:
    """Sizes of the three parts."""

    image_px: int = 168
    patch_px: int = 14
    vision_width: int = 256
    vision_blocks: int = 6
    vision_heads: int = 4
    vision_ffn: int = 1024
    width: int = 256
    blocks: int = 4
    heads: int = 4
    kv_heads: int = 2
    ffn: int = 704
    vocabulary: int = 1536
    rope_base: float = 10000.0
    norm_eps: float = 1e-5

    @property
    def patches(self) -> int:
        """Patches in a picture."""
        return (self.image_px // self.patch_px) ** 2


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, H*E) -> (B, H, T, E)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class VisionBlock(nn.Module):
    """One block of CLIP's ViT: attention and a QuickGELU MLP, each after its LayerNorm."""

    def __init__(self, c: Config) -> None:
        """Biases everywhere, as in CLIP."""
        super().__init__()
        d = c.vision_width
        self.heads = c.vision_heads
        self.ln1, self.ln2 = nn.LayerNorm(d, c.norm_eps), nn.LayerNorm(d, c.norm_eps)
        self.attn_q, self.attn_k, self.attn_v, self.attn_out = (nn.Linear(d, d) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(d, c.vision_ffn), nn.Linear(c.vision_ffn, d)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1+P, D) -> (B, 1+P, D)."""
        h = self.ln1(x)
        q, k, v = (split_heads(part(h), self.heads) for part in (self.attn_q, self.attn_k, self.attn_v))
        x = x + self.attn_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h = self.fc1(self.ln2(x))
        return x + self.fc2(h * torch.sigmoid(1.702 * h))


class VisionTower(nn.Module):
    """CLIP's ViT without its last norm: the features are the last block's output, class token dropped."""

    def __init__(self, c: Config) -> None:
        """The patch convolution is kept as a matrix over (channel, row, column)."""
        super().__init__()
        d = c.vision_width
        self.config = c
        self.patch_embd = nn.Parameter(torch.randn(d, 3 * c.patch_px**2) * 0.02)
        self.class_embd = nn.Parameter(torch.randn(d) * 0.02)
        self.position_embd = nn.Parameter(torch.randn(1 + c.patches, d) * 0.02)
        self.pre_ln = nn.LayerNorm(d, c.norm_eps)
        self.blk = nn.ModuleList(VisionBlock(c) for _ in range(c.vision_blocks))

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, 168, 168) normalised -> (B, P, D)."""
        patches = F.unfold(pixels, self.config.patch_px, stride=self.config.patch_px).transpose(
            1, 2
        )  # (B, P, 588)
        x = F.linear(patches, self.patch_embd)
        first = self.class_embd.expand(len(x), 1, -1)
        x = self.pre_ln(torch.cat([first.to(x.dtype), x], 1) + self.position_embd)
        for block in self.blk:
            x = block(x)
        return x[:, 1:]


class Cache:
    """Keys and values of the tokens so far, for answering; each row writes at its own place."""

    def __init__(self, length: int) -> None:
        """length: tokens per row, at most."""
        self.length, self.kept = length, {}  # type: ignore[var-annotated]
        self.at: Tensor | None = None  # (B,) where the next token goes; None: the whole prompt, from 0

    def extend(self, block: nn.Module, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values (B, H, T, E); all that the new tokens may look at."""
        if self.at is None:
            spare = (0, 0, 0, self.length - k.shape[2])
            self.kept[block] = [F.pad(k, spare), F.pad(v, spare)]
            return k, v
        rows = torch.arange(len(k), device=k.device)
        for store, new in zip(self.kept[block], (k, v), strict=True):
            store[rows, :, self.at] = new[:, :, 0].to(store.dtype)
        return self.kept[block][0], self.kept[block][1]


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn adjacent pairs of (B, H, T, E) by angles (B, 1, T, E/2)."""
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


class LlamaBlock(nn.Module):
    """One block of LLaMA: grouped-query attention with rotary positions, and a SwiGLU MLP."""

    def __init__(self, c: Config) -> None:
        """No biases."""
        super().__init__()
        head = c.width // c.heads
        self.heads, self.kv_heads = c.heads, c.kv_heads
        self.attn_norm, self.ffn_norm = nn.RMSNorm(c.width, c.norm_eps), nn.RMSNorm(c.width, c.norm_eps)
        self.attn_q = nn.Linear(c.width, c.width, bias=False)
        self.attn_k = nn.Linear(c.width, c.kv_heads * head, bias=False)
        self.attn_v = nn.Linear(c.width, c.kv_heads * head, bias=False)
        self.attn_output = nn.Linear(c.width, c.width, bias=False)
        self.ffn_gate = nn.Linear(c.width, c.ffn, bias=False)
        self.ffn_up = nn.Linear(c.width, c.ffn, bias=False)
        self.ffn_down = nn.Linear(c.ffn, c.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: Cache | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D); with a cache, k and v of all earlier tokens are read from it."""
        h = self.attn_norm(x)
        q = rope(split_heads(self.attn_q(h), self.heads), cos, sin)
        k = rope(split_heads(self.attn_k(h), self.kv_heads), cos, sin)
        v = split_heads(self.attn_v(h), self.kv_heads)
        if cache is not None:
            k, v = cache.extend(self, k, v)
        x = x + self.attn_output(attention(q, k, v, mask).transpose(1, 2).flatten(2))
        h = self.ffn_norm(x)
        return x + self.ffn_down(F.silu(self.ffn_gate(h)) * self.ffn_up(h))


class TinyLlava(nn.Module):
    """Picture and tokens in, hidden states out; `output` turns them into logits."""

    def __init__(self, c: Config, patch_classes: int) -> None:
        """patch_classes: outputs of the head that names each patch, used in training only."""
        super().__init__()
        self.config = c
        self.vision = VisionTower(c)
        self.mm_0, self.mm_2 = nn.Linear(c.vision_width, c.width), nn.Linear(c.width, c.width)
        self.token_embd = nn.Embedding(c.vocabulary, c.width)
        self.blk = nn.ModuleList(LlamaBlock(c) for _ in range(c.blocks))
        self.output_norm = nn.RMSNorm(c.width, c.norm_eps)
        self.output = nn.Linear(c.width, c.vocabulary, bias=False)
        self.patch_head = nn.Linear(c.vision_width, patch_classes)
        frequencies = c.rope_base ** (-torch.arange(0, c.width // c.heads, 2) / (c.width // c.heads))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.apply(self._init)

    def _init(self, module: nn.Module) -> None:
        """Small random matrices; those that write to the residual stream start smaller."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        for name in ("attn_out", "fc2", "attn_output", "ffn_down"):
            if isinstance(getattr(module, name, None), nn.Linear):
                nn.init.normal_(getattr(module, name).weight, std=0.02 / math.sqrt(12))

    def project(self, features: Tensor) -> Tensor:
        """(B, P, vision width) -> (B, P, D): Linear, exact GELU, Linear."""
        return self.mm_2(F.gelu(self.mm_0(features)))

    def language(self, x: Tensor, positions: Tensor, mask: Tensor, cache: Cache | None = None) -> Tensor:
        """Embeddings (B, T, D) at positions (B, T) -> normalised hidden states (B, T, D)."""
        angles = positions[:, None, :, None].float() * self.frequencies  # (B, 1, T, E/2)
        cos, sin = angles.cos(), angles.sin()
        for block in self.blk:
            x = block(x, cos, sin, mask, cache)
        return self.output_norm(x)

    def embed(self, tokens: Tensor, pictures: Tensor, at: int) -> Tensor:
        """Token embeddings with a projected picture (B, P, D) in places at..at+P."""
        x = self.token_embd(tokens)
        return torch.cat([x[:, :at], pictures.to(x.dtype), x[:, at + self.config.patches :]], 1)


def dense_mask(segments: Tensor) -> Tensor:
    """(B, 1, T, T) bool, what each token sees: causal; segment 0 is seen by all, others by themselves only."""
    index = torch.arange(segments.shape[1], device=segments.device)
    key, query = segments[:, None, :], segments[:, :, None]
    seen = ((key == 0) | (key == query)) & (key >= 0) & (index[:, None] >= index[None, :])
    return (seen | (index[:, None] == index[None, :]))[:, None]  # a row without any key would be NaN


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Grouped-query attention under a mask; (B, H, T, E)."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
