"""How fast: tokens a second of a prompt and of an answer, seconds for a picture; beside other programs if asked.

Each program works in a process of its own (worker.py) and they take turns; a ratio is the median over the pairs of
neighbours in time: on a machine that others use too, only those can be compared.
"""

from __future__ import annotations

import platform
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np

from tinyllava.errors import ModelError, UsageError
from tinyllava.files.gguf import open_gguf
from tinyllava.language.cache import KVCache
from tinyllava.language.config import read_config
from tinyllava.language.llama import embed, forward, load_llama, unembed
from tinyllava.ops import Ops
from tinyllava.ops.select import select
from tinyllava.ops.threads import processors
from tinyllava.profile import profile
from tinyllava.study.peers.worker import OWN, PEERS, Work, Worker, tokens
from tinyllava.vision.config import VisionConfig

CHECKED_BLOCKS, CHECKED_TOKENS = 2, 4
CHECK_LIMIT = 0.1  # relative error of logits: rounding to 8 bits costs about 1% a block, a wrong kernel everything

Times = dict[str, list[float]]  # what was done -> seconds of each repetition


def check(work: Work, ops: Ops) -> float:
    """The relative error of the logits against the reference, over the first blocks and the head.

    ModelError if it is more than rounding explains: then speed means nothing.
    """
    file = open_gguf(work.model)
    config = read_config(file)
    config = replace(config, n_layer=min(config.n_layer, CHECKED_BLOCKS))
    found = []
    for backend in (select("numpy", threads=ops.threads), ops):
        llama = load_llama(file, config, backend)
        cache = KVCache(config, CHECKED_TOKENS, backend)
        x = forward(embed(tokens(CHECKED_TOKENS), llama, backend), llama, cache, backend)
        found.append(backend.numpy(unembed(x, llama, backend)).astype(np.float64))
    error = float(np.linalg.norm(found[1] - found[0]) / np.linalg.norm(found[0]))
    if not error <= CHECK_LIMIT:
        found_error = f"{ops.name} differs from the reference by {error:.2g}"
        raise ModelError(work.model, found_error, wanted=f"at most {CHECK_LIMIT}")
    return error


class Contest:
    """This package and its peers, each in its process, on the same work. Peers: name -> Python, None for this."""

    def __init__(self, work: Work, peers: Mapping[str, str | None]) -> None:
        with ExitStack() as stack:
            self.workers = [stack.enter_context(Worker(OWN, work))]
            work = replace(work, threads=self.own.about["threads"])
            for name, python in peers.items():
                self.workers.append(stack.enter_context(Worker(name, work, python)))
            self._stack = stack.pop_all()
        self._turns = 0

    @property
    def own(self) -> Worker:
        """This package's worker."""
        return self.workers[0]

    def turn(self, request: dict[str, Any], among: Sequence[str] | None = None) -> dict[str, float]:
        """Seconds that each program takes, one after the other. Who begins changes from turn to turn."""
        workers = [w for w in self.workers if among is None or w.name in among]
        first = self._turns % len(workers)
        self._turns += 1
        seconds = {}
        for worker in workers[first:] + workers[:first]:
            seconds[worker.name] = worker.seconds(request)
            worker.ask({"do": "rest"})
        return seconds

    def memory(self) -> dict[str, int | None]:
        """The most memory that each process has held so far."""
        return {worker.name: worker.ask({"do": "memory"})["bytes"] for worker in self.workers}

    def __enter__(self) -> Contest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def run(work: Work, peers: Mapping[str, str | None] | None = None) -> dict[str, Any]:
    """Do the work; the answer is what ``--json`` prints."""
    peers = peers or {}
    work = with_pictures(replace(work, compat="mtmd" if "llama.cpp" in peers else work.compat))
    error = check(work, select(work.backend, threads=work.threads and min(work.threads, processors())))
    with Contest(work, peers) as contest:
        times = _repeat(contest, work)
        memory = contest.memory()
        found = {
            worker.name: {
                **worker.about,
                **summary(times[worker.name], work),
                "peak_rss_bytes": memory[worker.name],
                "waited_cpu_s": worker.waited_cpu_s,
            }
            for worker in contest.workers
        }
    own = found.pop(OWN)
    for name, theirs in found.items():
        theirs |= ratios(times[OWN], times[name]) | memory_ratio(memory[OWN], memory[name])
    settings = {"cpu": cpu_name(), "compat": work.compat, "check_error": error}
    return {**own, **settings, **({"peers": found} if found else {})}


def with_pictures(work: Work) -> Work:
    """The work with the sizes of its pictures: one tile, and for LLaVA-1.6 the most tiles that its file knows."""
    if work.mmproj is None:
        return work
    config = VisionConfig.from_gguf(open_gguf(work.mmproj), profile(work.compat))
    sizes = [(config.image_px, config.image_px)]
    if config.pinpoints:
        largest = max(config.pinpoints, key=lambda size: size.height * size.width)
        sizes.append((largest.width, largest.height))
    return replace(work, pictures=tuple(sizes))


def requests(work: Work) -> dict[str, dict[str, Any]]:
    """What is asked of each program in one repetition, by the name of its times."""
    found: dict[str, dict[str, Any]] = {"prefill": {"do": "prefill", "n": work.n_prompt}}
    if work.n_answer:
        found["decode"] = {"do": "decode", "n": work.n_answer, "depth": work.n_prompt}
    for i, name in enumerate(("encode", "encode_tiles")[: len(work.pictures)]):
        found[name] = {"do": "encode", "picture": i}
    return found


def _repeat(contest: Contest, work: Work) -> dict[str, Times]:
    """All repetitions of all programs, after one without a clock: pages are read, kernels compiled."""
    times: dict[str, Times] = {worker.name: {} for worker in contest.workers}
    for repetition in range(work.repeat + 1):
        for kind, request in requests(work).items():
            among = [w.name for w in contest.workers if request["do"] != "encode" or w.name != "ik"]
            for name, seconds in contest.turn(request, among).items():
                if repetition:
                    times[name].setdefault(kind, []).append(seconds)
    return times


def summary(times: Times, work: Work) -> dict[str, float]:
    """Medians in the units that are reported."""
    median = {kind: statistics.median(found) for kind, found in times.items()}
    found = {"prefill_tokens_per_s": work.n_prompt / median["prefill"]}
    if "decode" in median:
        found["decode_tokens_per_s"] = work.n_answer / median["decode"]
    return {**found, **{f"{kind}_s": s for kind, s in median.items() if kind.startswith("encode")}}


def ratios(own: Times, peer: Times) -> dict[str, float]:
    """How many times as fast as the peer: the median over pairs."""
    faster = {kind: [b / a for a, b in zip(own[kind], peer[kind], strict=True)] for kind in own if kind in peer}
    return {f"{kind}_ratio": statistics.median(found) for kind, found in faster.items()}


def memory_ratio(own: int | None, peer: int | None) -> dict[str, float]:
    """Our peak of memory by the peer's, where both are known."""
    return {"peak_rss_ratio": own / peer} if own and peer else {}


def cpu_name() -> str:
    """The processor's name as the system gives it; on x86 its family and model, which a name often leaves out."""
    found: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                key, _, value = line.partition(":")
                found.setdefault(key.strip(), value.strip())  # of the first processor
    except OSError:
        pass
    name = found.get("model name") or platform.processor() or platform.machine()
    return f"{name} (family {found['cpu family']}, model {found['model']})" if "cpu family" in found else name


LINES = {
    "prefill_tokens_per_s": ("prompt, tokens/s", "prefill_ratio", 1.0),
    "decode_tokens_per_s": ("answer, tokens/s", "decode_ratio", 1.0),
    "encode_s": ("one tile, s", "encode_ratio", 1.0),
    "encode_tiles_s": ("all tiles, s", "encode_tiles_ratio", 1.0),
    "load_s": ("load, s", "", 1.0),
    "peak_rss_bytes": ("peak memory, MiB", "peak_rss_ratio", 2.0**20),
}


def report(found: dict[str, Any]) -> str:
    """The answer as lines to read."""
    peers: dict[str, dict[str, Any]] = found.get("peers", {})
    lines = [f"{found['backend']}, {found['threads']} threads, {found['cpu']}"]
    if peers:
        lines.append(" " * 27 + "".join(f"{name:>12}{'ratio':>7}" for name in peers))
    for key, (title, ratio, unit) in LINES.items():
        if found.get(key) is None:
            continue
        line = f"{title:<18}{found[key] / unit:9.2f}"
        for peer in peers.values():
            theirs = f"{peer[key] / unit:.2f}" if peer.get(key) is not None else ""
            line += f"{theirs:>12}" + (f"{peer[ratio]:7.2f}" if ratio in peer else " " * 7)
        lines.append(line.rstrip())
    lines.append(f"{'check':<18}{found['check_error']:9.1e} relative error against the reference")
    if peers:
        lines.append("ratio: how many times as fast as the peer, the median over pairs; of memory, ours to theirs")
    return "\n".join(lines)


def need(work: Work, peers: Mapping[str, str | None]) -> None:
    """UsageError for numbers that cannot be, and for peers that are none."""
    for name, number in (("-p", work.n_prompt), ("--repeat", work.repeat)):
        if number < 1:
            raise UsageError(name, str(number), wanted="1 or more")
    if work.n_answer < 0:
        raise UsageError("-n", str(work.n_answer), wanted="0 or more")
    for peer in peers:
        if peer not in PEERS:
            raise UsageError("--peer", peer, wanted=" or ".join(PEERS))
