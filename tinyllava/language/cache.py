"""The key/value cache: what attention remembers of the tokens already read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tinyllava.errors import ContextError

if TYPE_CHECKING:
    from tinyllava.language.config import LlamaConfig
    from tinyllava.ops import Array, Ops


class KVCache:
    """Keys and values of every layer for up to ``n_ctx`` positions, of which ``length`` are filled.

    Held as one array (n_head_kv, n_ctx, head_dim) for each layer, in the memory of the backend that computes
    it, so that a head's history is one contiguous run. The memory is only reserved here: the system hands
    out pages as positions are written.
    """

    def __init__(self, config: LlamaConfig, n_ctx: int, ops: Ops) -> None:
        shape = (config.n_head_kv, n_ctx, config.head_dim)
        self.k: list[Array] = [ops.layer(i).cache(shape) for i in range(config.n_layer)]
        self.v: list[Array] = [ops.layer(i).cache(shape) for i in range(config.n_layer)]
        self.n_ctx = n_ctx
        self.length = 0

    def append(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        """Write k, v (n, n_head_kv, head_dim) after what layer ``layer`` holds; return all it holds then.

        The returned views have shape (length + n, n_head_kv, head_dim). ``length`` moves only by
        :meth:`advance`, once every layer has written. Raises ContextError when the cache is full.
        """
        start, stop = self.length, self.length + len(k)
        if stop > self.n_ctx:
            limit = f"at most {self.n_ctx}"
            raise ContextError("context", f"{stop} tokens", wanted=limit, hint=f"Use -c {stop}")
        self.k[layer][:, start:stop] = k.transpose(1, 0, 2)  # (n_head_kv, n, head_dim)
        self.v[layer][:, start:stop] = v.transpose(1, 0, 2)
        return self.k[layer][:, :stop].transpose(1, 0, 2), self.v[layer][:, :stop].transpose(1, 0, 2)

    def advance(self, n: int) -> None:
        """Count ``n`` more positions as filled."""
        self.length += n

    def truncate(self, length: int) -> None:
        """Forget everything from position ``length`` on."""
        self.length = int(np.clip(length, 0, self.length))
