"""The walk: what a run did, step by step, with shapes, parameters, time, and the line of code that did it.

Steps come from the taps that fired, and places in the code from the frames that called them, so the walk cannot
tell of anything that did not happen. The table below only says which taps belong together and what they mean.
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tinyllava.study.explain.watch import Event

if TYPE_CHECKING:
    from tinyllava.llava import LLaVA

HOME = Path(__file__).parents[3]

#: Stage -> its title, and what it does in one line.
STAGES = {
    "picture": ("Picture", "The file becomes pixels: decoded, padded, resized, cut into tiles, normalised."),
    "vit": ("Vision tower", "Each patch becomes a row of features, and all patches of a tile look at each other."),
    "mm": ("Projector", "Features of patches become embeddings that the language model reads like words."),
    "join": ("Join", "The question becomes tokens; the picture's embeddings stand among theirs."),
    "llm": ("Language model", "Every position looks at itself and all before it, block after block."),
    "head": ("Head", "The last position's features become one number for each token of the vocabulary."),
    "token": ("Choice", "One token is chosen; it goes back in, and the language model runs again for the next."),
}


@dataclass(frozen=True)
class Part:
    """Taps that are one step for the reader. ``weights``: "owner:field", each with its bias if it has one."""

    stage: str
    title: str
    taps: tuple[str, ...]
    weights: tuple[str, ...] = ()


def _part(stage: str, title: str, taps: str, weights: str = "") -> Part:
    return Part(stage, title, tuple(taps.split()), tuple(weights.split()))


_V, _VB, _L = "vit.blk.{i}.", "vit.blk:", "llm.blk.{i}."
PARTS = (
    _part("picture", "decode the file", "decode"),
    _part("picture", "pad, resize, cut, normalise", "pixels"),
    _part("vit", "patches to features: one linear layer", "vit.patch_embd", "vit:patch_embd"),
    _part("vit", "class token in front, positions added", "vit.inp_embd", "vit:class_embd vit:position_embd"),
    _part("vit", "norm before the blocks", "vit.pre_ln", "vit:pre_ln"),
    _part("vit", "norm", _V + "ln1", _VB + "ln1"),
    _part("vit", "queries, keys, values", " ".join(_V + f"attn_{x}" for x in "qkv"),
          " ".join(_VB + f"attn_{x}" for x in "qkv")),
    _part("vit", "attention: softmax(q kᵀ / √d) v", _V + "attn_mixed"),
    _part("vit", "mix the heads, add to the stream", f"{_V}attn_out {_V}ffn_inp", _VB + "attn_out"),
    _part("vit", "norm", _V + "ln2", _VB + "ln2"),
    _part("vit", "MLP up, activation", f"{_V}ffn_up {_V}ffn_act", _VB + "ffn_up"),
    _part("vit", "MLP down, add to the stream", f"{_V}ffn_down {_V}l_out", _VB + "ffn_down"),
    _part("vit", "class token left behind", "vit.features"),
    _part("mm", "linear layers", "mm.{i}.linear", "mm:*"),
    _part("mm", "GELU between them", "mm.{i}.act"),
    _part("mm", "tiles in the order of the picture", "image_tokens", "newline:image_newline"),
    _part("join", "question to token ids", "tokens"),
    _part("join", "rows of the embedding table", "llm.inp_embd", "llm:token_embd"),
    _part("llm", "norm", _L + "attn_norm", "llm.blk:attn_norm"),
    _part("llm", "queries, keys, values", " ".join(_L + f"attn_{x}" for x in "qkv"),
          "llm.blk:attn_q llm.blk:attn_k llm.blk:attn_v"),
    _part("llm", "RoPE turns queries and keys by their position", f"{_L}attn_q_rope {_L}attn_k_rope",
          "llm:rope_freqs"),
    _part("llm", "attention: softmax(q kᵀ / √d) v", _L + "attn_mixed"),
    _part("llm", "mix the heads, add to the stream", f"{_L}attn_output {_L}ffn_inp", "llm.blk:attn_output"),
    _part("llm", "norm", _L + "ffn_norm", "llm.blk:ffn_norm"),
    _part("llm", "feed-forward: silu(gate) · up", f"{_L}ffn_gate {_L}ffn_up {_L}ffn_swiglu",
          "llm.blk:ffn_gate llm.blk:ffn_up"),
    _part("llm", "feed-forward: down, add to the stream", f"{_L}ffn_down {_L}l_out", "llm.blk:ffn_down"),
    _part("head", "norm", "llm.result_norm", "llm:output_norm"),
    _part("head", "features to logits", "llm.result_output", "llm:output"),
    _part("token", "sample", "token"),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One step of the walk. Times in seconds; a GPU's are waited for."""

    stage: str
    title: str
    tap: str  # the first of its taps, {i} for a number
    shape: tuple[int, ...]  # of what comes out, for picture and prompt
    times: int  # how often the step runs for picture and prompt: blocks x tiles
    parameters: int
    seconds: float  # for picture and prompt, all blocks and tiles together
    seconds_each: float | None  # the median of the further tokens; None: not needed for it
    file: str  # relative to the repository: tinyllava/vision/clip.py
    line: int
    function: str
    source: str  # that line

    @property
    def place(self) -> str:
        """``tinyllava/vision/clip.py:117``."""
        return f"{self.file}:{self.line}"


def make_walk(events: Sequence[Event], llava: LLaVA) -> list[Row]:
    """The rows, in the order in which they first happened."""
    grouped: dict[Part, list[Event]] = {}
    for event in events:
        grouped.setdefault(_part_of(canonical(event.name)), []).append(event)
    owners = weight_owners(llava)
    n_answer = sum(event.name == "llm.inp_embd" and event.phase == "answer" for event in events)
    return [_row(part, own, n_answer, owners) for part, own in grouped.items()]


def canonical(name: str) -> str:
    """``llm.blk.3.attn_q`` -> ``llm.blk.{i}.attn_q``."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "{i}", name)


def _part_of(tap: str) -> Part:
    """The part of the table that a tap belongs to; a tap that the table does not know is a step of its own."""
    for part in PARTS:
        if tap in part.taps:
            return part
    stage = tap.split(".")[0]
    return Part(stage if stage in STAGES else "picture", tap.split(".")[-1], (tap,))


def _row(part: Part, events: list[Event], n_answer: int, owners: dict[str, list[object]]) -> Row:
    first_tap = canonical(events[0].name)
    answer = [event.seconds for event in events if event.phase == "answer"]
    before = [event for event in events if event.phase != "answer"]
    shown = [event for event in before if canonical(event.name) == first_tap]
    shape, times = _combined([event.shape for event in shown], in_pieces=first_tap != "decode")
    code, line = events[0].code, events[0].line
    return Row(
        stage=part.stage,
        title=part.title,
        tap=first_tap,
        shape=shape,
        times=times if "{i}" not in first_tap or first_tap.startswith("vit") else len({e.name for e in shown}),
        parameters=sum(count_weights(owners, claim) for claim in part.weights),
        seconds=sum(event.seconds for event in before),
        seconds_each=_per_token(answer, n_answer) if answer else None,
        file=relative(code.co_filename),
        line=line,
        function=getattr(code, "co_qualname", code.co_name),  # Python 3.10 knows only the last part
        source=linecache.getline(code.co_filename, line).strip(),
    )


def _per_token(seconds: list[float], n_tokens: int) -> float:
    """The median over the tokens of what a step takes for each, all blocks together: equal numbers of firings."""
    firings = len(seconds) // n_tokens
    return float(np.median(np.reshape(seconds[: firings * n_tokens], (n_tokens, firings)).sum(axis=1)))


def _combined(shapes: list[tuple[int, ...]], in_pieces: bool) -> tuple[tuple[int, ...], int]:
    """One shape for several firings, and how often: equal ones repeat, pieces of a prompt are put together, and
    of pictures of different sizes the first stands for all."""
    if len(set(shapes)) <= 1 or not in_pieces:
        return (shapes[0], len(shapes)) if shapes else ((), 0)
    rests = list(dict.fromkeys(shape[1:] for shape in shapes))
    return (sum(shape[0] for shape in shapes), *rests[0]) if len(rests) == 1 else shapes[0], 1


def relative(filename: str) -> str:
    """A source file's path without the machine's folders."""
    path = Path(filename)
    return path.relative_to(HOME).as_posix() if path.is_relative_to(HOME) else path.name


# ---- parameters


def weight_owners(llava: LLaVA) -> dict[str, list[object]]:
    """Dataclasses that hold weights, by the name that PARTS calls them."""
    owners: dict[str, list[object]] = {}
    if llava.vision is not None:
        tower, projector = llava.vision.weights, llava.vision.projector
        owners |= {"vit": [tower], "vit.blk": list(tower.blocks), "mm": list(projector.layers)}
        owners["newline"] = [projector]
    if llava.text is not None:
        owners |= {"llm": [llava.text.llama], "llm.blk": list(llava.text.llama.blk)}
    return owners


def count_weights(owners: dict[str, list[object]], claim: str) -> int:
    """Parameters of "owner:field" and of its bias, in all objects the owner stands for; "*": of every field."""
    owner, _, name = claim.partition(":")
    total = 0
    for weights in owners.get(owner, []):
        for field in fields(weights):  # type: ignore[arg-type]  # weights are dataclasses by convention
            value = getattr(weights, field.name)
            if hasattr(value, "shape") and (name == "*" or field.name in (name, f"{name}_bias")):
                total += prod(value.shape)
    return total
