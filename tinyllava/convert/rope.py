"""What config.json says of RoPE, in its three spellings, as GGUF says it.

    "rope_theta": 10000, "rope_scaling": {"type": "linear", "factor": 4}        transformers before 4.43
    "rope_theta": 500000, "rope_scaling": {"rope_type": "llama3", ...}           before 5
    "rope_parameters": {"rope_theta": 500000, "rope_type": "llama3", ...}        5
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import pi
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllava.errors import ModelError


@dataclass(frozen=True)
class RopeScaling:
    """``kind``: "none", "linear", "yarn" or "llama3", which is a tensor and no key."""

    kind: str = "none"
    factor: float = 1.0
    head_dim: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    def metadata(self) -> dict[str, Any]:
        """Keys without the architecture in front."""
        if self.kind not in ("linear", "yarn"):
            return {}
        keys: dict[str, Any] = {"rope.scaling.type": self.kind, "rope.scaling.factor": np.float32(self.factor)}
        if self.kind == "yarn":
            original = self.settings.get("original_max_position_embeddings")
            keys["rope.scaling.original_context_length"] = int(original or 4096)
        return keys


def rope_scaling(config: dict[str, Any], head_dim: int, where: Path) -> tuple[float, RopeScaling]:
    """(rope_theta, scaling). ModelError for a kind that GGUF has no keys for."""
    parameters = config.get("rope_parameters")
    settings = parameters if isinstance(parameters, dict) else config.get("rope_scaling") or {}
    theta = settings.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = settings.get("rope_type", settings.get("type", "default"))
    try:
        base, factor = float(theta), float(settings.get("factor") or 1.0)
    except (TypeError, ValueError):
        raise ModelError(where / "config.json", f"rope_theta {theta!r}", wanted="a number") from None
    if kind in (None, "default", "none") or (kind == "linear" and factor == 1.0):
        return base, RopeScaling()
    if kind not in ("linear", "yarn", "llama3"):
        raise ModelError(where / "config.json", f"rope scaling {kind!r}", wanted="linear, yarn or llama3")
    return base, RopeScaling(kind, factor, head_dim, dict(settings))


def rope_freqs(rope: RopeScaling, base: float) -> npt.NDArray[np.float32]:
    """LLaMA-3.1's rope_freqs.weight (head_dim / 2,): by what each frequency is divided.

    Fast ones, which turn more than high_freq_factor times within the original context, stay; slow ones are
    divided by ``factor``; between the two it slides (``modify_tensors`` of LlamaModel in convert_hf_to_gguf.py).
    """
    low, high = (float(rope.settings.get(f"{word}_freq_factor") or n) for word, n in (("low", 1), ("high", 4)))
    original = float(rope.settings.get("original_max_position_embeddings") or 8192)
    frequency = base ** -(np.arange(0, rope.head_dim, 2) / rope.head_dim)  # (head_dim / 2,), radians a token
    turns = original * frequency / (2 * pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    divisors: npt.NDArray[np.float32] = (1 / ((1 - smooth) / rope.factor + smooth)).astype(np.float32)
    return divisors
