"""Sorting a checkpoint's arrays: which are the language model's, the vision tower's, the projector's.

A layout is told by the arrays' names and by config.json, never by what a folder is called.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinyllava.errors import FileError, ModelError
from tinyllava.files.checkpoint import Checkpoint, open_checkpoint, open_shard, read_json
from tinyllava.files.stored import StoredArray
from tinyllava.names import identify

Arrays = dict[str, StoredArray]  # by GGUF's names


@dataclass
class Parts:
    """A checkpoint sorted. ``config`` is all of config.json, ``text_config`` what concerns the language model."""

    folder: Path
    files: tuple[Path, ...]
    config: dict[str, Any]
    language: Arrays = field(default_factory=dict)
    tower: Arrays = field(default_factory=dict)
    projector: Arrays = field(default_factory=dict)
    newline: Arrays = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)  # names that no LLaVA is known to have
    is_transformers: bool = False  # the names are transformers', not the original's

    @property
    def text_config(self) -> dict[str, Any]:
        """transformers nests it; the original keeps everything on one level."""
        nested = self.config.get("text_config")
        return {**self.config, **nested} if isinstance(nested, dict) else self.config

    def describe(self) -> str:
        """In words, for people."""
        who = "transformers'" if self.is_transformers else "an original"
        version = "1.6" if self.newline or self.config.get("image_grid_pinpoints") else "1.5"
        inside = "the vision tower inside" if self.tower else "no vision tower inside"
        return f"{who} LLaVA-{version} in {len(self.files)} file{'s' * (len(self.files) != 1)}, {inside}"


def sort_arrays(checkpoint: Checkpoint) -> Parts:
    """Give every array its GGUF name and part. FileError if two arrays would get the same name."""
    parts = Parts(checkpoint.folder, checkpoint.files, checkpoint.config)
    for name, stored in checkpoint.items():
        identity = identify(name)
        if identity is None:
            parts.unknown.append(name)
            continue
        if identity.part == "unused":
            continue
        group: Arrays = getattr(parts, identity.part)
        if identity.gguf in group:
            found = f"{name} and {group[identity.gguf].name} are the same array"
            raise FileError(checkpoint.folder, found, wanted="one checkpoint", hint="Remove one of the two")
        group[identity.gguf] = stored
        parts.is_transformers |= "multi_modal_projector" in name
    return parts


def open_folder(folder: str | Path) -> Parts:
    """Open and sort a checkpoint. FileError or ModelError that says what the folder is instead."""
    folder = Path(folder)
    if not folder.is_dir():
        raise _no_folder(folder)
    if (folder / "adapter_config.json").exists():
        hint = "Merge it into its base model first (merge_lora_weights.py of the original LLaVA)"
        raise ModelError(folder, "a LoRA adapter", wanted="a whole checkpoint", hint=hint)
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")) and any(folder.glob("*.gguf")):
        hint = "They are converted already: tinyllava run"
        raise FileError(folder, "GGUF files", wanted="a checkpoint", hint=hint)
    return sort_arrays(open_checkpoint(folder))


def open_llava(folder: str | Path) -> Parts:
    """Open and sort a whole LLaVA. FileError or ModelError as :func:`open_folder`, and for what is no LLaVA."""
    parts = open_folder(folder)
    folder = parts.folder
    if not parts.language:
        if parts.tower:
            hint = "Give it as --vision-tower, and the folder of the LLaVA itself first"
            raise ModelError(folder, "a vision tower alone", wanted="a LLaVA", hint=hint)
        if parts.projector:
            found = "a projector without a language model (the result of pretraining?)"
            raise ModelError(folder, found, wanted="a whole LLaVA", hint="Take the finetuned checkpoint")
        found = f"no array of a language model (first name: {next(iter(parts.unknown), 'none')})"
        raise ModelError(folder, found, wanted="a LLaVA")
    if not parts.projector:
        hint = "For a language model alone: tinyllava convert-llama"
        raise ModelError(folder, "a language model without a projector", wanted="a LLaVA", hint=hint)
    if not parts.config:
        raise FileError(folder / "config.json", "not there", wanted="the model's config", hint="Download it, too")
    return parts


@dataclass(frozen=True)
class Tower:
    """A vision tower, and what the files beside it say; {} for a file that is not there."""

    arrays: Arrays
    config: dict[str, Any]  # of the tower
    preprocessor: dict[str, Any]  # preprocessor_config.json
    model: dict[str, Any]  # config.json of the LLaVA, if the folder is one's


def open_tower(folder: Path) -> Tower:
    """A CLIP folder: a whole CLIPModel, its vision part alone, or a LLaVA with the tower inside.

    FileError or ModelError if there is no tower in it.
    """
    if not folder.is_dir():
        raise _no_folder(folder)
    loose = folder / "llava.clip"  # surgery's
    if loose.exists() and not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        config = read_json(folder / "config.json", missing={})
        parts = sort_arrays(Checkpoint(folder, (loose,), config, dict(open_shard(loose))))
    else:
        parts = sort_arrays(open_checkpoint(folder))
    if "v.patch_embd.weight" not in parts.tower:
        wanted = "a CLIP model, such as openai/clip-vit-large-patch14-336"
        raise ModelError(folder, "no vision tower", wanted=wanted)
    nested = parts.config.get("vision_config")
    is_llava = bool(parts.language) or "mm_vision_tower" in parts.config  # surgery may have left its files there
    config = {} if is_llava else parts.config
    config = {**config, **nested} if isinstance(nested, dict) else config
    preprocessor = read_json(folder / "preprocessor_config.json", missing={})
    return Tower(parts.tower, config, preprocessor, parts.config if is_llava else {})


def refuse_unknown(parts: Parts, skip_unknown: bool) -> list[str]:
    """Notes about arrays that are left out. ModelError for the first of them unless they may be."""
    if not parts.unknown:
        return []
    n, first = len(parts.unknown), parts.unknown[0]
    if not skip_unknown:
        found = f"{n} array{'s' * (n != 1)} that LLaVA does not have, first {first}"
        raise ModelError(parts.folder, found, hint="--skip-unknown leaves them out")
    return [f"{n} unknown array{'s' * (n != 1)} left out, first {first}"]


def _no_folder(folder: Path) -> FileError:
    from difflib import get_close_matches

    if folder.exists():
        return FileError(folder, "a file", wanted="the folder that config.json and the weights lie in")
    beside = [path.name for path in folder.parent.glob("*/")] if folder.parent.is_dir() else []
    close = get_close_matches(folder.name, beside, n=1, cutoff=0.7)
    hint = f"The nearest is {folder.parent / close[0]}" if close else "Check the path"
    return FileError(folder, "no such folder", hint=hint)
