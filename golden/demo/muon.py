"""Muon: momentum whose matrix updates are made orthogonal, and AdamW for everything else.

K. Jordan et al., "Muon: an optimizer for hidden layers" (2024); the 0.2 * sqrt(larger side) scale, which makes
learning rates comparable with AdamW's, is from J. Liu et al., "Muon is scalable for LLM training" (2025).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def orthogonalize(matrices: Tensor) -> Tensor:
    """(N, rows, columns) -> the nearest orthogonal matrices, roughly, by five Newton-Schulz steps in bf16."""
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Muon:
    """One optimizer for a whole model."""

    def __init__(self, model: nn.Module, lr: float, decay: float = 0.02) -> None:
        """Matrices inside blocks and projector get Muon; embeddings, heads, norms and biases AdamW."""
        self.lr, self.decay, self.momentum = lr, decay, 0.95
        groups: dict[torch.Size, list[nn.Parameter]] = {}
        others, tables = [], []
        for name, parameter in model.named_parameters():
            if name.endswith(".weight") and parameter.ndim == 2 and ("blk." in name or "mm_" in name):
                groups.setdefault(parameter.shape, []).append(parameter)
            else:
                (tables if parameter.ndim == 2 else others).append(parameter)
        self.groups = list(groups.values())
        self.states = [torch.zeros(len(g), *g[0].shape, device=g[0].device) for g in self.groups]
        fused = tables[0].is_cuda
        self.adam = torch.optim.AdamW(
            [{"params": others, "weight_decay": 0.0}, {"params": tables, "weight_decay": 0.01}],
            lr=lr, betas=(0.9, 0.98), eps=1e-8, fused=fused,
        )  # fmt: skip
        self.update = torch.compile(orthogonalize) if fused else orthogonalize

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One update at lr * scale."""
        lr = self.lr * scale
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        for parameters, state in zip(self.groups, self.states, strict=True):
            gradients = torch.stack([p.grad for p in parameters])  # type: ignore[misc]
            state.lerp_(gradients, 1 - self.momentum)
            update = self.update(gradients.lerp(state, self.momentum))
            size = 0.2 * max(parameters[0].shape) ** 0.5
            torch._foreach_mul_(parameters, 1 - lr * self.decay)
            torch._foreach_add_(parameters, list(update.unbind()), alpha=-lr * size)
