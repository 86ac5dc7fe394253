"""Taking a LLaVA apart: the projector, and the vision tower if it is inside, as files of their own.

The guide of 2023 (examples/llava/README.md of llama.cpp) begins with this: llava_surgery.py for LLaVA-1.5,
llava_surgery_v2.py for 1.6. Both at once, the names and numbers are theirs: the projector in float32, the tower
as it is. The files are safetensors, though, and nothing else in the folder changes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tinyllava.convert.layout import Arrays, Parts
from tinyllava.files.safetensors import write_safetensors
from tinyllava.files.stored import StoredArray
from tinyllava.names import NEWLINE, PROJECTOR, TOWER

PROJECTOR_FILE, TOWER_FILE = "llava.projector", "llava.clip"


@dataclass(frozen=True)
class Removed:
    """One file that was written."""

    path: Path
    n_arrays: int
    n_bytes: int


def take_apart(parts: Parts, out: Path) -> list[Removed]:
    """Write OUT/llava.projector and, if the tower is inside, OUT/llava.clip."""
    projector = originals(parts, parts.projector | parts.newline)
    files = {PROJECTOR_FILE: {name: as_f32(stored) for name, stored in projector.items()}}
    if parts.tower:
        tower = originals(parts, parts.tower)
        files[TOWER_FILE] = {name[name.find("vision_model.") :]: stored for name, stored in tower.items()}
    written = []
    for name, arrays in files.items():
        write_safetensors(out / name, arrays, {"format": "pt"})
        written.append(Removed(out / name, len(arrays), (out / name).stat().st_size))
    return written


def originals(parts: Parts, arrays: Arrays) -> dict[str, StoredArray]:
    """The same arrays by the original LLaVA's names, in their order."""
    if not parts.is_transformers:
        return {stored.name: stored for stored in arrays.values()}
    return {original_name(name): stored for name, stored in arrays.items()}


def original_name(gguf: str) -> str:
    """The original LLaVA's name of a GGUF tensor of tower or projector.

    >>> original_name("v.blk.3.ffn_down.bias")
    'model.vision_tower.vision_tower.vision_model.encoder.layers.3.mlp.fc1.bias'
    """
    block = re.search(r"\.blk\.(\d+)\.", gguf)
    template = gguf if block is None else f"{gguf[: block.start(1)]}{{i}}{gguf[block.end(1) :]}"
    for row in (*TOWER, *PROJECTOR, *NEWLINE):
        for ending in ("",) if row.whole else (".weight", ".bias"):
            if template == row.gguf + ending:
                return (row.original + ending).replace("{i}", block[1] if block else "")
    raise KeyError(gguf)


def as_f32(stored: StoredArray) -> StoredArray:
    """The array in float32, read when it is written."""

    def load() -> npt.NDArray[np.float32]:
        return stored.float32()

    return replace(stored, dtype="F32", load=load)
