"""Dumps: activations in a file, whoever wrote it, by our names.

    .npz          a trace of ours, or arrays by the names of another program (golden/dump_transformers.py)
    .safetensors  arrays by any of these names
    text          what llama.cpp prints of its graphs (callback_text.py)
    raw           the picture's embeddings, from MTMD_DEBUG_EMBEDDINGS=FILE: i32 n_tokens, i32 n_embd, f32 values

Nothing is read but names until a value is asked for. Arrays whose names nobody knows keep them, so that two dumps
of one program can be compared in any case.
"""

from __future__ import annotations

import json
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tinyllava.errors import FileError
from tinyllava.files.safetensors import open_safetensors
from tinyllava.study import tap_names
from tinyllava.study.compare.callback_text import ROUNDING, Printed, edges, looks_like_callback, read_callback
from tinyllava.study.tap_names import Program
from tinyllava.study.trace import SETTINGS, Trace
from tinyllava.tap import Array

HEAD_BYTES = 1 << 16  # a log may begin with other lines
ORIGINALS_NAME = "mm_projector"  # the original LLaVA's names are transformers' but for this one
WANTED = "a trace, an .npz or .safetensors file, llama.cpp's printed graph, or GGUF"
# What zipfile and NumPy raise on bytes that are no arrays; a claimed shape may ask for any amount of memory.
_DAMAGE = (
    zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError, UserWarning, SyntaxError, ValueError,
    TypeError, EOFError, KeyError, OSError, RuntimeError, OverflowError, MemoryError,
)  # fmt: skip


@dataclass(frozen=True)
class Value:
    """One activation. ``load`` gives all of it, or where ``seen`` is set what stands at these indices."""

    load: Callable[[], Array]
    theirs: str  # the name in the file
    shape: tuple[int, ...] = ()  # of all of it, where only a part is seen
    seen: tuple[Array, ...] | None = None  # along each axis
    rounding: float = 0.0  # absolute, of printed numbers
    total: float | None = None  # the sum of all elements


@dataclass(frozen=True)
class Dump:
    """A file's activations by our names, in the file's order."""

    path: Path
    program: Program
    values: dict[str, Value] = field(repr=False)
    settings: dict[str, Any] = field(default_factory=dict, repr=False)
    compat: str = ""  # of another program: the profile that stands for it

    @property
    def is_trace(self) -> bool:
        """Whether tinyllava wrote it, so that it says how it came about."""
        return bool(self.settings)


def open_dump(path: str | Path) -> Dump:
    """Open a dump of any kind. FileError if it is none, or damaged."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        size = path.stat().st_size
    except OSError as error:
        raise FileError(path, error.strerror or "cannot be read", wanted=WANTED) from None
    if head[:2] == b"PK":
        return _open_npz(path)
    if looks_like_callback(head):
        return _open_callback(path)
    if len(head) >= 8:
        n_tokens, n_embd = struct.unpack("<ii", head[:8])
        if n_tokens > 0 and n_embd > 0 and size == 8 + 4 * n_tokens * n_embd:
            load = partial(_load_embeddings, path, (n_tokens, n_embd))
            return Dump(path, "llama.cpp", {"image_tokens": Value(load, "MTMD_DEBUG_EMBEDDINGS")}, compat="mtmd")
        (n_header,) = struct.unpack("<Q", head[:8])
        if head[8:9] == b"{" and n_header < size:
            return _named(path, {name: stored_loader(s) for name, s in open_safetensors(path).items()})
    raise FileError(path, "no dump of activations", wanted=WANTED)


def from_trace(trace: Trace, name: str = "trace") -> Dump:
    """A trace in memory as a dump."""
    values = {key: Value(partial(np.asarray, array), key) for key, array in trace.items()}
    return Dump(Path(name), "tinyllava", values, trace.settings)


# ---- the formats


def _open_npz(path: Path) -> Dump:
    try:
        with zipfile.ZipFile(path) as file:
            names = [name.removesuffix(".npy") for name in file.namelist()]
        settings = json.loads(bytes(_load_npz(path, SETTINGS)).decode()) if SETTINGS in names else {}
        if not isinstance(settings, dict):
            raise ValueError("settings are no JSON object")
    except _DAMAGE as error:
        raise FileError(path, f"damaged: {error}", wanted="an .npz file of numbers") from None
    loaders = {name: partial(_load_npz, path, name) for name in names if name != SETTINGS}
    if settings.get("program") == "tinyllava":
        values = {name: Value(load, name) for name, load in loaders.items()}
        return Dump(path, "tinyllava", values, settings)
    return _named(path, loaders, str(settings.get("compat", "")))


def _load_npz(path: Path, name: str) -> Array:
    try:
        with zipfile.ZipFile(path) as file, file.open(f"{name}.npy") as member, warnings.catch_warnings():
            warnings.simplefilter("error")  # NumPy guesses at headers that it did not write
            array: Array = np.lib.format.read_array(member, allow_pickle=False)
    except _DAMAGE as error:
        raise FileError(f"{path}: {name}", f"damaged: {error}", wanted="an array of numbers") from None
    if array.dtype.kind not in "fiub":
        raise FileError(f"{path}: {name}", f"type {array.dtype}", wanted="an array of numbers")
    return array


def stored_loader(stored: Any) -> Callable[[], Array]:
    """How to read an array of a safetensors file: floats as float32, integers as they are."""
    is_float = stored.dtype in ("F16", "BF16", "F32")
    return stored.float32 if is_float else stored.read  # type: ignore[no-any-return]


def _load_embeddings(path: Path, shape: tuple[int, int]) -> Array:
    return np.fromfile(path, "<f4", offset=8).reshape(shape)


def _named(path: Path, loaders: Mapping[str, Callable[[], Array]], compat: str = "") -> Dump:
    """Arrays by another program's names, by ours where they are known."""
    part = tap_names.part_of(loaders)
    values: dict[str, Value] = {}
    program: Program = "tinyllava"
    usual = ""
    for name, load in loaders.items():
        found = from_cb = None
        if tap_names.entry(name) is None:
            found = tap_names.from_transformers(name)
            from_cb = None if found else tap_names.from_llama_cpp(name, part)
        if found:
            program = "transformers"
            usual = "llava" if usual == "llava" or ORIGINALS_NAME in name else "hf"
        elif from_cb:
            program, usual = "llama.cpp", "mtmd"
        values[found or (from_cb[0] if from_cb else name)] = Value(load, name)
    return Dump(path, program, values, compat=compat or usual)


def _open_callback(path: Path) -> Dump:
    with path.open(encoding="utf-8", errors="replace") as file:
        tensors = list(read_callback(file))
    return Dump(path, "llama.cpp", name_printed(tensors), compat="mtmd")


def name_printed(tensors: Iterable[Printed]) -> dict[str, Value]:
    """Printed tensors by our names. What the vision tower's graph prints again is the next tile's."""
    tensors = list(tensors)
    part = tap_names.part_of(tensor.name for tensor in tensors)
    found: dict[str, tuple[int, list[Printed]]] = {}  # ours -> rank of the spelling, printed
    for tensor in tensors:
        known = tap_names.from_llama_cpp(tensor.name, part, tensor.operation, tensor.source)
        if known is None:
            continue
        name, rank = known
        best, so_far = found.get(name, (rank, []))
        if rank < best:
            found[name] = (rank, [tensor])
        elif rank == best:
            found[name] = (rank, [*so_far, tensor])
    return {name: _value(name, printed) for name, (_, printed) in found.items()}


def _value(name: str, printed: list[Printed]) -> Value:
    """One tensor, or the vision tower's for several tiles stacked; of a repeated decode the first."""
    first = printed[0]
    if not name.startswith("llm.") and len(printed) > 1 and all(p.shape == first.shape for p in printed):
        shape = (len(printed), *first.shape)
        corners, total = np.stack([p.corners for p in printed]), sum(p.total for p in printed)
        seen = (np.arange(len(printed)), *(edges(n) for n in first.shape))
    else:
        shape, corners, total = first.shape, first.corners, first.total
        seen = tuple(edges(n) for n in shape)
    return Value(lambda: corners, first.name, shape, seen, ROUNDING, total)
