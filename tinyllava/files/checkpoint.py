"""A checkpoint: a folder of shards, safetensors or PyTorch's, seen as one mapping from names to stored arrays.

Nothing is read but the shards' headers until an array is asked for, so a checkpoint of any size opens at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinyllava.errors import FileError
from tinyllava.files.safetensors import open_safetensors
from tinyllava.files.stored import AGAIN, StoredArray
from tinyllava.files.torch_zip import open_torch_zip

INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
MAX_JSON_BYTES = 256 << 20  # of a config or an index; LLaVA's largest, with tokenizer.json, are 20 MB


@dataclass(frozen=True)
class Checkpoint(Mapping[str, StoredArray]):
    """All arrays of a folder's shards by name. ``config`` is its config.json, or {}."""

    folder: Path
    files: tuple[Path, ...]  # the shards
    config: dict[str, Any]
    arrays: dict[str, StoredArray] = field(repr=False)

    def __getitem__(self, name: str) -> StoredArray:
        return self.arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Open every shard in ``folder``; safetensors are preferred where PyTorch files hold the same again.

    Raises FileError for a folder without shards, a shard that is missing or damaged, an index that names
    arrays which no shard holds, and for an array that two shards hold.
    """
    folder = Path(folder)
    if not folder.is_dir():
        found = "a file" if folder.exists() else "no such folder"
        raise FileError(folder, found, wanted="a folder with a checkpoint", hint="Check the path")
    index_path, promised = read_index(folder)
    files = find_shards(folder, index_path, promised)
    arrays: dict[str, StoredArray] = {}
    shards = without_copies({file: open_shard(file) for file in files})
    for shard in shards.values():
        for name, stored in shard.items():
            if name in arrays:
                raise FileError(stored.where, f"also in {arrays[name].where}", wanted="each array once")
            arrays[name] = stored
    absent = [name for name in promised if name not in arrays]
    if index_path is not None and absent:
        found = f"names {len(absent)} arrays that no shard holds, first {absent[0]} in {promised[absent[0]]}"
        raise FileError(index_path, found, hint="Download the folder again")
    return Checkpoint(folder, tuple(shards), read_json(folder / "config.json", missing={}), arrays)


def without_copies(shards: dict[Path, Mapping[str, StoredArray]]) -> dict[Path, Mapping[str, StoredArray]]:
    """The shards without those that repeat a part of the others, as mm_projector.bin beside LLaVA-1.5's shards."""
    kept = dict(shards)
    for path in sorted(shards, key=lambda path: len(shards[path])):
        others = {name for other, shard in kept.items() if other != path for name in shard}
        if shards[path].keys() < others:
            del kept[path]
    return kept


def open_shard(path: str | Path) -> Mapping[str, StoredArray]:
    """The arrays of one file, by its content: safetensors or a PyTorch zip archive."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise FileError(path, error.strerror or "cannot be read") from None
    is_safetensors = head[8:] == b"{"  # the guide of 2023 has people rename llava.clip to pytorch_model.bin
    if head[:2] == b"PK" or (path.suffix in (".bin", ".pth", ".pt") and not is_safetensors):
        return open_torch_zip(path)
    return open_safetensors(path)


def read_index(folder: Path) -> tuple[Path | None, dict[str, str]]:
    """The index file, if there is one, and the shard in which it says each array is."""
    for name in INDEX_FILES:
        path = folder / name
        if not path.exists():
            continue
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise FileError(path, "no weight_map", wanted="an index of shards", hint=AGAIN)
        return path, weight_map
    return None, {}


def find_shards(folder: Path, index_path: Path | None, promised: dict[str, str]) -> list[Path]:
    """The files to open: what the index names, and what lies beside it of the same kind (a projector, say)."""
    named = sorted(set(promised.values()))
    outside = [name for name in named if Path(name).name != name]
    if outside:
        raise FileError(index_path, f"names a shard outside the folder: {outside[0]!r}")
    missing = [name for name in named if not (folder / name).is_file()]
    if missing:
        found = f"{len(missing)} of {len(named)} shards are missing, first {missing[0]}"
        raise FileError(folder, found, hint="Download the missing files")
    if named:
        return [folder / name for name in named]
    safe, pickled = sorted(folder.glob("*.safetensors")), sorted([*folder.glob("*.bin"), *folder.glob("*.pth")])
    # training_args.bin and the optimizer's states hold no weights
    pickled = [path for path in pickled if not path.name.startswith(("training_args", "optimizer", "scheduler"))]
    if not safe and not pickled:
        raise FileError(folder, "no *.safetensors, *.bin or *.pth", wanted="a checkpoint", hint=_nearest(folder))
    return safe or pickled


def read_json(path: Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """A JSON object. FileError if it is none; ``missing`` instead of an error if there is no such file."""
    try:
        if missing is not None and not path.exists():
            return missing
        if path.stat().st_size > MAX_JSON_BYTES:
            raise FileError(path, f"{path.stat().st_size} bytes of JSON", wanted=f"at most {MAX_JSON_BYTES}")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(path, error.strerror or "cannot be read") from None
    except (ValueError, RecursionError) as error:
        raise FileError(path, f"not JSON: {error}", hint=AGAIN) from None
    if not isinstance(value, dict):
        raise FileError(path, f"JSON, but a {type(value).__name__}", wanted="an object")
    return value


def _nearest(folder: Path) -> str:
    """A hint that names a folder below or beside with shards in it, if there is one."""
    for candidate in [*sorted(folder.glob("*/")), *sorted(folder.parent.glob("*/"))][:200]:
        shards = [*candidate.glob("*.safetensors"), *candidate.glob("pytorch_model*.bin")]
        if shards and candidate != folder:
            return f"Did you mean {candidate}?"
    return "Name the folder that config.json and the weights lie in"
