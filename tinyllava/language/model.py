"""LanguageModel: tokens, and pictures' embeddings among them, become logits.

    ids (n,) --embed--> (n, n_embd) --forward, which fills the KV cache--> (n, n_embd) --unembed--> (n, n_vocab)

A picture's embeddings stand among the tokens' where the picture does, and are read as these are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllava.errors import ModelError, UsageError
from tinyllava.files.gguf import GGUFFile
from tinyllava.language.cache import KVCache
from tinyllava.language.config import read_config
from tinyllava.language.llama import TAPS, Llama, embed, forward, load_llama, unembed
from tinyllava.ops import Array, Ops
from tinyllava.tap import NULL, Tap, of_blocks
from tinyllava.text.tokenizer import Tokenizer


@dataclass(eq=False)
class LanguageModel:
    """A loaded language model's file: tokenizer and weights, with the backend that computes them."""

    path: Path
    metadata: dict[str, Any]
    tokenizer: Tokenizer
    llama: Llama
    ops: Ops
    n_batch: int  # tokens of a prompt that are read at once

    def new_cache(self, n_ctx: int) -> KVCache:
        """An empty KV cache for up to ``n_ctx`` tokens."""
        return KVCache(self.llama.config, n_ctx, self.ops)

    def pieces(self, *parts: list[int] | Array) -> Iterator[Array]:
        """A prompt's embeddings in pieces (at most n_batch, n_embd), of token ids and of pictures' embeddings.

        Tokens are embedded when their piece is asked for: a long prompt's embeddings are never all in memory.
        """
        starts = np.cumsum([0, *(len(part) for part in parts)]).tolist()
        for first in range(0, starts[-1], self.n_batch):
            rows: list[Array] = []
            for part, start in zip(parts, starts[:-1], strict=True):
                here = part[max(0, first - start) : max(0, first + self.n_batch - start)]
                if isinstance(here, list):
                    rows += [embed(here, self.llama, self.ops)] if here else []
                elif len(here) > 0:
                    rows.append(here)
            yield rows[0] if len(rows) == 1 else np.concatenate(rows)

    def forward(self, x: Array, cache: KVCache, tap: Tap = NULL) -> Array:
        """Embeddings x (n, n_embd), after what the cache holds -> what the head reads (n, n_embd)."""
        return forward(x, self.llama, cache, self.ops, tap.at("llm"))

    def unembed(self, hidden: Array, tap: Tap = NULL) -> Array:
        """The head: what :meth:`forward` returned (n, n_embd) -> logits (n, n_vocab)."""
        return unembed(hidden, self.llama, self.ops, tap.at("llm"))

    def step(self, ids: list[int], cache: KVCache, tap: Tap = NULL) -> Array:
        """One decode step: the token ids (1,) -> the logits after it (1, n_vocab)."""
        return self.unembed(self.forward(embed(ids, self.llama, self.ops), cache, tap), tap)

    def logits(self, ids: Sequence[int], *, tap: Tap = NULL) -> npt.NDArray[np.float32]:
        """The logits after each of ``ids`` (n,), read as one text -> (n, n_vocab), in the backend's dtype.

        UsageError for no ids, and for an id that is not in the vocabulary.
        """
        n_vocab = self.llama.config.n_vocab
        if len(ids) == 0:
            raise UsageError("ids", "no tokens", wanted="at least one")
        bad = [i for i in ids if not 0 <= i < n_vocab]
        if bad:
            raise UsageError("ids", f"token {bad[0]}", wanted=f"0..{n_vocab - 1}")
        cache, rows = self.new_cache(len(ids)), []
        for piece in self.pieces(list(ids)):
            hidden = self.forward(piece, cache, tap)  # (piece, n_embd)
            rows.append(self.ops.numpy(self.unembed(hidden, tap)))  # (piece, n_vocab)
        return np.concatenate(rows)

    def taps(self) -> dict[str, tuple[str, ...]]:
        """Every tap that a forward pass and the head fire, by its full name, with its shape in letters."""
        return of_blocks(TAPS, "llm", self.llama.config.n_layer)


def load_language_model(file: GGUFFile, ops: Ops, n_batch: int) -> LanguageModel:
    """The model in a file. ModelError if its architecture is not supported or a tensor is missing or wrong."""
    config = read_config(file)
    tokenizer = Tokenizer.from_gguf(file)
    if tokenizer.n_vocab > config.n_vocab:
        found = f"{tokenizer.n_vocab} tokens but {config.n_vocab} rows in token_embd.weight"
        raise ModelError(file.path, found, wanted="a row for each token")
    return LanguageModel(file.path, file.metadata, tokenizer, load_llama(file, config, ops), ops, n_batch)
