"""What a GGUF file holds, and whether tinyllava runs it: behind `tinyllava inspect FILE`.

:func:`verdict` decides, :func:`describe` collects everything as plain data, :func:`format_report` writes it
out for people.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from tinyllava.errors import ModelError
from tinyllava.files.gguf import GGUFFile, Tensor, n_parameters
from tinyllava.language.config import ARCHITECTURES, is_mixture, read_config
from tinyllava.vision.config import VisionConfig, any_begins, projector_kind, unsupported

LANGUAGE_MODEL = "language model"
MMPROJ = "image encoder and projector"
VOCABULARY = "vocabulary only"
OTHER = "something else"

N_SHOWN = 4  # elements of a long array
LONG_ARRAY = 16  # elements
LONG_TEXT = 100  # characters of a string in the report; describe() has it whole


class Verdict(NamedTuple):
    """``kind`` is one of the four constants above, ``reason`` a sentence for people."""

    kind: str
    runnable: bool
    reason: str


def verdict(metadata: Mapping[str, Any], tensor_names: Collection[str]) -> Verdict:
    """What a GGUF file is, and whether tinyllava runs it, from its metadata and the names of its tensors.

    Decides by name only; :func:`describe` reads the configuration, too. A file that is found runnable may still
    lack a tensor or have one of a wrong shape; loading it says so.
    """
    architecture = str(metadata.get("general.architecture", ""))
    role = str(metadata.get("general.type", ""))
    if role in ("adapter", "imatrix"):
        name = "a LoRA adapter" if role == "adapter" else "an importance matrix for quantization"
        return Verdict(OTHER, False, f"This is {name}, not a model")
    if architecture == "clip" or any_begins(tensor_names, "v.", "mm.", "resampler."):
        return _mmproj(metadata, tensor_names)
    n_parts = metadata.get("split.count", 1)
    if isinstance(n_parts, int) and n_parts > 1:
        reason = f"One of {n_parts} parts of a model: join them first, with `llama-gguf-split --merge`"
        return Verdict(LANGUAGE_MODEL, False, reason)
    if "token_embd.weight" in tensor_names:
        return _language_model(architecture, metadata, tensor_names)
    if "tokenizer.ggml.tokens" in metadata:
        return Verdict(VOCABULARY, False, "A vocabulary without weights: it tokenizes, but cannot answer")
    named = f"Architecture {architecture!r}" if architecture else "No general.architecture"
    return Verdict(OTHER, False, f"{named}, and neither token_embd.weight nor an image encoder (tensors v.*)")


def _language_model(architecture: str, metadata: Mapping[str, Any], names: Collection[str]) -> Verdict:
    known = " and ".join(ARCHITECTURES)
    if architecture not in ARCHITECTURES:
        named = f"architecture {architecture!r}" if architecture else "no general.architecture"
        return Verdict(LANGUAGE_MODEL, False, f"A language model of {named}; tinyllava runs {known}")
    if is_mixture(metadata, names):
        reason = f"A mixture of experts of architecture {architecture}; tinyllava runs dense models only"
        return Verdict(LANGUAGE_MODEL, False, reason)
    return Verdict(LANGUAGE_MODEL, True, f"A language model of architecture {architecture}: give it as -m")


def _mmproj(metadata: Mapping[str, Any], names: Collection[str]) -> Verdict:
    if not any_begins(names, "v."):
        others = {"t.": "a text encoder", "a.": "an audio encoder"}
        part = next((named for prefix, named in others.items() if any_begins(names, prefix)), "")
        what = f"It holds {part}, and" if part else "It holds"
        return Verdict(MMPROJ, False, f"{what} no image encoder (no tensors v.*)")
    projector = projector_kind(metadata, names)
    named = {"": "without a projector (no tensors mm.*)", "unknown": "with projector 'unknown'"}
    if projector in named:
        return Verdict(MMPROJ, False, f"An image encoder {named[projector]}")
    if (found := unsupported(projector, names)) is not None:
        return Verdict(MMPROJ, False, f"An image encoder with {found[0]}, but tinyllava needs {found[1]}")
    return Verdict(MMPROJ, True, f"An image encoder with a projector {projector!r}: give it as --mmproj")


def read_as_loaders_do(file: GGUFFile, found: Verdict) -> Verdict:
    """The verdict, once the loaders' own reader of the configuration has read a file that looks runnable."""
    try:
        if found.runnable and found.kind == LANGUAGE_MODEL:
            read_config(file)
        elif found.runnable:
            VisionConfig.from_gguf(file)
    except ModelError as error:
        wanted = f", but tinyllava needs {error.wanted}" if error.wanted else ""
        where = str(error.where).removeprefix(str(file.path)).removeprefix(": ")
        return found._replace(runnable=False, reason=f"{where} {error.found}".strip() + wanted)
    return found


def describe(file: GGUFFile) -> dict[str, Any]:
    """All about an open file as plain data for JSON: dicts, lists, strings, numbers; no NaN.

    Metadata arrays of more than ``LONG_ARRAY`` elements appear as {"length", "type", "first"}.
    """
    kind, runnable, reason = read_as_loaders_do(file, verdict(file.metadata, file.tensors))
    n, n_bytes = n_parameters(file), sum(tensor.nbytes for tensor in file.tensors.values())
    return {
        "path": str(file.path),
        "bytes": file.size,
        "version": file.version,
        "byte_order": file.byte_order,
        "alignment": file.alignment,
        "kind": kind,
        "runnable": runnable,
        "reason": reason,
        "n_parameters": n,
        "bits_per_weight": round(8 * n_bytes / n, 3) if n else None,
        "metadata": {key: _plain(value) for key, value in file.metadata.items()},
        "n_tensors": len(file.tensors),
        "types": _by_type(list(file.tensors.values())),
        "tensors": [
            {"name": t.name, "type": t.type, "shape": list(t.shape), "bytes": t.nbytes, "start": t.start}
            for t in file.tensors.values()
        ],
    }


def _by_type(tensors: list[Tensor]) -> dict[str, dict[str, int]]:
    """For each block type, most bytes first: how many tensors, weights and bytes."""
    totals: dict[str, dict[str, int]] = {}
    for tensor in tensors:
        total = totals.setdefault(tensor.type, {"tensors": 0, "weights": 0, "bytes": 0})
        total["tensors"] += 1
        total["weights"] += tensor.n_elements
        total["bytes"] += tensor.nbytes
    return dict(sorted(totals.items(), key=lambda item: -item[1]["bytes"]))


def _plain(value: Any) -> Any:
    """A metadata value for JSON, long arrays summarised."""
    if isinstance(value, np.ndarray):
        summary = _summary(len(value), value.dtype.name, value[:N_SHOWN].tolist())
        return [_plain(v) for v in value.tolist()] if len(value) <= LONG_ARRAY else summary
    if isinstance(value, list):
        kind = "string" if value and isinstance(value[0], str) else "array"
        if len(value) > LONG_ARRAY:
            return _summary(len(value), kind, value[:N_SHOWN])
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no NaN and no infinity
    return value


def _summary(length: int, kind: str, first: list[Any]) -> dict[str, Any]:
    return {"length": length, "type": kind, "first": [_plain(v) for v in first]}


def format_report(description: dict[str, Any], tensors: bool = False) -> str:
    """The description as text for a terminal, tensor by tensor if asked. Control characters are escaped."""
    d = description
    lines = [
        f"{d['path']}: {_size(d['bytes'])}, GGUF version {d['version']}, {d['byte_order']}-endian",
        f"{d['kind']}, {'runs' if d['runnable'] else 'does not run'}. {d['reason']}.",
        "",
        f"metadata ({len(d['metadata'])} keys)",
        *(f"  {key} = {_value_text(value)}" for key, value in d["metadata"].items()),
        "",
        f"tensors ({d['n_tensors']}): {d['n_parameters']:,} weights{_density(d['bits_per_weight'])}",
        *(_type_line(name, total) for name, total in d["types"].items()),
    ]
    if tensors:
        width = max((len(t["name"]) for t in d["tensors"]), default=0)
        lines += ["", *(_tensor_line(t, width) for t in d["tensors"])]
    return "\n".join(_printable(line) for line in lines)


def _density(bits_per_weight: float | None) -> str:
    return "" if bits_per_weight is None else f", {bits_per_weight:.2f} bits each"


def _type_line(name: str, total: dict[str, int]) -> str:
    tensors, weights, size = total["tensors"], total["weights"], _size(total["bytes"])
    return f"  {name:<8}{tensors:>5} tensors {weights:>16,} weights {size:>10}"


def _tensor_line(tensor: dict[str, Any], width: int) -> str:
    shape = " x ".join(str(n) for n in tensor["shape"])
    return f"  {tensor['name']:<{width}}  {tensor['type']:<8}{_size(tensor['bytes']):>10}  {shape}"


def _value_text(value: Any) -> str:
    if isinstance(value, dict):
        first = ", ".join(_value_text(v) for v in value["first"])
        return f"[{first}, ...] ({value['length']:,} of type {value['type']})"
    if isinstance(value, list):
        return f"[{', '.join(_value_text(v) for v in value)}]"
    if isinstance(value, float):
        single = np.float32(value)  # most are float32 in the file; then 1e-05 says more than 9.999999747e-06
        return str(single) if float(single) == value else repr(value)
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value)
    return text if len(text) <= LONG_TEXT else f"{text[:LONG_TEXT]}... ({len(text):,} characters)"


def _size(n_bytes: int) -> str:
    """1536 -> '1.5 KiB'."""
    size = float(n_bytes)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{n_bytes} bytes" if unit == "bytes" else f"{size:.1f} {unit}"


def _printable(line: str) -> str:
    """A file's strings may hold newlines and terminal commands; none gets through."""
    return re.sub(r"[^ -~]", lambda m: m[0] if m[0].isprintable() else ascii(m[0])[1:-1], line)
