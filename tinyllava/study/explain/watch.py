"""A tap that watches a whole run: what fired, its shape, its time, the line of code, and what the report draws.

Kept of every answer token are its logits, the residual stream after each block and its attention to the
picture; of everything else only the shape. So a run of a 7B model fits into memory while it is watched: at its
width, with 2589 tokens of a tiled picture and a question, watching took 50 MiB more than answering.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tinyllava.ops import Array, Ops
from tinyllava.study.explain.maps import MapKeeper
from tinyllava.text.sampling import Sampler, Sampling

Phase = Literal["picture", "prompt", "answer"]
ATTENTION = "attn_weights"


@dataclass(frozen=True)
class Event:
    """One firing of a tap. ``seconds`` is the time since the tap before it, without the watching itself."""

    phase: Phase
    name: str  # the tap's full name: llm.blk.3.attn_q
    shape: tuple[int, ...]
    seconds: float
    code: CodeType  # of the function that called the tap
    line: int


@dataclass
class Step:
    """What is kept of one run of the language model for the token that comes out of it."""

    logits: npt.NDArray[Any]  # (n_vocab,)
    hidden: npt.NDArray[Any]  # (1 + n_layer, n_embd): what enters block 0, then what leaves each block
    token: int = -1  # the token that was chosen


@dataclass
class Watch:
    """The state that all levels of the tap share. Give ``watch.tap()`` to a Stream."""

    ops: Ops
    n_prompt: int  # tokens; the run that reads the last of them makes the first token of the answer
    maps: MapKeeper | None = None  # None: nobody looks at attention
    events: list[Event] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    pixels: list[npt.NDArray[Any]] = field(default_factory=list)  # of each picture (n_tiles, 3, H, W)
    n_read: int = 0  # tokens that the language model has read or is reading
    _mark: float = field(default_factory=time.perf_counter)
    _hidden: list[npt.NDArray[Any]] = field(default_factory=list)

    def tap(self) -> WatchTap:
        """The tap to hand to a run. The clock starts now."""
        self._mark = time.perf_counter()
        return WatchTap(self, "")

    @property
    def phase(self) -> Phase:
        """Reading the picture, reading the prompt, or making the answer's second and later tokens."""
        if self.n_read == 0:
            return "picture"
        return "prompt" if self.n_read <= self.n_prompt else "answer"

    @property
    def makes_a_token(self) -> bool:
        """Whether the run of the language model that is on its way ends in a token."""
        return self.n_read >= self.n_prompt

    def fire(self, name: str, value: Array, code: CodeType, line: int) -> None:
        """Note one firing, and keep what the report draws."""
        self.ops.numpy(value[:1])  # a GPU computes later than it is asked: wait for it, then look at the clock
        seconds = time.perf_counter() - self._mark
        if name == "pixels":
            self.pixels.append(np.asarray(value))
        if name == "llm.inp_embd":
            self.n_read += len(value)
            self._hidden = []
        self.events.append(Event(self.phase, name, tuple(value.shape), seconds, code, line))
        if self.makes_a_token and name.startswith("llm."):
            self._keep(name, value)
        self._mark = time.perf_counter()

    def _keep(self, name: str, value: Array) -> None:
        if name == "llm.inp_embd" or name.endswith(".l_out"):
            self._hidden.append(np.array(self.ops.numpy(value[-1])))  # (n_embd,) of the last position
        elif name.endswith(ATTENTION) and self.maps is not None:
            block = int(name.split(".")[-2])
            self.maps.add(block, np.asarray(self.ops.numpy(value[:, -1])))  # (n_head, m)
        elif name == "llm.result_output":
            logits = np.array(self.ops.numpy(value[-1]))  # (n_vocab,)
            self.steps.append(Step(logits, np.stack(self._hidden)))
            if self.maps is not None:
                self.maps.finish()

    def chose(self, token: int, code: CodeType) -> None:
        """Note the token that was sampled from the last logits, as an event without a tap."""
        now = time.perf_counter()
        self.steps[-1].token = token
        self.events.append(Event(self.phase, "token", (1,), now - self._mark, code, code.co_firstlineno))
        self._mark = time.perf_counter()


class WatchTap:
    """One level of the tap: names get its prefix."""

    def __init__(self, watch: Watch, prefix: str) -> None:
        self.watch = watch
        self.prefix = prefix

    def __call__(self, name: str, value: Array) -> Array:
        caller = sys._getframe(1)  # whoever calls the tap did the step: its code and line are what learners want
        self.watch.fire(self.prefix + name, value, caller.f_code, caller.f_lineno)
        return value

    def at(self, prefix: str) -> WatchTap:
        """The tap one level down."""
        return WatchTap(self.watch, f"{self.prefix}{prefix}.")

    def wants(self, name: str) -> bool:
        """Attention of the language model, but of long prompts only the piece that ends them."""
        watch = self.watch
        if name != ATTENTION or watch.maps is None:
            return False
        return self.prefix.startswith("llm.") and watch.makes_a_token


class WatchedSampler(Sampler):
    """A sampler that tells the watch what it chose."""

    def __init__(self, sampling: Sampling, n_vocab: int, watch: Watch) -> None:
        super().__init__(sampling, n_vocab)
        self.watch = watch

    def sample(self, logits: npt.ArrayLike) -> int:
        """As :meth:`Sampler.sample`."""
        token = super().sample(logits)
        self.watch.chose(token, Sampler.sample.__code__)
        return token
