"""Weights as frozen dataclasses whose shapes are contracts that the loader checks.

    @dataclass(frozen=True)
    class Layer:
        attn_norm: Array = vector("n_embd")
        attn_k: Matrix = matrix("n_head_kv * head_dim", "n_embd")

    load_weights(Layer, file, config, ops, prefix="blk.0.")

reads ``blk.0.attn_norm.weight`` and ``blk.0.attn_k.weight`` and, when one has another shape, says

    model.gguf: blk.0.attn_k.weight: shape (64, 64); wanted (n_head_kv * head_dim, n_embd) = (32, 64)

A field is named for its tensor, so that the code and the file use the same words.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar

from tinyllava.errors import ModelError

if TYPE_CHECKING:
    from tinyllava.files.gguf import GGUFFile, Tensor
    from tinyllava.ops import Ops

T = TypeVar("T")


@dataclass(frozen=True)
class Contract:
    """What a field promises: the tensor's name without the prefix, its shape, how the backend holds it."""

    kind: str  # "matrix" | "vector" | "array"
    shape: tuple[str, ...]  # sums of products of the config's fields and integers: "1 + n_patches"
    name: str | None  # None: the field's own name + ".weight"
    optional: bool


def matrix(*shape: str, name: str | None = None, optional: bool = False) -> Any:
    """A weight that multiplies, W of shape (d_out, d_in): stays in its file's blocks if the backend can."""
    return field(metadata={"contract": Contract("matrix", shape, name, optional)})


def vector(*shape: str, name: str | None = None, optional: bool = False) -> Any:
    """A norm's weight or a bias: a float array in the backend's dtype."""
    return field(metadata={"contract": Contract("vector", shape, name, optional)})


def array(*shape: str, name: str | None = None, optional: bool = False) -> Any:
    """Any other weight that is used element by element, such as position embeddings: a float array."""
    return field(metadata={"contract": Contract("array", shape, name, optional)})


def load_weights(
    cls: type[T],
    file: GGUFFile,
    config: object,
    ops: Ops,
    /,
    *,
    prefix: str = "",
    rename: Callable[[str], str] = lambda name: name,
    **given: object,
) -> T:
    """An instance of ``cls``, each contracted field read from ``file`` and handed to ``ops``.

    ``rename`` maps the contract's tensor name (prefix included) to the file's own, for files that use
    older names. Fields without a contract, such as a tuple of layers, come from ``given``. An optional
    tensor that the file lacks becomes None. Raises ModelError for a missing tensor or a wrong shape.
    """
    values: dict[str, object] = dict(given)
    for item in fields(cls):  # type: ignore[arg-type]  # cls is a dataclass by convention
        contract: Contract | None = item.metadata.get("contract")
        if contract is None:
            continue
        name = rename(prefix + (contract.name or f"{item.name}.weight"))
        tensor = file.tensors.get(name)
        if tensor is None:
            if not contract.optional:
                hint = "The file is incomplete, or of another kind of model"
                raise ModelError(file.path, f"tensor {name} is missing", hint=hint)
            values[item.name] = None
            continue
        check_shape(file, tensor, contract.shape, config)
        values[item.name] = _hand_over(tensor, contract, ops)
    return cls(**values)


def check_shape(file: GGUFFile, tensor: Tensor, shape: tuple[str, ...], config: object) -> None:
    """Raise ModelError unless ``tensor`` has the contracted shape under ``config``."""
    wanted = tuple(evaluate(dimension, config) for dimension in shape)
    found = tuple(int(n) for n in tensor.shape)
    if found != wanted:
        contract = f"({', '.join(shape)})"
        raise ModelError(f"{file.path}: {tensor.name}", f"shape {found}", wanted=f"{contract} = {wanted}")


def evaluate(dimension: str, config: object) -> int:
    """The value of a contract's dimension.

    >>> from types import SimpleNamespace
    >>> evaluate("1 + n_head * head_dim", SimpleNamespace(n_head=4, head_dim=8))
    33
    """

    def factor(word: str) -> int:
        return int(word) if word.isdigit() else int(getattr(config, word))

    return sum(math.prod(factor(f.strip()) for f in term.split("*")) for term in dimension.split("+"))


def _hand_over(tensor: Tensor, contract: Contract, ops: Ops) -> object:
    if contract.kind == "matrix":
        return ops.matrix(tensor.as_matrix() if len(contract.shape) > 2 else tensor)
    return ops.vector(tensor)
