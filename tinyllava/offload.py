"""Placement: which layers of a model pair a GPU computes, by the option -ngl and by the memory that is free.

Layers count as in llama.cpp: N is the last N blocks of the language model and, once all of them are there, its
output head as one more. With N > 0 the image encoder and the projector are on the GPU, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from tinyllava.errors import UsageError, in_gib
from tinyllava.language.config import read_config
from tinyllava.ops import Device, DeviceMemory, Ops
from tinyllava.ops.select import DEVICES, HOST, select
from tinyllava.ops.split import split

if TYPE_CHECKING:
    from tinyllava.files.gguf import GGUFFile

ALL = 1 << 30  # layers: more than any model has
USUAL_CONTEXT = 4096  # tokens that the KV cache is planned for when the user names no number
SCRATCH_BYTES = 256 << 20  # of libraries, and of pieces of matrices that are no longer in blocks
TOKENS = 1536  # of a prompt that are read at once, with their activations in float32


@dataclass(frozen=True)
class Placement:
    """The backends of the language model and of the image encoder; ``notes`` say which wishes had no effect."""

    language: Ops
    vision: Ops
    n_layers: int = 0  # on the GPU, the head counted as one
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Need:
    """Bytes of the GPU's memory that a pair takes."""

    blocks: tuple[int, ...]  # each block of the language model with its cache, in order
    rest: int  # its head, its embeddings and its norms
    work: int  # image encoder, projector, and workspace

    def bytes(self, n_layers: int) -> int:
        """What ``n_layers`` take."""
        if n_layers <= 0:
            return 0
        head = self.rest if n_layers > len(self.blocks) else 0
        return self.work + head + sum(self.blocks[max(0, len(self.blocks) - n_layers) :])

    def most(self, free: int) -> int:
        """The largest number of layers that ``free`` bytes hold; 0 if not even one."""
        fitting = [n for n in range(1, self.all_layers + 1) if self.bytes(n) <= free]
        return max(fitting, default=0)

    @property
    def all_layers(self) -> int:
        """Everything: the blocks and the head."""
        return len(self.blocks) + 1


def read_layers(value: int | str | None) -> int | None:
    """What -ngl says: a number of layers, ALL for "all", None for nothing, "auto" or llama.cpp's -1: what fits."""
    if value is None or value == "auto":
        return None
    if value == "all":
        return ALL
    try:
        n_layers = int(value)
    except ValueError:
        raise UsageError("n_gpu_layers", repr(value), wanted="a number, 'all' or 'auto'") from None
    return None if n_layers < 0 else n_layers


def place(
    backend: str,
    n_gpu_layers: int | str | None,
    need: Callable[[DeviceMemory], Need],
    *,
    dtype: str = "float32",
    threads: int | None = None,
) -> Placement:
    """The backends for a pair that needs ``need(memory)`` of a device's memory.

    A GPU that "auto" chose takes what fits. A GPU or a number of layers that the user named is a requirement:
    UsageError if there is no such GPU, or not the memory. -ngl without any GPU is a note, as in llama.cpp.
    """
    wanted = read_layers(n_gpu_layers)
    if wanted == 0 and backend in DEVICES:
        backend = HOST
    if backend not in ("auto", *DEVICES) or dtype != "float32" or wanted == 0:
        cpu = {"float32": HOST}.get(dtype, "numpy") if backend == "auto" else backend
        host = select(cpu, dtype=dtype, threads=threads)
        notes = (f"-ngl {n_gpu_layers} has no effect: {host.name} computes on the CPU",) if wanted else ()
        return Placement(host, host, notes=notes)
    try:
        device = cast("Device", select(DEVICES[0] if backend == "auto" else backend))
    except UsageError as error:
        if backend in DEVICES:
            raise
        host = select(HOST, threads=threads)
        hint = f". {error.hint}" if error.hint else ""
        notes = (f"-ngl {n_gpu_layers} has no effect: {error.found}{hint}",) if wanted else ()
        return Placement(host, host, notes=notes)
    promised = wanted is not None or (backend in DEVICES and n_gpu_layers is None)
    return fit(device, ALL if wanted is None else wanted, need(device.memory), promised=promised, threads=threads)


def fit(device: Device, wanted: int, need: Need, *, promised: bool, threads: int | None) -> Placement:
    """``wanted`` layers on the device, or if that is no promise, as many as its free memory holds.

    UsageError for a promise that cannot be kept.
    """
    free, n_layers = device.memory.free_bytes(), min(wanted, need.all_layers)
    most = need.most(free)
    notes: tuple[str, ...] = ()
    if n_layers > most:
        needed = f"{in_gib(need.bytes(n_layers))} of the GPU's memory are needed"
        if promised:
            enough = f"at most the {in_gib(free)} that are free"
            raise UsageError(f"-ngl {n_layers}", needed, wanted=enough, hint=_try(most))
        notes = (f"{needed} for all, {in_gib(free)} are free: {most} of {need.all_layers} layers are on the GPU",)
        n_layers = most
    host = device if n_layers == need.all_layers else select(HOST, threads=threads)
    if n_layers:
        size = max(need.blocks, default=need.work)
        device.memory.guard_memory(lambda missing: _try(max(0, n_layers - -(-missing // size))))
    shared = split(host, device, n_layer=len(need.blocks), n_device=n_layers)
    return Placement(shared, device if n_layers else host, n_layers, notes)


def _try(n_layers: int) -> str:
    return f"-ngl {n_layers} fits" if n_layers else "-ngl 0 computes on the CPU"


def estimate(model: GGUFFile | None, mmproj: GGUFFile | None, n_ctx: int | None, memory: DeviceMemory) -> Need:
    """What a pair takes: its weights as ``memory`` holds them, a KV cache of ``n_ctx`` tokens, workspace.

    Raises ModelError for a language model that cannot be read.
    """
    work = SCRATCH_BYTES + (sum(memory.held_bytes(tensor) for tensor in mmproj.tensors.values()) if mmproj else 0)
    if model is None:
        return Need((), 0, work)
    config = read_config(model)
    work += 4 * TOKENS * (8 * config.n_embd + 4 * config.n_ff)  # rows of either width that live together
    context = n_ctx or min(config.n_ctx_train, USUAL_CONTEXT)
    half = any(len(tensor.shape) > 1 and tensor.type != "F32" for tensor in model.tensors.values())
    keys = (2 if half else 4) * context * config.n_head_kv * config.head_dim
    blocks = [2 * keys] * config.n_layer  # and as many values
    rest = 0
    for name, tensor in model.tensors.items():
        number = name.split(".")[1] if name.startswith("blk.") else ""
        if number.isdecimal() and int(number) < config.n_layer:
            blocks[int(number)] += memory.held_bytes(tensor)
        else:
            rest += memory.held_bytes(tensor)
    return Need(tuple(blocks), rest, work)
