"""What ``run`` says beside the answer: the plan, progress and timings on stderr, and the answer as JSON."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinyllava.generate import Plan, Result
    from tinyllava.llava import LLaVA
    from tinyllava.text.sampling import Sampling
    from tinyllava.text.tokenizer import Tokenizer
    from tinyllava.vision.anyres import PicturePlan

BAR_WIDTH = 30  # characters
REFRESH_S = 0.05  # seconds between two drawings of a progress bar
UNITS = {"picture": "tiles", "prompt": "tokens", "quantize": "MiB", "model": "MiB", "mmproj": "MiB"}


class Report:
    """Writes to stderr, so that stdout holds the answer alone. A progress bar needs a terminal."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self._held: list[str] | None = []  # notes wait for the plan: what is refused gets one line, and no more
        self.shows_progress = not quiet and sys.stderr.isatty()
        self._drawn_at = -math.inf
        self._bar = ""

    def say(self, line: str) -> None:
        """One line, unless quiet."""
        if not self.quiet:
            self.clear()
            print(line, file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Something the user did not ask for, but may want to know. Said once the work begins."""
        if self._held is None:
            self.say(f"note: {text}")
        else:
            self._held.append(text)

    def compiling(self) -> None:
        """Say why nothing seems to happen."""
        self.note("compiling the kernels for this processor, once; it takes some 20 s")

    def begin(self) -> None:
        """The input was good: say the notes that were held back, and from now on all others at once."""
        held, self._held = self._held or [], None
        for text in held:
            self.note(text)

    def ignored(self, arguments: argparse.Namespace) -> None:
        """Name the options that were taken for llama-llava-cli's sake."""
        if arguments.ignored:
            self.note(f"{', '.join(arguments.ignored)}: accepted, but without effect in tinyllava")

    # ---- progress: the callback of LLaVA

    def progress(self, stage: str, done: int, total: int) -> None:
        """Draw a bar: ``[######......] 3/5 tiles``. At the end of a stage it goes away."""
        if not self.shows_progress:
            return
        if done >= total:
            self.clear()
            return
        now = time.monotonic()
        if self._bar and now - self._drawn_at < REFRESH_S:
            return
        filled = BAR_WIDTH * done // max(total, 1)
        bar = f"{stage:<8}[{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {done}/{total} {UNITS.get(stage, '')}"
        print("\r" + bar.ljust(len(self._bar)), end="", file=sys.stderr, flush=True)
        self._bar, self._drawn_at = bar, now

    def clear(self) -> None:
        """Wipe the bar, before text goes to the same terminal."""
        if self._bar:
            print("\r" + " " * len(self._bar) + "\r", end="", file=sys.stderr, flush=True)
            self._bar = ""

    # ---- before and after

    def plan(self, plan: Plan, sources: Sequence[Path], llava: LLaVA) -> None:
        """What will be done and what it needs, before it is done."""
        self.begin()
        ops = llava.ops
        self.say(f"{plan.family}, {ops.name} backend, {ops.dtype.name}, {_count(ops.threads, 'thread')}")
        if llava.placement.n_layers:
            self.say(layers_on_gpu(llava))
        self.say(f"template {plan.template} ({plan.template_reason.removeprefix(f'{plan.template}: ')})")
        for i, picture in enumerate(plan.pictures):
            name = sources[i].name if len(sources) == len(plan.pictures) else f"picture {i + 1}"
            self.say(f"{name}: {describe(picture)}")
            self.say(f"image embedding created: {picture.n_tokens} tokens")
        text = f"{len(plan.text_ids)} of text, {plan.image_tokens} of pictures"
        self.say(f"prompt: {_count(plan.prompt_tokens, 'token')} ({text})")
        longest = f"an answer of up to {_count(plan.max_tokens, 'token')}"
        self.say(f"context: {plan.context_needed} needed with {longest}, {plan.n_ctx} there")

    def tokens(self, plan: Plan, tokenizer: Tokenizer) -> None:
        """The prompt, a token a line, as --verbose-prompt asks."""
        for part in plan.parts:
            if isinstance(part, list):
                for token in part:
                    self.say(f"{token:6d} -> {tokenizer.text_of(token)!r}")
            else:
                n_tokens = plan.pictures[part.index].n_tokens
                self.say(f"       -> picture {part.index + 1}, {n_tokens} embeddings")

    def timings(self, result: Result, plan: Plan) -> None:
        """How long each stage took."""
        t = result.timings
        n_tiles = sum(picture.n_tiles for picture in plan.pictures)
        stages = [f"load {t['load_s']:.2f} s"]
        if n_tiles:
            stages.append(f"pictures {t['encode_s']:.2f} s ({_count(n_tiles, 'tile')})")
        n_prompt, n_answer = result.prompt_tokens, len(result.tokens)
        for name, key, n in (("prompt", "prefill", n_prompt), ("answer", "decode", n_answer)):
            speed = f"{t[f'{key}_tokens_per_s']:.1f} tokens/s"
            stages.append(f"{name} {t[f'{key}_s']:.2f} s ({_count(n, 'token')}, {speed})")
        self.say("; ".join(stages))
        if result.finish_reason == "length":
            self.note(f"the answer was cut after {_count(plan.max_tokens, 'token')}; -n allows more")


def layers_on_gpu(llava: LLaVA) -> str:
    """``on the GPU: 20 of 33 layers, the image encoder``."""
    parts = [f"{llava.placement.n_layers} of {llava.text.llama.config.n_layer + 1} layers"] if llava.text else []
    return f"on the GPU: {', '.join(parts + ['the image encoder'] * (llava.vision is not None))}"


def describe(picture: PicturePlan) -> str:
    """``640x480 px, resized into 672x672 px, 2x2 tiles of 336 px and the whole picture``."""
    rows, columns = picture.grid
    text = f"{picture.size} px, resized into {picture.resolution} px, "
    if picture.kind == "1.5":
        return text + "one tile"
    overview = " and the whole picture" if picture.n_tiles > rows * columns else ""
    return text + f"{columns}x{rows} tiles of {picture.tile_px} px{overview}"


def as_json(result: Result, plan: Plan, llava: LLaVA, sampling: Sampling, images: Sequence[Path]) -> str:
    """The answer and how it came about, as one line of JSON."""
    settings = {
        **asdict(sampling),
        "logit_bias": [[token, _finite(bias)] for token, bias in sampling.logit_bias],
        "max_tokens": plan.max_tokens,
        "n_ctx": llava.n_ctx,
        "n_batch": llava.n_batch,
        "threads": llava.ops.threads,
        "n_gpu_layers": llava.placement.n_layers,
        "dtype": llava.ops.dtype.name,
        "compat": llava.profile.name,
        "template": plan.template,
        "images": [str(path) for path in images],
    }
    answer = {
        "text": result.text,
        "tokens": result.tokens,
        "finish_reason": result.finish_reason,
        "image_tokens": result.image_tokens,
        "prompt_tokens": result.prompt_tokens,
        "timings": {name: round(seconds, 6) for name, seconds in result.timings.items()},
        "backend": llava.ops.name,
        "settings": settings,
        "seed": result.seed,
    }
    return json.dumps(answer, ensure_ascii=False)


def _finite(x: float) -> Any:
    """JSON has no infinity: it becomes text."""
    return x if math.isfinite(x) else str(x)


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"
