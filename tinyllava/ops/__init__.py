"""The operations that the models are made of.

The forward passes (vision/clip.py, vision/projector.py, language/llama.py) take a backend as the argument
``ops`` and know nothing else of it, so two backends can meet in one process and each model is written once.
reference.py is the definition of every operation; the other backends are measured against it.

Between operations the forward passes use the arrays' own ``+``, ``*`` and indexing; in a captured step only what
gives views (indexing, reshape), because a capture holds operations: arithmetic between them would not be replayed.

Letters in the shapes: n tokens, d features, h heads, g kv heads, k head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from tinyllava.files.gguf import Tensor

Array = npt.NDArray[Any]  # a float array of the backend's own kind (NumPy's, or one that behaves so)
Activation = Literal["gelu_erf", "gelu_tanh", "gelu_quick", "silu"]
RopeKind = Literal["norm", "neox"]


class Matrix(Protocol):
    """A weight matrix as a backend holds it: (d_out, d_in), perhaps still in its file's blocks."""

    @property
    def shape(self) -> tuple[int, ...]: ...


class Position(Protocol):
    """How many of ``limit`` places of a sequence are filled. A backend may also keep count on its device."""

    limit: int
    value: int


class DeviceMemory(Protocol):
    """The memory of a device that is not the host. A module may be one."""

    def free_bytes(self) -> int: ...
    def held_bytes(self, tensor: Tensor) -> int: ...  # what a file's tensor will take there
    def guard_memory(self, hint: Callable[[int], str]) -> None: ...  # its end is a UsageError with this hint


class Ops(Protocol):
    """The names of all operations. Formulas and sources: reference.py."""

    name: str
    dtype: np.dtype[Any]
    threads: int
    batch: int  # tokens of a prompt that are best read at once

    # The backend of the language model's block i, and x as its array (None: for what comes after the blocks).
    # They are this backend itself and x as it is, unless two backends share a model (split.py).
    def layer(self, i: int) -> Ops: ...
    def to_layer(self, i: int | None, x: Array) -> Array: ...

    # Between the file, NumPy and the backend.
    def matrix(self, tensor: Tensor) -> Matrix: ...
    def vector(self, tensor: Tensor) -> Array: ...
    def array(self, values: npt.ArrayLike) -> Array: ...
    def numpy(self, values: Array) -> Array: ...
    def zeros(self, shape: tuple[int, ...]) -> Array: ...
    def cache(self, shape: tuple[int, ...]) -> Array: ...

    # Positions in a sequence, and steps that may be captured and replayed.
    def position(self, limit: int) -> Position: ...
    def advance(self, position: Position, n: int) -> None: ...
    def slice_at(self, table: Array, start: Position, n: int) -> Array: ...
    def append_kv(
        self, held: tuple[Array, Array], rows: tuple[Array, Array], start: Position
    ) -> tuple[Array, Array]: ...
    def capture(self, step: Callable[[Any], Array]) -> Callable[[Any], Array]: ...

    # Weights.
    def embed(self, table: Matrix, ids: npt.ArrayLike) -> Array: ...
    def linear(self, x: Array, weight: Matrix, bias: Array | None = None) -> Array: ...
    def linears(self, x: Array, *layers: tuple[Matrix, Array | None]) -> list[Array]: ...

    # Sums, norms and activations.
    def add(self, x: Array, y: Array) -> Array: ...
    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array: ...
    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array: ...
    def activation(self, x: Array, kind: Activation) -> Array: ...
    def swiglu(self, gate: Array, up: Array) -> Array: ...

    # Attention.
    def rope(self, x: Array, cos: Array, sin: Array, kind: RopeKind) -> Array: ...
    def attention(self, q: Array, k: Array, v: Array, *, causal: bool) -> Array: ...
    def attention_weights(self, q: Array, k: Array, *, causal: bool) -> Array: ...


class Device(Ops, Protocol):
    """A backend of select.DEVICES."""

    memory: DeviceMemory
