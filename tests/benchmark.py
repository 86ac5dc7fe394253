"""The speed table: random models at true shapes, each work in turn with the peers. Writes golden/speed-cpu.json.

    python -m tests.benchmark --folder F --peer llama.cpp=PYTHON --peer ik=PYTHON --peer torch=PYTHON \\
        --llava-cli llama-llava-cli                                    all of it: some 40 minutes and 20 GB in F
    python -m tests.benchmark ... --only prefill --models "1.26B Q4_0" --lengths 512      a slice of it
    python -m tests.readme                                             the tables in golden/cpu.md and README.md

A slice's rows replace those of the same work, model and peer; others stay. Nothing else should run meanwhile.
PYTHON is the one that has the peer; ik needs its library built for this processor, in IK_LLAMA_CPP_LIB_PATH.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from golden.clip_models import VISION, ClipSpec, write_mmproj
from golden.manifest import MANIFEST, sha256
from golden.pictures import picture
from tests.true_shapes import LLAMA_1B, LLAMA_7B, VIT_L_15, VIT_L_16, Shape, write_llama
from tinyllava.ops.threads import physical_cores
from tinyllava.study.peers.bench import Contest, cpu_name, with_pictures
from tinyllava.study.peers.worker import OWN, Work

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "golden" / "speed-cpu.json"
WORKS = ("prefill", "decode", "memory", "encode", "whole", "start")
FORMATS = ("Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
N_ANSWER = 32
WARM_TOKENS = 128  # read before the clock runs: pages and kernels are there then
QUESTION = "USER:<image>\nWhat is this?\nASSISTANT:"  # the whole prompt: the same tokens in both


@dataclass(frozen=True)
class Model:
    """A language model of the benchmark."""

    file: str
    shape: Shape
    ftype: str
    lengths: tuple[int, ...]  # of prompts; an answer begins at depth 0 beside the first, after the others


@dataclass(frozen=True)
class Sizes:
    """What is measured: all of it at true shapes, or at tiny ones to test this file."""

    models: dict[str, Model]
    tower_15: ClipSpec = VIT_L_15
    tower_16: ClipSpec = VIT_L_16


TRUE = Sizes(
    {
        **{f"1.26B {ftype}": Model(f"1b-{ftype}.gguf", LLAMA_1B, ftype, (512, 2500)) for ftype in FORMATS},
        "7B Q4_K_M": Model("7b-Q4_K_M.gguf", LLAMA_7B, "Q4_K_M", (512,)),
    }
)
TINY = Sizes(
    {
        name: replace(model, shape=Shape(256, 2, 4, 2, 512, 512), lengths=tuple(n // 16 for n in model.lengths))
        for name, model in TRUE.models.items()
    },
    VISION["clip_15"],
    VISION["clip_16"],
)


@dataclass
class Benchmark:
    """The settings of one call, and the rows that it measured."""

    folder: Path
    sizes: Sizes
    peers: dict[str, str | None]
    llava_cli: str | None
    repeat: int
    threads: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, Any] = field(default_factory=dict)

    # ---- files, written when they are first needed

    def model(self, name: str) -> Path:
        """A language model's file."""
        model = self.sizes.models[name]
        return self._written(model.file, lambda path: write_llama(path, model.shape, model.ftype))

    def tower(self, spec: ClipSpec) -> Path:
        """An image encoder's file, in half precision as LLaVA's are published."""
        return self._written(f"{spec.name}.gguf", lambda path: write_mmproj(path, spec, "F16"))

    def _written(self, name: str, write: Callable[[Path], None]) -> Path:
        path = self.folder / name
        if not path.exists():
            part = path.with_suffix(".part")
            write(part)
            part.rename(path)
        return path

    # ---- rows

    def add(self, work: str, model: str, seconds: Sequence[dict[str, float]]) -> None:
        """A row for each peer: seconds of each turn, and how many times as fast as the peer."""
        for peer in seconds[0]:
            if peer != OWN:
                pairs = [turn[peer] / turn[OWN] for turn in seconds]
                own, theirs = ([turn[name] for turn in seconds] for name in (OWN, peer))
                self._row(work, model, peer, pairs, {"own_s": own, "peer_s": theirs})

    def _row(self, work: str, model: str, peer: str, pairs: list[float], times: dict[str, Any]) -> None:
        row = {"work": work, "model": model, "peer": peer, "ratio": statistics.median(pairs), "pairs": pairs}
        self.rows.append({**row, **times})
        print(f"{work:<16}{model:<18}{peer:<11}{row['ratio']:6.2f}", flush=True)

    def note_versions(self, contest: Contest) -> None:
        """Keep what each program says of itself."""
        for worker in contest.workers:
            about = {key: value for key, value in worker.about.items() if key != "load_s"}
            self.versions[worker.name] = about

    # ---- the works

    def language(self, name: str, length: int, only: Sequence[str]) -> None:
        """Prompt, answer and memory of one language model."""
        lengths = self.sizes.models[name].lengths
        depth = 0 if length == lengths[0] else length
        work = Work(self.model(name), None, length, N_ANSWER, self.threads, backend="numba")
        peers = {peer: python for peer, python in self.peers.items() if peer != "torch"}
        with Contest(work, peers) as contest:
            self.note_versions(contest)
            contest.turn({"do": "prefill", "n": min(WARM_TOKENS, length)})
            contest.turn({"do": "decode", "n": 2, "depth": 1})
            prefills, decodes = [], []
            for _ in range(self.repeat):
                prefills.append(contest.turn({"do": "prefill", "n": length}))
                decodes.append(contest.turn({"do": "decode", "n": N_ANSWER, "depth": depth}))
            memory = contest.memory()
        if "prefill" in only:
            self.add(f"prefill {length}", name, prefills)
        if "decode" in only:
            self.add(f"decode at {depth}", name, decodes)
        for peer in peers if "memory" in only else ():
            own, theirs = memory[OWN] or 0, memory[peer] or 1
            self._row(f"memory {length}", name, peer, [own / theirs], {"own_bytes": own, "peer_bytes": theirs})

    def encode(self) -> None:
        """Pictures of one tile and of five, from pixels to embeddings."""
        first = next(iter(self.sizes.models))
        work = Work(self.model(first), self.tower(self.sizes.tower_16), 1, 1, self.threads, backend="numba")
        work = with_pictures(replace(work, compat="mtmd"))  # as libmtmd: it runs one block fewer than llava
        peers = {peer: python for peer, python in self.peers.items() if peer != "ik"}
        with Contest(work, peers) as contest:
            self.note_versions(contest)
            for i, name in enumerate(("encode 1 tile", "encode 5 tiles")):
                request = {"do": "encode", "picture": i}
                turns = [contest.turn(request) for _ in range(self.repeat + 1)]
                self.add(name, "ViT-L/14-336 F16", turns[1:])

    def whole(self) -> None:
        """One picture to 32 words, from the shell and back, beside llama-llava-cli."""
        if not self.llava_cli:
            return
        first = next(iter(self.sizes.models))
        files = ["-m", str(self.model(first)), "--mmproj", str(self.tower(self.sizes.tower_15))]
        image = self.folder / "picture.png"
        Image.fromarray(picture(640, 480)).save(image)
        asked = ["--image", str(image), "-p", QUESTION, "-n", str(N_ANSWER), "--temp", "0", "--ignore-eos"]
        words = [*files, *asked, "-t", str(self.threads)]
        programs = {OWN: [sys.executable, "-m", "tinyllava", "run", *words], "llava-cli": [self.llava_cli, *words]}
        turns = []
        for turn in range(self.repeat + 1):
            order = list(programs)[:: 1 if turn % 2 else -1]
            turns.append({name: wall(programs[name]) for name in order})
        self.add("whole process", first, turns[1:])

    def start(self) -> dict[str, float]:
        """Seconds until help and the demo are done, with and without compiled kernels."""
        tinyllava = [sys.executable, "-m", "tinyllava"]
        wall([*tinyllava, "demo"])
        with tempfile.TemporaryDirectory() as folder:
            first = wall([*tinyllava, "demo"], NUMBA_CACHE_DIR=folder)
        warm, shown = ([wall([*tinyllava, word]) for _ in range(self.repeat)] for word in ("demo", "--help"))
        return {
            "demo_s": statistics.median(warm),
            "demo_first_s": first,
            "help_s": statistics.median(shown),
        }

    def save(self, path: Path, more: dict[str, Any]) -> None:
        """Put the rows into the file of results, in the place of those measured before."""
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        rows = {(row["work"], row["model"], row["peer"]): row for row in [*found.get("rows", []), *self.rows]}
        found |= {"date": datetime.date.today().isoformat(), "cpu": cpu_name(), "threads": self.threads, **more}
        found |= {"versions": {**found.get("versions", {}), **self.versions}}
        found |= {"rows": [rounded(row) for row in rows.values()]}
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def wall(words: list[str], **environment: str) -> float:
    """Seconds that a command takes. RuntimeError with its last words if it fails."""
    start = time.perf_counter()
    done = subprocess.run(words, cwd=ROOT, capture_output=True, env={**os.environ, **environment}, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{words[0]}: exit code {done.returncode}: {done.stderr[-500:]!r}")
    return time.perf_counter() - start


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Floats with five digits: more say nothing."""

    def short(value: Any) -> Any:
        if isinstance(value, list):
            return [short(item) for item in value]
        return float(f"{value:.5g}") if isinstance(value, float) else value

    return {key: short(value) for key, value in row.items()}


def record(path: Path) -> None:
    """Enter the file of results into golden's manifest."""
    manifest = json.loads(MANIFEST.read_text(encoding="utf-8"))
    found = json.loads(path.read_text(encoding="utf-8"))
    versions = (pair for program in found["versions"].values() for pair in program["versions"].items())
    manifest[path.name] = {
        "bytes": path.stat().st_size,
        "command": "python -m tests.benchmark (see there)",
        "sha256": sha256(path),
        "tolerance": "none: another machine, or another hour, gives other numbers",
        "versions": dict(sorted(versions)),
    }
    MANIFEST.write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main(words: Sequence[str] | None = None) -> None:
    """Measure what is asked for, and save it."""
    parser = argparse.ArgumentParser(description="Measure speed beside other programs", allow_abbrev=False)
    parser.add_argument("--folder", type=Path, required=True, help="for the models; those that are there stay")
    parser.add_argument("--only", nargs="+", choices=WORKS, default=WORKS, metavar="WORK", help=", ".join(WORKS))
    every = list(TRUE.models)
    parser.add_argument("--models", nargs="+", choices=every, default=every, metavar="NAME", help="; ".join(every))
    parser.add_argument("--lengths", nargs="+", type=int, help="of prompts (default: all that a model has)")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME[=PYTHON]", help="as bench has it")
    parser.add_argument("--llava-cli", metavar="FILE", help="llama-llava-cli, for the whole process")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try it out")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args(words)
    asked.folder.mkdir(parents=True, exist_ok=True)
    peers = {name: python or None for name, _, python in (text.partition("=") for text in asked.peer)}
    sizes = TINY if asked.tiny else TRUE
    benchmark = Benchmark(asked.folder, sizes, peers, asked.llava_cli, asked.repeat, asked.threads)
    for name in asked.models:
        for length in sizes.models[name].lengths:
            if {"prefill", "decode", "memory"} & set(asked.only) and length in (asked.lengths or [length]):
                benchmark.language(name, length, asked.only)
    if "encode" in asked.only:
        benchmark.encode()
    if "whole" in asked.only:
        benchmark.whole()
    benchmark.save(asked.results, {"start": benchmark.start()} if "start" in asked.only else {})
    if asked.results == RESULTS:
        record(RESULTS)


if __name__ == "__main__":
    main()
