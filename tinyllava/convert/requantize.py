"""A GGUF file to the same model in other block formats: behind `tinyllava quantize IN.gguf OUT.gguf TYPE`.

A tensor goes through in chunks: rows are read from the file (not from its mapping, whose pages would count as
this process's memory), dequantized and quantized by the threads, and written in order. At any time there are a
few chunks in memory, whatever the size of the model. A chunk's bytes depend on nothing but its rows, so the
output does not depend on the number of threads.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from tinyllava.convert.mixture import QUANTIZATION_VERSION, Mixture, Model, choose_types, mixture
from tinyllava.errors import FileError, ModelError, UsageError
from tinyllava.files.gguf import GGUFFile, Tensor, n_parameters, open_gguf
from tinyllava.files.gguf_write import NewTensor, Progress, copy_metadata, write_gguf
from tinyllava.quant.blocks import TYPES, dequantize, swap_bytes
from tinyllava.quant.quantize import quantize

Bytes = npt.NDArray[np.uint8]
T = TypeVar("T")
R = TypeVar("R")

CHUNK = 1 << 20  # weights read, quantized and written at a time: 4 MiB as float32
FLOATS = {"F64", "F32", "F16", "BF16"}  # what is not a quantized format already
SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")


@dataclass(frozen=True)
class Summary:
    """What was written. ``already`` are the quantized formats of matrices that were quantized once more."""

    mixture: str
    bytes_in: int
    bytes_out: int
    n_parameters: int
    types: dict[str, int]  # block format -> number of tensors
    already: tuple[str, ...]


def requantize(
    source: str | Path,
    target: str | Path,
    type_name: str,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
    warn: Callable[[str], None] = lambda _: None,
) -> Summary:
    """Write ``target``, the model of ``source`` in the mixture ``type_name``, with ``threads`` (None: all cores).

    UsageError for an unknown type or if both are the same file; FileError and ModelError for a file that cannot
    be read, holds weights that cannot be quantized, or cannot be written. The source is only read, and after any
    error there is no target but one that was there before.
    """
    chosen = mixture(type_name)
    with open_gguf(source) as file, workers(threads) as pool:
        if _same_file(source, target):
            raise UsageError(str(target), "the input itself", wanted="another file to write to")
        types = plan(file, chosen)
        already = _quantized_before(file, types)
        if already:
            warn(f"the input is {', '.join(already)} already: new errors add to old ones; better start from F16")
        tensors = [
            NewTensor(t.name, t.shape, types[t.name], partial(_chunks, t, types[t.name], pool))
            for t in file.tensors.values()
        ]
        size = write_gguf(target, new_metadata(file, chosen), tensors, progress)
        return Summary(chosen.name, file.size, size, n_parameters(file), dict(Counter(types.values())), already)


@contextmanager
def workers(threads: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """Threads (None: all cores) that at the end, or after an error, finish only what they have begun."""
    pool = ThreadPoolExecutor(threads or n_cores())
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def n_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def plan(file: GGUFFile, chosen: Mixture) -> dict[str, str]:
    """The block format of each tensor of the output. ModelError for a model with rules that are not known here."""
    n_parts = file.metadata.get("split.count", 1)
    if isinstance(n_parts, int) and n_parts > 1:
        hint = "Join the parts first, with `llama-gguf-split --merge`"
        raise ModelError(file.path, f"one of {n_parts} parts of a model", wanted="a whole model", hint=hint)
    model = Model.from_metadata(file.metadata, file.path)
    types = choose_types(chosen, model, {t.name: (t.shape, t.type) for t in file.tensors.values()})
    for tensor in file.tensors.values():
        if TYPES[tensor.type].is_scalar and tensor.type not in FLOATS:
            types[tensor.name] = tensor.type  # whole numbers are not weights
    return types


def new_metadata(file: GGUFFile, chosen: Mixture) -> dict[str, Any]:
    """The file's metadata as it is, but for what says how it is quantized; both keys last, as in llama.cpp's."""
    metadata = copy_metadata(file)
    for key in ("general.quantization_version", "general.file_type", *SPLIT_KEYS):
        metadata.pop(key, None)
    metadata["general.quantization_version"] = np.uint32(QUANTIZATION_VERSION)
    metadata["general.file_type"] = np.uint32(chosen.file_type)
    return metadata


def _same_file(source: str | Path, target: str | Path) -> bool:
    return Path(target).exists() and os.path.samefile(source, target)


def _quantized_before(file: GGUFFile, types: dict[str, str]) -> tuple[str, ...]:
    changed = {t.type for t in file.tensors.values() if types[t.name] != t.type}
    return tuple(sorted(changed - FLOATS))


# ---- one tensor


def _chunks(tensor: Tensor, type_name: str, pool: ThreadPoolExecutor) -> Iterator[Bytes]:
    """The tensor's rows in another format, or as they are if it is the same."""
    if type_name == tensor.type:
        return stored_rows(tensor)
    return ordered_map(pool, partial(_requantize_rows, tensor, type_name), stored_rows(tensor))


def stored_rows(tensor: Tensor) -> Iterator[Bytes]:
    """The tensor's little-endian blocks, (n, row_bytes) at a time with about CHUNK weights, read from the file."""
    step = max(1, CHUNK // max(1, tensor.shape[-1] if tensor.shape else 1))
    with tensor.file.path.open("rb") as opened:
        opened.seek(tensor.start)
        for first in range(0, tensor.n_rows, step):
            n = min(step, tensor.n_rows - first)
            raw = np.fromfile(opened, np.uint8, n * tensor.row_bytes)
            if raw.size < n * tensor.row_bytes:
                raise FileError(f"{tensor.file.path}: {tensor.name}", "has become shorter while it was read")
            rows = raw.reshape(n, tensor.row_bytes)
            yield rows if tensor.file.byte_order == "little" else swap_bytes(TYPES[tensor.type], rows)


def _requantize_rows(tensor: Tensor, type_name: str, raw: Bytes) -> Bytes:
    """One chunk (n, row_bytes) in another format. ModelError, naming the tensor, if its weights do not fit it."""
    return quantize_rows(f"{tensor.file.path}: {tensor.name}", type_name, dequantize(tensor.type, raw))


def quantize_rows(where: str, type_name: str, weights: npt.NDArray[Any]) -> Bytes:
    """:func:`quantize` for a tensor that has a name: ModelError about ``where`` instead of a ValueError."""
    try:
        return quantize(type_name, weights)
    except ValueError as error:
        hint = "BF16 and F32 hold larger ones" if "too large" in str(error) else "The model is damaged"
        raise ModelError(where, str(error), wanted="weights that it can hold", hint=hint) from None


def ordered_map(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """function(item) for each item, in order, by the pool's threads, which are only a few items ahead."""
    ahead = 2 * pool._max_workers
    jobs: deque[Future[R]] = deque()
    for item in items:
        jobs.append(pool.submit(function, item))
        if len(jobs) > ahead:
            yield jobs.popleft().result()
    while jobs:
        yield jobs.popleft().result()
