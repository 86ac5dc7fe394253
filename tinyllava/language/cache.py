"""The KV cache: the keys and values of the tokens already read, which later tokens attend to."""

from __future__ import annotations

import numpy as np

from tinyllava.errors import ContextError
from tinyllava.language.config import LlamaConfig
from tinyllava.ops import Array, Ops


class KVCache:
    """Keys and values of every layer for up to ``n_ctx`` positions, of which ``length`` are filled.

    Each layer has one array (n_head_kv, n_ctx, head_dim) of keys and one of values, in the memory of the backend
    that computes the layer; so a head's keys lie one after the other. The memory is only reserved here: the
    operating system provides its pages as positions are written.
    """

    def __init__(self, config: LlamaConfig, n_ctx: int, ops: Ops) -> None:
        shape = (config.n_head_kv, n_ctx, config.head_dim)
        self.layers = [ops.layer(i) for i in range(config.n_layer)]  # the backend that computes and holds each
        self.k: list[Array] = [here.cache(shape) for here in self.layers]
        self.v: list[Array] = [here.cache(shape) for here in self.layers]
        self.angles: dict[Ops, tuple[Array, Array]] = {}  # of RoPE: cos and sin (n_ctx, n_pair) by backend
        self.n_ctx = n_ctx
        self.positions = {here: here.position(n_ctx) for here in (ops, *self.layers)}  # one count a backend
        self._position = self.positions[ops]

    @property
    def length(self) -> int:
        """Positions that are filled."""
        return self._position.value

    def check_room(self, n: int) -> None:
        """Raise ContextError unless ``n`` more positions fit."""
        if self.length + n > self.n_ctx:
            hint = f"Use -c {self.length + n}"
            raise ContextError(
                "context", f"{self.length + n} tokens", wanted=f"at most {self.n_ctx}", hint=hint
            )

    def append(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        """Write k, v (n, n_head_kv, head_dim) behind those that layer ``layer`` holds; return all of them.

        The returned views have shape (length + n, n_head_kv, head_dim). ``length`` grows only by
        :meth:`advance`, once every layer has appended.
        """
        here = self.layers[layer]
        return here.append_kv((self.k[layer], self.v[layer]), (k, v), self.positions[here])

    def advance(self, n: int) -> None:
        """Count ``n`` more positions as filled."""
        for here, position in self.positions.items():
            here.advance(position, n)

    def truncate(self, length: int) -> None:
        """Drop everything from position ``length`` on."""
        self.advance(int(np.clip(length, 0, self.length)) - self.length)
