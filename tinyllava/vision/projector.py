"""The projector: features of patches become embeddings that the language model reads like words.

LLaVA (Liu et al. 2023a) had one linear layer, LLaVA-1.5 (Liu et al. 2023b) and 1.6 have two with a GELU
between. Source: llava/model/multimodal_projector/builder.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from tinyllava.names import projector_matrices
from tinyllava.tap import NULL, Tap, Taps
from tinyllava.vision.config import VisionConfig
from tinyllava.weights import load_weights, matrix, vector

if TYPE_CHECKING:
    from tinyllava.files.gguf import GGUFFile
    from tinyllava.ops import Activation, Array, Matrix, Ops

# As VISION_TAPS in clip.py; the caller's prefix is "mm.", and linear layers are counted from 0.
LINEAR_TAPS = {"0.linear": ("n_patches", "n_embd_llm")}
MLP_TAPS = {
    **LINEAR_TAPS,
    "0.act": ("n_patches", "n_embd_llm"),  # between layers 0 and 1
    "1.linear": ("n_patches", "n_embd_llm"),
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

    kind: str  # a key of KINDS
    layers: tuple[Any, ...]  # dataclasses of weights
    activation: Activation
    image_newline: Array | None


class Kind(NamedTuple):
    """What a kind of projector is: how its layers are loaded, its forward pass, and the taps that this fires."""

    load: Callable[[GGUFFile, VisionConfig, Ops], tuple[Any, ...]]
    project: Callable[[Array, ProjectorWeights, Ops, Tap], Array]  # (n, n_embd) -> (n, n_embd_llm)
    taps: Taps


def load_projector(file: GGUFFile, config: VisionConfig, ops: Ops) -> ProjectorWeights:
    """The projector's weights. ModelError for a missing tensor or a wrong shape."""
    layers = KINDS[config.projector].load(file, config, ops)
    newline = None
    if config.newline is not None:
        newline = load_weights(Newline, file, config, ops, prefix=config.newline).image_newline
    return ProjectorWeights(config.projector, layers, config.projector_activation, newline)


def project(x: Array, weights: ProjectorWeights, ops: Ops, tap: Tap = NULL) -> Array:
    """Features to embeddings: (n, n_embd) -> (n, n_embd_llm)."""
    return KINDS[weights.kind].project(x, weights, ops, tap)


def load_layers(file: GGUFFile, config: VisionConfig, ops: Ops) -> tuple[FirstLayer | NextLayer, ...]:
    """The linear layers of the kinds "linear" and "mlp", however many there are."""
    first, *rest = (name.removesuffix("weight") for name in projector_matrices(file.tensors))
    return (
        load_weights(FirstLayer, file, config, ops, prefix=first),
        *(load_weights(NextLayer, file, config, ops, prefix=name) for name in rest),
    )


def run_layers(x: Array, weights: ProjectorWeights, ops: Ops, tap: Tap) -> Array:
    """Linear layers with an activation between: (n, n_embd) -> (n, n_embd_llm)."""
    for i, layer in enumerate(weights.layers):
        if i > 0:
            x = tap(f"{i - 1}.act", ops.activation(x, weights.activation))
        x = tap(f"{i}.linear", ops.linear(x, layer.weight, layer.bias))  # (n, n_embd_llm)
    return x


KINDS = {  # the kinds that names.py says run
    "linear": Kind(load_layers, run_layers, LINEAR_TAPS),
    "mlp": Kind(load_layers, run_layers, MLP_TAPS),
}
