"""tinyllava: the reference implementation of LLaVA, in NumPy.

    import tinyllava

    llava = tinyllava.load()                        # the embedded demo pair
    print(llava.generate("What is this?", images=["picture.png"]).text)

Letters and words, the same everywhere:

    token     one embedding that the language model reads, of text or of a picture
    tile      a square crop that the image encoder sees at once (336 x 336 px in LLaVA)
    patch     a small square of a tile, one position of the encoder (14 x 14 px)
    n, m      tokens in this call; tokens in the cache with them
    n_embd    width of the residual stream, of the encoder or of the language model
    n_head, n_head_kv, head_dim    query heads, key/value heads, features of one head
    n_ff      width inside a feed-forward network
    Size      (height, width), in this order, in the unit that the variable's name ends with

This module imports no Numba, no CuPy and no Pillow: what needs them imports them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tinyllava.version import __version__

# Public names and where they live; imported at first use, so that `import tinyllava` costs nothing.
_HOMES = {
    "load": "tinyllava.llava",
    "LLaVA": "tinyllava.llava",
    "Result": "tinyllava.generate",
    "Sampling": "tinyllava.text.sampling",
    "Tokenizer": "tinyllava.text.tokenizer",
    "open_gguf": "tinyllava.files.gguf",
    "TinyLLaVAError": "tinyllava.errors",
    "trace": "tinyllava.study.trace",
}
__all__ = [
    "LLaVA", "Result", "Sampling", "TinyLLaVAError", "Tokenizer", "__version__", "load", "open_gguf", "trace",
]  # fmt: skip

if TYPE_CHECKING:
    from tinyllava.errors import TinyLLaVAError
    from tinyllava.files.gguf import open_gguf
    from tinyllava.generate import Result
    from tinyllava.llava import LLaVA, load
    from tinyllava.study.trace import trace
    from tinyllava.text.sampling import Sampling
    from tinyllava.text.tokenizer import Tokenizer


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tinyllava' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
