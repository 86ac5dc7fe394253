"""``tinyllava convert``: a folder in, a pair of GGUF files out, whole or not at all."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinyllava.convert.image_encoder import plan_image_encoder, read_vision_parameters
from tinyllava.convert.language_model import Plan, name_of, plan_language_model
from tinyllava.convert.layout import Arrays, Parts, open_llava, open_tower, refuse_unknown
from tinyllava.errors import FileError, ModelError, UsageError
from tinyllava.files.checkpoint import read_json
from tinyllava.files.gguf_write import write_gguf
from tinyllava.names import projector_matrices

Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]  # file, bytes written, bytes of the whole file


@dataclass
class Written:
    """One file of the result."""

    path: Path
    n_bytes: int
    n_tensors: int
    seconds: float
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Settings:
    """What the command line asks for."""

    folder: Path
    vision_tower: Path | None = None
    vision_config: Path | None = None
    out: Path | None = None  # None: beside the checkpoint, a folder of its name with -gguf behind it
    outtype: str | None = None  # None: the checkpoint's own precision
    mmproj_outtype: str | None = None  # None: F16
    skip_unknown: bool = False


def convert(settings: Settings, say: Say, progress: Progress) -> list[Written]:
    """Write OUT/model-<type>.gguf and OUT/mmproj-<type>.gguf. TinyLLaVAError mostly before anything is written."""
    parts = open_llava(settings.folder)
    say(f"found {parts.describe()}")
    notes = refuse_unknown(parts, settings.skip_unknown)
    tower, vision, preprocessor, whence = find_tower(parts, settings)
    check_widths(parts, tower)
    language = plan_language_model(parts.language, parts.text_config, parts.folder, settings.outtype)
    say(f"language model: {in_words(language, parts.language['blk.0.attn_q.weight'].dtype)}")
    parameters = read_vision_parameters(tower, vision, parts.config, preprocessor, settings.folder)
    tiles = f"tiles of {parameters.image_px} px in patches of {parameters.patch_px} px"
    say(f"vision tower: {whence}; {tiles}, {parameters.feature_layer} of {parameters.n_layer} blocks are used")
    name = name_of(parts.folder, parts.config)
    encoder = plan_image_encoder(tower, parts.projector | parts.newline, parameters, name, settings.mmproj_outtype)
    out = settings.out or parts.folder.resolve().with_name(f"{parts.folder.resolve().name}-gguf")
    plans = {f"mmproj-{encoder.mixture.name.lower()}": encoder, f"model-{language.mixture.name.lower()}": language}
    written = write_all(out, plans, parts.files, progress)
    written[-1].notes += notes
    return written


def in_words(plan: Plan, dtype: str) -> str:
    """``llama, 32 blocks of 4096 features, 32 heads on 8, 32064 tokens, BF16``."""
    keys = plan.metadata
    family = keys["general.architecture"]
    n = {key: int(keys[f"{family}.{key}"]) for key in ("block_count", "embedding_length", "vocab_size")}
    heads, shared = (int(keys[f"{family}.attention.head_count{end}"]) for end in ("", "_kv"))
    size = f"{n['block_count']} blocks of {n['embedding_length']} features"
    grouped = f"{heads} heads" if heads == shared else f"{heads} heads on {shared}"
    return f"{family}, {size}, {grouped}, {n['vocab_size']} tokens, {dtype}"


def find_tower(parts: Parts, settings: Settings) -> tuple[Arrays, dict[str, Any], dict[str, Any], str]:
    """(arrays, its config, preprocessor_config.json, where all that comes from in words)."""
    vision: dict[str, Any] = parts.config.get("vision_config") or {}
    preprocessor = read_json(parts.folder / "preprocessor_config.json", missing={})
    whence = "its sizes from its arrays and config.json"
    tower = parts.tower
    if settings.vision_tower is not None:
        apart = open_tower(settings.vision_tower)
        vision, preprocessor = apart.config, apart.preprocessor
        whence = f"its sizes from {settings.vision_tower}"
        if not tower:
            tower, whence = apart.arrays, str(settings.vision_tower)
    elif not tower:
        known = parts.config.get("mm_vision_tower")
        wanted = f"--vision-tower with the folder of {known}" if known else "--vision-tower with a CLIP folder"
        raise ModelError(parts.folder, "no vision tower inside", wanted=wanted)
    if settings.vision_config is not None:
        vision = read_json(settings.vision_config)
        vision = vision.get("vision_config") or vision
        whence += f", its config {settings.vision_config}"
    return tower, vision, preprocessor, f"{len(tower)} arrays, {whence}"


def check_widths(parts: Parts, tower: Arrays) -> None:
    """ModelError unless tower, projector and language model fit together."""
    arrays = [parts.projector[name] for name in projector_matrices(parts.projector)]
    matrices = [stored for stored in arrays if len(stored.shape) == 2]
    if not matrices:
        return  # names.py does not say which they are in this kind of projector
    first, last = matrices[0], matrices[-1]
    embeddings = parts.language.get("token_embd.weight")
    if embeddings is not None and last.shape[0] != embeddings.shape[-1]:
        found = f"the projector gives {last.shape[0]} features, the language model takes {embeddings.shape[-1]}"
        raise ModelError(last.where, found, hint="They are of different models")
    patches = tower.get("v.patch_embd.weight")
    if patches is not None and first.shape[1] != patches.shape[0]:
        found = f"the projector takes {first.shape[1]} features, the vision tower gives {patches.shape[0]}"
        raise ModelError(first.where, found, hint="Give the --vision-tower that the model was trained with")


def write_all(
    out: Path, plans: dict[str, Plan], inputs: Sequence[Path], progress: Progress, suffix: str = ".gguf"
) -> list[Written]:
    """Write each plan as OUT/<name><suffix>. They get their names together, when all of them are whole."""
    targets = {name: out / f"{name}{suffix}" for name in plans}
    for path in targets.values():
        if path.resolve() in {p.resolve() for p in inputs}:
            raise UsageError(path, "is an input", wanted="another -o")
    written = []
    with made_folder(out), staged(targets) as places:
        for name, plan in plans.items():
            started = time.perf_counter()

            def draw(done: int, total: int, name: str = name) -> None:
                progress(name, done, total)

            n_bytes = write_gguf(places[name], plan.metadata, plan.tensors, draw)
            seconds = time.perf_counter() - started
            written.append(Written(targets[name], n_bytes, len(plan.tensors), seconds, list(plan.notes)))
    return written


@contextmanager
def staged(targets: dict[str, Path]) -> Iterator[dict[str, Path]]:
    """Names to write under; at the end of the block the files take their own, or are gone if it failed."""
    places = {name: path.with_name(f".{path.name}.{os.getpid()}.whole") for name, path in targets.items()}
    try:
        yield places
        for name, path in targets.items():
            os.replace(places[name], path)
    finally:
        for place in places.values():
            with suppress(OSError):
                place.unlink()


@contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """The folder, made if need be, and taken away again if the block fails and leaves it empty."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(folder, f"cannot be made: {error.strerror}", wanted="a folder to write to") from None
    try:
        yield
    except BaseException:
        for path in new:
            with suppress(OSError):
                path.rmdir()
        raise
