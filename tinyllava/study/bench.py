"""How fast: tokens a second of a prompt and of an answer, seconds for a picture, against another program if asked.

Times are medians over repetitions. Against a peer the two take turns, and the ratio is the median over the pairs:
on a machine that others use too, only neighbours in time can be compared.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

import tinyllava
from tinyllava.errors import ModelError, UsageError
from tinyllava.files.gguf import open_gguf
from tinyllava.language.cache import KVCache
from tinyllava.language.config import read_config
from tinyllava.language.llama import embed, forward, load_llama, unembed
from tinyllava.ops import Ops, select

if TYPE_CHECKING:
    from tinyllava.llava import LLaVA

CHECKED_BLOCKS, CHECKED_TOKENS = 2, 4
CHECK_LIMIT = 0.1  # relative error of logits: rounding to 8 bits costs about 1% a block, a wrong kernel everything


@dataclass(frozen=True)
class Work:
    """What is timed."""

    model: Path
    mmproj: Path | None = None
    n_prompt: int = 512
    n_answer: int = 32
    threads: int | None = None
    repeat: int = 3
    backend: str = "auto"

    @property
    def ids(self) -> list[int]:
        """A prompt of tokens that every vocabulary has; which they are does not matter for speed."""
        return [3 + 7 * i % 200 for i in range(self.n_prompt)]


@dataclass
class Times:
    """Seconds of each repetition."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)  # of one token
    encode: list[float] = field(default_factory=list)

    def summary(self, work: Work) -> dict[str, float]:
        """Medians in the units that are reported."""
        found = {"prefill_tokens_per_s": work.n_prompt / statistics.median(self.prefill)}
        if self.decode:
            found["decode_tokens_per_s"] = 1.0 / statistics.median(self.decode)
        if self.encode:
            found["encode_s"] = statistics.median(self.encode)
        return found


class Runner(Protocol):
    """Someone who can do the work."""

    def prefill(self, ids: list[int]) -> None: ...
    def decode(self, token: int) -> None: ...


class Own:
    """This package."""

    def __init__(self, llava: LLaVA, work: Work) -> None:
        self.llava, self.llama, self.ops = llava, llava.language.llama, llava.ops
        self.n_ctx = work.n_prompt + work.n_answer
        self.cache = KVCache(self.llama.config, self.n_ctx, self.ops)

    def prefill(self, ids: list[int]) -> None:
        """Read a prompt into an empty cache; the logits after its last token."""
        self.cache.truncate(0)
        x = embed(ids, self.llama, self.ops)
        for piece in self.llava.chunks(x):
            x = forward(piece, self.llama, self.cache, self.ops)
        unembed(x[-1:], self.llama, self.ops)

    def decode(self, token: int) -> None:
        """One more token; the logits after it."""
        x = forward(embed([token], self.llama, self.ops), self.llama, self.cache, self.ops)
        unembed(x, self.llama, self.ops)


def check(work: Work, ops: Ops) -> float:
    """The relative error of the logits against the reference, over the first blocks and the head.

    ModelError if it is more than rounding explains: then speed means nothing.
    """
    file = open_gguf(work.model)
    config = read_config(file)
    config = replace(config, n_layer=min(config.n_layer, CHECKED_BLOCKS))
    found = []
    for backend in (select("numpy"), ops):
        llama = load_llama(file, config, backend)
        cache = KVCache(config, CHECKED_TOKENS, backend)
        x = forward(embed(work.ids[:CHECKED_TOKENS], llama, backend), llama, cache, backend)
        found.append(backend.numpy(unembed(x, llama, backend)).astype(np.float64))
    error = float(np.linalg.norm(found[1] - found[0]) / np.linalg.norm(found[0]))
    if not error <= CHECK_LIMIT:
        found_error = f"{ops.name} differs from the reference by {error:.2g}"
        raise ModelError(work.model, found_error, wanted=f"at most {CHECK_LIMIT}")
    return error


def timed(call: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def repetition(runner: Runner, work: Work, times: Times) -> None:
    """Time one prompt and one answer."""
    times.prefill.append(timed(lambda: runner.prefill(work.ids)))
    if work.n_answer:
        times.decode.append(timed(lambda: _answer(runner, work.n_answer)) / work.n_answer)


def _answer(runner: Runner, n: int) -> None:
    for i in range(n):
        runner.decode(5 + i)


def run(work: Work, peer: str | None = None) -> dict[str, Any]:
    """Do the work; the answer is what ``--json`` prints."""
    llava = tinyllava.load(work.model, work.mmproj, backend=work.backend, threads=work.threads)
    error = check(work, llava.ops)
    runners: list[Runner] = [Own(llava, work)]
    if peer is not None:
        from tinyllava.study.peers import open_peer

        runners.append(open_peer(peer, work, llava.ops.threads))
    times = [Times() for _ in runners]
    for runner in runners:  # once without a clock: pages are read, kernels compiled
        runner.prefill(work.ids)
        runner.decode(3)
    for _ in range(work.repeat):
        for runner, into in zip(runners, times, strict=True):
            repetition(runner, work, into)
    if work.mmproj is not None:
        _time_picture(llava, work, times[0])
    found: dict[str, Any] = {**times[0].summary(work), "load_s": llava.load_s, "check_error": error}
    if peer is not None:
        found["peer"] = {"name": peer, **times[1].summary(work), **ratios(times[0], times[1])}
    return {**found, **about(llava)}


def _time_picture(llava: LLaVA, work: Work, times: Times) -> None:
    """A picture of one tile's size, in grey noise."""
    side = llava.eye.config.image_px
    rgb = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    llava.encode_pixels(rgb)
    times.encode += [timed(lambda: llava.encode_pixels(rgb)) for _ in range(work.repeat)]


def ratios(own: Times, peer: Times) -> dict[str, float]:
    """How many times as fast as the peer: the median over pairs."""
    pairs = {"prefill_ratio": (own.prefill, peer.prefill), "decode_ratio": (own.decode, peer.decode)}
    faster = {name: [b / a for a, b in zip(*both, strict=True)] for name, both in pairs.items()}
    return {name: statistics.median(found) for name, found in faster.items() if found}


def about(llava: LLaVA) -> dict[str, Any]:
    """Where and with what it was measured."""
    packages = ("numpy", "numba", "llvmlite")
    versions = {name: sys.modules[name].__version__ for name in packages if name in sys.modules}
    return {
        "peak_rss_bytes": peak_rss_bytes(),
        "threads": llava.ops.threads,
        "backend": llava.ops.name,
        "cpu": cpu_name(),
        "versions": {"tinyllava": tinyllava.__version__, "python": platform.python_version(), **versions},
    }


def peak_rss_bytes() -> int | None:
    """The most memory that this process has held, the file's mapped pages included; None where nobody says."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def report(found: dict[str, Any]) -> str:
    """The answer as lines to read."""
    lines = [f"{found['backend']}, {found['threads']} threads, {found['cpu']}"]
    peer = found.get("peer", {})
    units = {"prefill_tokens_per_s": "prompt, tokens/s", "decode_tokens_per_s": "answer, tokens/s"}
    for key, title in {**units, "encode_s": "picture, s"}.items():
        if key not in found:
            continue
        line = f"{title:<18}{found[key]:9.2f}"
        if key in peer:
            line += f"   {peer['name']} {peer[key]:9.2f}   ratio {peer[key.split('_')[0] + '_ratio']:.2f}"
        lines.append(line)
    rss = found["peak_rss_bytes"]
    lines.append(f"{'peak memory, MiB':<18}{rss / 2**20:9.0f}" if rss else "peak memory: unknown here")
    lines.append(f"{'check':<18}{found['check_error']:9.1e} relative error against the reference")
    return "\n".join(lines)


def need(work: Work) -> None:
    """UsageError for numbers that cannot be."""
    for name, number in (("-p", work.n_prompt), ("--repeat", work.repeat)):
        if number < 1:
            raise UsageError(name, str(number), wanted="1 or more")
    if work.n_answer < 0:
        raise UsageError("-n", str(work.n_answer), wanted="0 or more")
