"""The projector: features of patches become embeddings that the language model reads like words.

LLaVA (Liu et al. 2023a) had one linear layer, LLaVA-1.5 (Liu et al. 2023b) and 1.6 have two with a GELU
between. Source: llava/model/multimodal_projector/builder.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinyllava.tap import NULL, Tap
from tinyllava.vision.config import VisionConfig
from tinyllava.weights import load_weights, matrix, vector

if TYPE_CHECKING:
    from tinyllava.files.gguf import GGUFFile
    from tinyllava.ops import Activation, Array, Matrix, Ops

# As VISION_TAPS in clip.py; the caller's prefix is "mm.", and {i} counts linear layers from 0.
PROJECTOR_TAPS = {
    "{i}.linear": ("n_patches", "n_embd_llm"),
    "{i}.act": ("n_patches", "n_embd_llm"),  # between layers i and i + 1 only
}


@dataclass(frozen=True)
class FirstLayer:
    """From the tower's width: tensors mm.0.*, or mm.* when it is the only layer."""

    weight: Matrix = matrix("n_embd_llm", "n_embd", name="weight")
    bias: Array = vector("n_embd_llm", name="bias")


@dataclass(frozen=True)
class NextLayer:
    """From the language model's width to itself: tensors mm.2.*"""

    weight: Matrix = matrix("n_embd_llm", "n_embd_llm", name="weight")
    bias: Array = vector("n_embd_llm", name="bias")


@dataclass(frozen=True)
class Newline:
    """What ends a row of LLaVA-1.6's map of patches: an embedding, not features."""

    image_newline: Array = vector("n_embd_llm", name="image_newline")


@dataclass(frozen=True)
class ProjectorWeights:
    """The layers in order, what is between them, and LLaVA-1.6's newline (n_embd_llm,) where there is one."""

    layers: tuple[FirstLayer | NextLayer, ...]
    activation: Activation
    image_newline: Array | None


def load_projector(file: GGUFFile, config: VisionConfig, ops: Ops) -> ProjectorWeights:
    """The projector's weights. ModelError for a missing tensor or a wrong shape."""
    first, *rest = (f"{name}." for name in config.projector)
    layers: list[FirstLayer | NextLayer] = [load_weights(FirstLayer, file, config, ops, prefix=first)]
    layers += [load_weights(NextLayer, file, config, ops, prefix=name) for name in rest]
    newline = None
    if config.newline is not None:
        newline = load_weights(Newline, file, config, ops, prefix=config.newline).image_newline
    return ProjectorWeights(tuple(layers), config.projector_activation, newline)


def project(x: Array, weights: ProjectorWeights, ops: Ops, tap: Tap = NULL) -> Array:
    """Features to embeddings: (n, n_embd) -> (n, n_embd_llm)."""
    for i, layer in enumerate(weights.layers):
        if i > 0:
            x = tap(f"{i - 1}.act", ops.activation(x, weights.activation))
        x = tap(f"{i}.linear", ops.linear(x, layer.weight, layer.bias))  # (n, n_embd_llm)
    return x
